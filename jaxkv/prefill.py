"""A chunk of prompts through the model, a pure function for a caller's own `jit`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.allocation import allocate
from jaxkv.causal_lm import CausalLM, mark_layers, run_model, unwritten_layers
from jaxkv.compaction import maybe_compact
from jaxkv.state import Batch, KVCache, PolicyState


def prefill(
    model: CausalLM,
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    tokens: Int[Array, " tokens"],
    policy: PolicyState | None = None,
) -> tuple[Float[Array, "seqs vocab"], KVCache, PolicyState | None, Int[Array, " seqs"]]:
    """Runs one ragged chunk of prompts through the model; afterwards a policy evicts what is too much.

    Args:
      model: the model.
      cache: the cache.
      seqs: slots; a negative one is padding.
      num_tokens: tokens of each in this chunk.
      tokens: their ids, one sequence after the other, padded at the end.
      policy: the state of an eviction policy.

    Returns:
      The logits after each sequence's last token of the chunk, the cache, the policy's state, and the
      statuses of `allocate`.

    Raises:
      ValueError: at trace time, for a model that ignores `rows` or returns what `CausalLM` does not allow.
    """
    cache, batch = allocate(tidied(cache), seqs, num_tokens, total_tokens=tokens.shape[0])
    logits, cache, policy = _run(model, cache, batch, tokens, policy)
    return logits, *_evicted(cache, seqs, num_tokens, policy), batch.status


def prefill_checked(
    model: CausalLM,
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    tokens: Int[Array, " tokens"],
    policy: PolicyState | None = None,
) -> tuple[
    Float[Array, "seqs vocab"], KVCache, PolicyState | None, Int[Array, " seqs"], Bool[Array, " layers"]
]:
    """As `prefill`; it also says in which layers of the cache the model wrote nothing."""
    cache, batch = allocate(tidied(cache), seqs, num_tokens, total_tokens=tokens.shape[0])
    logits, cache, policy = _run(model, mark_layers(cache, batch), batch, tokens, policy)
    unwritten = unwritten_layers(cache, batch)
    return logits, *_evicted(cache, seqs, num_tokens, policy), batch.status, unwritten


def _run(model: CausalLM, cache: KVCache, batch: Batch, tokens: Array, policy: PolicyState | None):
    """Logits after each sequence's last token of the chunk."""
    num_seqs = batch.seqs.shape[0]
    rows = jnp.maximum(batch.query_starts[1:] - 1, 0)
    if num_seqs == tokens.shape[0]:
        # One row more than tokens: the logits of a model that ignores rows are then of another shape.
        rows = jnp.concatenate([rows, rows[-1:]])
    logits, cache, policy = run_model(model, tokens, cache, batch, policy, rows)
    return logits[:num_seqs], cache, policy


def _evicted(cache: KVCache, seqs: Array, num_tokens: Array, policy: PolicyState | None):
    if policy is not None:
        cache, policy, _ = policy.policy.evict(cache, policy, jnp.where(num_tokens > 0, seqs, -1))
    return cache, policy


def tidied(cache: KVCache) -> KVCache:
    """Compacted when due, if the config wants that: before the step's batch says where pages lie."""
    return maybe_compact(cache) if cache.config.compact_automatically else cache
