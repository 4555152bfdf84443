"""`copy_pages` as one gather and one scatter, whatever is actually copied."""


def lacks(call):
    return "pools of codes" if call.pool.storage.quantized else None


def run(call, *, interpret):
    sources, destinations = call.sources, call.destinations
    num_pages = call.pool.arrays[0].shape[1]
    skipped = (sources < 0) | (sources >= num_pages) | (destinations < 0)
    into = num_pages * skipped + destinations * ~skipped
    return tuple(
        pages.at[:, into].set(
            pages.at[:, sources].get(mode="clip"), mode="drop"
        )
        for pages in call.pool.arrays
    )
