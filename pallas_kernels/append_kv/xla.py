"""`append_kv` as one scatter for K and one for V."""


def append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer):
    """See `api.append_kv`."""

    def write(pages, values):
        # Padding is past the end and dropped; an offset past the page would be too.
        return pages.at[layer, page_ids, :, offsets].set(values.astype(pages.dtype), mode="drop")

    return write(k_pages, k), write(v_pages, v)
