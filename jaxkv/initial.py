"""An empty cache."""

import jax.numpy as jnp

from jaxkv.config import CacheConfig
from jaxkv.ownership import all_free
from jaxkv.policies import Policy
from jaxkv.prefix_index import empty_index
from jaxkv.state import AllocationStats, KVCache, KVPool, PageTable, PolicyState


def init(config: CacheConfig, policy: Policy | None = None) -> KVCache:
    """An empty cache: a zeroed pool with every page free.

    Args:
      config: the sizes.
      policy: what to evict where a sequence outgrows its budget. `allocate` then evicts what is due, and
        `attend` applies the policy's window. Default: nothing is evicted.

    Returns:
      The cache. Its pool takes `config.num_pages * config.page_bytes` bytes. What a policy remembers of each
      token takes four bytes a token slot, layer and KV head of every row of the page table: bound
      `max_pages_per_seq` to what the policy's `capacity` needs.

    Raises:
      ValueError: for a policy that does not fit the cache, naming both.

    Example:
      >>> from jaxkv import CacheConfig, init
      >>> cache = init(CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4))
      >>> int(cache.table.num_free)
      4
    """
    if not isinstance(config, CacheConfig):
        raise ValueError(f"init takes a CacheConfig, not {type(config).__name__}")
    state = None if policy is None else first_state(config, policy)
    seqs, pages = config.max_seqs, config.num_pages
    return KVCache(
        pool=KVPool(
            jnp.zeros(config.pool_shape, config.storage_dtype),
            jnp.zeros(config.pool_shape, config.storage_dtype),
            *(jnp.zeros(shape, config.scale_dtype) for shape in config.scale_shapes),
        ),
        table=PageTable(
            pages=jnp.full((config.num_rows, config.num_columns), pages, jnp.int32),
            lengths=jnp.zeros(config.num_rows, jnp.int32),
            positions=jnp.zeros(seqs, jnp.int32),
            fingerprint=jnp.zeros(2, jnp.uint32),
            prefixes=empty_index(config) if config.prefix_cache else None,
            **all_free(pages),
        ),
        stats=AllocationStats(jnp.zeros(len(AllocationStats.names()), jnp.int32)),
        config=config,
        policy=state,
    )


def first_state(config: CacheConfig, policy: Policy) -> PolicyState:
    """The state of a policy that has seen nothing yet; `init` raises what it does."""
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r} must be a jaxkv.Policy")
    policy.check(config)
    return PolicyState(policy.first_values(config), jnp.zeros(config.max_seqs, jnp.int32), policy)
