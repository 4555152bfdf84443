"""The cache's policy, as a loop of the user's own meets it: `observe`, and `evict` for a prompt cut once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.entries import check_call, clean_slots
from jaxkv.fingerprint import is_current
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.policies.base import Step
from jaxkv.releasing import release_windows
from jaxkv.state import Batch, KVCache, PolicyState, Status


def observe(
    cache: KVCache,
    batch: Batch,
    mass: Float[Array, "layers entries kv_heads max_tokens"] | None = None,
) -> KVCache:
    """Tells the cache's policy what attention a step's tokens paid, after the last layer.

    A batch stays valid. Without a policy, or with one that does not go by attention, nothing changes, and no
    mass is needed.

    Args:
      cache: as `allocate` returned it with `batch`, or after `append`. Of a stale batch nothing is noted.
      batch: of the step.
      mass: what `attention_mass` returned in each layer with full attention, stacked.

    Returns:
      The cache.

    Raises:
      ValueError: without a mass where the policy needs one, or for one of another shape, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=2)
      >>> cache = jaxkv.init(config, jaxkv.policies.HeavyHitter(budget=8, recent=4))
      >>> cache, batch = jaxkv.allocate(cache, jnp.array([0]), jnp.array([1]))
      >>> cache = jaxkv.observe(cache, batch, jnp.ones((1, 1, 1, config.max_tokens_per_seq)))
      >>> float(cache.policy.values["mass"][0, 0, 0, 0])
      1.0
    """
    config, entries = cache.config, batch.seqs.shape[0]
    if cache.policy is None or not cache.policy.rule.needs_mass:
        return cache
    name = type(cache.policy.rule).__name__
    if mass is None:
        raise ValueError(
            f"{name} ranks tokens by the attention that they received, so observe needs mass: that of "
            "jaxkv.attention_mass in each layer"
        )
    mass = jnp.asarray(mass)
    shape = len(config.full_layers), entries, config.num_kv_heads, config.max_tokens_per_seq
    if mass.shape != shape:
        raise ValueError(
            f"mass must be [layers, entries, kv_heads, max_tokens] = {list(shape)}, of the layers with full "
            f"attention, not {list(mass.shape)}"
        )
    return replace(cache, policy=_observe(cache, batch, mass))


@operation(results=lambda cache, *_: as_given(cache.policy))
@jax.named_scope("jaxkv.observe")
def _observe(cache: KVCache, batch: Batch, mass: Array) -> PolicyState:
    state = cache.policy
    assert state is not None
    return replace(state, values=state.rule.note(state.values, _step(cache, batch, mass), batch))


def _step(cache: KVCache, batch: Batch, mass: Array) -> Step:
    config = cache.config
    ran = (batch.status == Status.OK) & (batch.num_tokens > 0) & is_current(cache.table, batch)
    place = jnp.arange(config.max_tokens_per_seq, dtype=jnp.int32)[None, None, None]
    ends = batch.kv_lengths[:, None, None, None]
    begins = ends - batch.num_tokens[:, None, None, None]
    return Step(
        slot=jnp.where(ran, batch.seqs, config.max_seqs),
        mass=jnp.swapaxes(mass, 0, 1).astype(jnp.float32),
        is_new=(place >= begins) & (place < ends),
        is_old=place < begins,
        indices=place,
    )


def evict(cache: KVCache, seqs: Int[Array, " entries"]) -> tuple[KVCache, Int[Array, " entries"]]:
    """Drops what is beyond the budget of some sequences now, all of it or nothing for each.

    `allocate` evicts by itself, except for `PromptCompress`, which compresses a prompt once: call `evict`
    after the prompt's last tokens were observed. Call it before a `fork` if children should share what is
    left.

    Args:
      cache: the cache; no `Batch` of it may be in use.
      seqs: slots; padding, empty slots and a slot named again are passed over.

    Returns:
      The cache, and how many token slots each sequence gave up to the policy: none without one, or where
      there are too few free pages for what it keeps of pages that others share. What the window of a layer
      hides from every token to come is released too.

    Raises:
      ValueError: for wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=8, page_size=4)
      >>> cache = jaxkv.init(config, jaxkv.policies.SlidingWindow(5, sinks=2))
      >>> cache, _ = jaxkv.allocate(cache, jnp.array([0]), jnp.array([14]), total_tokens=14)
      >>> cache, num_dropped = jaxkv.evict(cache, jnp.array([0]))
      >>> num_dropped.tolist(), int(cache.table.num_free)
      ([4], 5)
    """
    (seqs,) = check_call(cache, seqs=seqs)
    idle = cache.policy is None and cache.config.layer_windows is None
    return (cache, jnp.zeros_like(seqs)) if idle else _evict(cache, seqs)


@operation(results=lambda cache, _: (as_given(cache), REPLICATED))
@jax.named_scope("jaxkv.evict")
def _evict(cache: KVCache, seqs: Array) -> tuple[KVCache, Array]:
    slot = clean_slots(seqs, cache.config.max_seqs)
    cache = release_windows(cache, slot)
    return (cache, jnp.zeros_like(seqs)) if cache.policy is None else cache.policy.rule.evict(cache, slot)
