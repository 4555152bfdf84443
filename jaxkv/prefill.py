"""Runs a chunk of prompts through the model, as a pure function for the caller's `jit`."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.allocation import allocate
from jaxkv.causal_lm import CausalLM, mark_layers, run_model, unwritten_layers
from jaxkv.compaction import maybe_compact
from jaxkv.eviction import evict
from jaxkv.prefixes import record_prefix
from jaxkv.state import Batch, KVCache


def prefill(
    model: CausalLM,
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    tokens: Int[Array, " tokens"],
    *,
    texts: tuple[Int[Array, "seqs width"], Int[Array, " seqs"]] | None = None,
    observed: bool = True,
) -> tuple[Float[Array, "seqs vocab"], KVCache, Int[Array, " seqs"]]:
    """Runs one ragged chunk of prompts through the model; then the cache's policy evicts.

    Args:
      model: the model.
      cache: the cache.
      seqs: slots; a negative one is padding.
      num_tokens: tokens of each in this chunk.
      tokens: their ids, one sequence after the other, padded at the end.
      texts: with `prefix_cache`, all tokens of each sequence so far, this chunk's included, padded,
        and how many: `record_prefix` gets them before windows release pages. Default: nothing is recorded.
      observed: static; whether the policy observes the chunk and evicts.

    Returns:
      The logits after each sequence's last token of the chunk, the cache, and the statuses of `allocate`.

    Raises:
      ValueError: at trace time, for a model that ignores `rows` or whose results do not match `CausalLM`.
    """
    cache, batch = allocate(tidied(cache), seqs, num_tokens, total_tokens=tokens.shape[0])
    logits, cache = _run(model, cache, batch, tokens, observed)
    return logits, _evicted(_recorded(cache, batch, texts), batch, observed), batch.status


def prefill_checked(
    model: CausalLM,
    cache: KVCache,
    seqs: Int[Array, " seqs"],
    num_tokens: Int[Array, " seqs"],
    tokens: Int[Array, " tokens"],
    *,
    texts: tuple[Int[Array, "seqs width"], Int[Array, " seqs"]] | None = None,
    observed: bool = True,
) -> tuple[Float[Array, "seqs vocab"], KVCache, Int[Array, " seqs"], Bool[Array, " layers"]]:
    """As `prefill`; also returns in which layers of the cache the model wrote nothing."""
    cache, batch = allocate(tidied(cache), seqs, num_tokens, total_tokens=tokens.shape[0])
    logits, cache = _run(model, mark_layers(cache, batch), batch, tokens, observed)
    unwritten = unwritten_layers(cache, batch)
    cache = _evicted(_recorded(cache, batch, texts), batch, observed)
    return logits, cache, batch.status, unwritten


def _recorded(cache: KVCache, batch: Batch, texts: tuple[Array, Array] | None) -> KVCache:
    return cache if texts is None else record_prefix(cache, jnp.where(batch.ok, batch.seqs, -1), *texts)


def _run(model: CausalLM, cache: KVCache, batch: Batch, tokens: Array, observed: bool):
    """Logits after each sequence's last token of the chunk."""
    num_seqs = batch.seqs.shape[0]
    rows = jnp.maximum(batch.query_starts[1:] - 1, 0)
    if num_seqs == tokens.shape[0]:
        # One row more than tokens, so that the shape of the logits shows whether the model ignored `rows`.
        rows = jnp.concatenate([rows, rows[-1:]])
    logits, cache = run_model(model, tokens, cache, batch, rows, observed=observed)
    return logits[:num_seqs], cache


def _evicted(cache: KVCache, batch: Batch, observed: bool) -> KVCache:
    """Evicts now rather than at the next tokens, so that forks and samples share what is left."""
    return evict(cache, jnp.where(batch.num_tokens > 0, batch.seqs, -1))[0] if observed else cache


def tidied(cache: KVCache) -> KVCache:
    """Compacts when due, if the config allows; call it before `allocate`, whose batch holds page ids."""
    return maybe_compact(cache) if cache.config.compact_automatically else cache
