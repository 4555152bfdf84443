"""Sizes of the index of recorded prefixes, of a config with `prefix_cache`."""

from math import lcm, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxkv.config import CacheConfig

# Nodes whose hashes name the same bucket. There is a bucket for each node: while all are in use, one new node
# in 100,000 finds its own full, and its chain ends there.
WAYS = 8


def block_tokens(config: "CacheConfig") -> int:
    """Tokens of a node: a whole number of pages in every group."""
    return lcm(*(group.page_size for group in config.groups))


def pages_per_node(config: "CacheConfig") -> tuple[int, ...]:
    """Pages of a node in each group."""
    block = block_tokens(config)
    return tuple(block // group.page_size for group in config.groups)


def index_shapes(config: "CacheConfig") -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of a `PrefixIndex`."""
    nodes = pages = config.num_pages
    buckets = 1 << (nodes - 1).bit_length()
    return {
        "tokens": ((nodes, block_tokens(config)), "int32"),
        "salts": ((nodes,), "int32"),
        "tags": ((nodes,), "uint32"),
        "parents": ((nodes,), "int32"),
        "children": ((nodes,), "int32"),
        "places": ((nodes,), "int32"),
        "pages": ((nodes, sum(pages_per_node(config))), "int32"),
        "buckets": ((WAYS * buckets,), "int32"),
        "free_nodes": ((nodes,), "int32"),
        "num_free_nodes": ((), "int32"),
        "holders": ((pages,), "int32"),
        "queue": ((2 * pages,), "int32"),
        "queue_ends": ((2,), "int32"),
        "queued_at": ((pages,), "int32"),
        "num_reclaimable": ((), "int32"),
        "num_reclaimed": ((), "int32"),
        "intact": ((config.max_seqs,), "int32"),
    }


def index_bytes(config: "CacheConfig") -> int:
    """Bytes of the index; 0 without one."""
    if not config.prefix_cache:
        return 0
    return sum(4 * prod(shape) for shape, _ in index_shapes(config).values())
