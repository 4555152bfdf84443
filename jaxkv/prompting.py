"""Runs prompts through the model in chunks, from the host: shared prefixes once, then forks to samples."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.causal_lm import CausalLM
from jaxkv.eviction import evict
from jaxkv.forking import fork
from jaxkv.invariants import raise_for_status
from jaxkv.packing import Stage, chunks, stages
from jaxkv.prefill import prefill_checked
from jaxkv.state import KVCache

# `generate` made the cache or documents that it consumes it, so these may donate it.
_prefill = jax.jit(prefill_checked, donate_argnames="cache", static_argnames="observed")
_fork = jax.jit(fork, donate_argnames="cache")
_evict = jax.jit(evict, donate_argnames="cache")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to run.

    Attributes:
      tokens: token ids by index of the prompt; prompts that are not run have no entry.
      slots: int32 `[all prompts, num_samples]`; a prompt is run in its first slot.
      shared: number of tokens that all begin with, a multiple of the page size.
      prefill_chunk: most tokens per step.
      is_new: whether their slots are empty.
    """

    tokens: Mapping[int, list[int]]
    slots: np.ndarray
    shared: int
    prefill_chunk: int
    is_new: bool

    @property
    def own_slots(self) -> Int[np.ndarray, " prompts"]:
        """The slot of each prompt that is run."""
        return self.slots[list(self.tokens), 0]

    @property
    def num_computed(self) -> int:
        """Number of tokens to run; shared tokens count once."""
        return self.shared + sum(len(prompt) - self.shared for prompt in self.tokens.values())

    def stages(self, cache: KVCache) -> list[Stage]:
        """The stages, in order; without prompts, those of one token. The cache may consist of shapes."""
        rule = None if cache.policy is None else cache.policy.rule
        tokens = list(self.tokens.values()) or [[0]]
        return stages(tokens, self.shared, self.prefill_chunk, cache.config, rule)


def vocabulary(model: CausalLM, cache: KVCache, prompts: Prompts) -> int:
    """Size of the model's vocabulary: the width of its logits, from tracing the first step.

    Nothing is compiled or run. JAX keeps the trace, so the first step is not traced again.

    Raises:
      ValueError: for a model whose results do not match `CausalLM`.
    """
    stage = prompts.stages(cache)[0]
    seqs = jax.ShapeDtypeStruct((len(stage.prompts),), np.int32)
    tokens = jax.ShapeDtypeStruct((stage.size,), np.int32)
    return _prefill.eval_shape(model, cache, seqs, seqs, tokens, observed=stage.observed)[0].shape[1]


def run_prompts(
    model: CausalLM, cache: KVCache, prompts: Prompts, warm_up: bool
) -> tuple[KVCache, Float[Array, "all_prompts vocab"], float]:
    """Prefills the prompts and forks them to their samples.

    The tokens that all share are run once, in the first slot, and forked from there.

    Returns:
      The cache, the logits after each prompt (zeros for one that is not run), and the time in seconds.
    """
    seconds, last_logits, slots = 0.0, {}, prompts.own_slots
    if cache.policy is not None and not cache.policy.rule.once and not prompts.is_new:
        # The last turn may have filled a row to the policy's capacity; a chunk needs room above the budget.
        cache, _ = _evict(cache, jnp.asarray(slots))
    for stage in prompts.stages(cache):
        step = partial(_run_chunk, model, jnp.asarray(slots), observed=stage.observed)
        if warm_up:
            none, padding = jnp.zeros(len(slots), jnp.int32), jnp.zeros(stage.size, jnp.int32)
            logits, cache = step(cache, none, padding)
            jax.block_until_ready(logits)
        for num_tokens, tokens, ends in chunks(stage.prompts, stage.size, stage.most, stage.whole):
            began = time.perf_counter()
            logits, cache = step(cache, num_tokens, tokens)
            seconds += time.perf_counter() - began
            for entry in np.flatnonzero(ends):
                last_logits[entry] = logits[entry]
        if stage.forked and len(slots) > 1:
            parents = np.full(len(slots) - 1, slots[0], np.int32)
            cache = _fork_to(cache, parents, slots[1:])
    if prompts.slots.shape[1] > 1:
        cache = _fork_to_samples(cache, prompts)
    stacked = jnp.stack([last_logits[entry] for entry in range(len(slots))])
    if len(slots) < len(prompts.slots):
        whole = jnp.zeros((len(prompts.slots), stacked.shape[1]), stacked.dtype)
        stacked = whole.at[jnp.asarray(list(prompts.tokens))].set(stacked)
    return cache, stacked, seconds


def _run_chunk(
    model: CausalLM, slots: Array, cache: KVCache, num_tokens: Array, tokens: Array, *, observed: bool
) -> tuple[Array, KVCache]:
    seqs = jnp.where(num_tokens > 0, slots, -1)
    logits, cache, status, unwritten = _prefill(model, cache, seqs, num_tokens, tokens, observed=observed)
    raise_for_status(status)
    layers = np.flatnonzero(np.asarray(unwritten)).tolist()
    if layers:
        count = cache.config.num_layers
        named = f"layers {layers}" if len(layers) > 1 else f"layer {layers[0]}"
        raise ValueError(
            f"{type(model).__name__} appends nothing to {named} of the cache: its config says "
            f"num_layers={count}, but the model writes {count - len(layers)}"
        )
    return logits, cache


def _fork_to_samples(cache: KVCache, prompts: Prompts) -> KVCache:
    parents = np.repeat(prompts.slots[:, 0], prompts.slots.shape[1])
    children = prompts.slots.reshape(-1)
    run = np.repeat(np.isin(np.arange(len(prompts.slots)), list(prompts.tokens)), prompts.slots.shape[1])
    # Each prompt's own slot is among its children; padding leaves it unchanged.
    return _fork_to(cache, parents, np.where((children == parents) | ~run, -1, children))


def _fork_to(cache: KVCache, parents: np.ndarray, children: np.ndarray) -> KVCache:
    cache, status = _fork(cache, jnp.asarray(parents), jnp.asarray(children))
    raise_for_status(status)
    return cache
