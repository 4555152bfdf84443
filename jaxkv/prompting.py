"""Runs prompts through the model in chunks, from the host: shared prefixes once, then forks to samples."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxkv.beginnings import Beginning
from jaxkv.causal_lm import CausalLM
from jaxkv.eviction import evict
from jaxkv.forking import fork
from jaxkv.invariants import raise_for_status
from jaxkv.packing import Stage, chunks, stages
from jaxkv.prefill import prefill_checked
from jaxkv.prefixes import match_prefix, record_prefix
from jaxkv.state import KVCache

_Texts: TypeAlias = Callable[[np.ndarray], tuple[Array, Array]]

# `generate` made the cache or documents that it consumes it, so these may donate it.
_prefill = jax.jit(prefill_checked, donate_argnames="cache", static_argnames="observed")
_fork = jax.jit(fork, donate_argnames="cache")
_evict = jax.jit(evict, donate_argnames="cache")
_match = jax.jit(match_prefix, donate_argnames="cache")
_record = jax.jit(record_prefix, donate_argnames="cache")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts to run.

    Attributes:
      tokens: token ids by index of the prompt; prompts that are not run have no entry.
      slots: int32 `[all prompts, num_samples]`; a prompt is run in its first slot.
      shared: number of tokens that all begin with, a multiple of the page size.
      prefill_chunk: most tokens per step.
      is_new: whether their slots are empty.
      before: tokens that the slot of each holds already, None where they are not known; empty unless the
        cache records prefixes.
      beginnings: what each has in common with earlier ones, where prompts are looked up in the cache.
    """

    tokens: Mapping[int, list[int]]
    slots: np.ndarray
    shared: int
    prefill_chunk: int
    is_new: bool
    before: Mapping[int, list[int] | None] = field(default_factory=dict)
    beginnings: Mapping[int, Beginning] = field(default_factory=dict)

    @property
    def own_slots(self) -> Int[np.ndarray, " prompts"]:
        """The slot of each prompt that is run."""
        return self.slots[list(self.tokens), 0]

    def stages(self, cache: KVCache) -> list[Stage]:
        """The stages, in order; without prompts, those of one token. The cache may consist of shapes."""
        rule = None if cache.policy is None else cache.policy.rule
        tokens = list(self.tokens.values()) or [[0]]
        return stages(tokens, self.shared, self.prefill_chunk, cache.config, rule)

    def rows(self) -> tuple[Int[np.ndarray, "all_prompts width"], Int[np.ndarray, " all_prompts"]]:
        """All tokens of each prompt's slot, padded, and how many; 0 where some are not known."""
        known = {
            number: [*before, *self.tokens[number]]
            for number, before in self.before.items()
            if before is not None
        }
        longest = max(map(len, known.values()), default=1)
        rows = np.zeros((len(self.slots), 1 << (longest - 1).bit_length()), np.int32)
        lengths = np.zeros(len(self.slots), np.int32)
        for number, row in known.items():
            rows[number, : len(row)], lengths[number] = row, len(row)
        return rows, lengths


@dataclass(slots=True)
class Prefilled:
    """What running the prompts gave.

    Attributes:
      cache: the cache.
      logits: float32 `[all prompts, vocab]` after each prompt, zeros for one that is not run.
      num_computed: tokens that were run; shared tokens count once, those found in the cache not at all.
      num_found: tokens found in the cache.
      seconds: the time.
    """

    cache: KVCache
    logits: Float[Array, "all_prompts vocab"]
    num_computed: int
    num_found: int
    seconds: float


def vocabulary(model: CausalLM, cache: KVCache, prompts: Prompts) -> int:
    """Size of the model's vocabulary: the width of its logits, from tracing the first step.

    Nothing is compiled or run. JAX keeps the trace, so the first step is not traced again.

    Raises:
      ValueError: for a model whose results do not match `CausalLM`.
    """
    stage = prompts.stages(cache)[0]
    seqs = jax.ShapeDtypeStruct((len(stage.prompts),), np.int32)
    tokens = jax.ShapeDtypeStruct((stage.size,), np.int32)
    shapes = _prefill.eval_shape(model, cache, seqs, seqs, tokens, texts=None, observed=stage.observed)
    return shapes[0].shape[1]


def run_prompts(model: CausalLM, cache: KVCache, prompts: Prompts, warm_up: bool) -> Prefilled:
    """Prefills the prompts and forks them to their samples.

    The tokens that all share are run once, in the first slot, and forked from there. Where the cache records
    prefixes, each prompt is looked up first, once those that begin like it are done.
    """
    slots = prompts.own_slots
    if cache.policy is not None and not cache.policy.rule.once and not prompts.is_new:
        # The last turn may have filled a row to the policy's capacity; a chunk needs room above the budget.
        cache, _ = _evict(cache, jnp.asarray(slots))
    run = _Run(model, slots, warm_up)
    if prompts.before:
        cache = _run_waves(run, cache, prompts)
    else:
        for stage in prompts.stages(cache):
            cache = run.stage(cache, stage)
            if stage.forked and len(slots) > 1:
                cache = _fork_to(cache, np.full(len(slots) - 1, slots[0], np.int32), slots[1:])
    if prompts.slots.shape[1] > 1:
        cache = _fork_to_samples(cache, prompts)
    stacked = jnp.stack([run.last_logits[entry] for entry in range(len(slots))])
    if len(slots) < len(prompts.slots):
        whole = jnp.zeros((len(prompts.slots), stacked.shape[1]), stacked.dtype)
        stacked = whole.at[jnp.asarray(list(prompts.tokens))].set(stacked)
    return Prefilled(cache, stacked, run.num_computed, run.num_found, run.seconds)


class _Run:
    """Steps of a prefill: their time, and the logits after each prompt."""

    def __init__(self, model: CausalLM, slots: np.ndarray, warm_up: bool):
        self.model, self.slots, self.warm_up = model, slots, warm_up
        self.seconds, self.num_computed, self.num_found = 0.0, 0, 0
        self.last_logits: dict[int, Array] = {}
        self._warm: set[tuple[int, bool]] = set()

    def stage(self, cache: KVCache, stage: Stage, texts: _Texts | None = None) -> KVCache:
        """Runs a stage; `texts` says from the tokens done of each prompt what to record after a chunk."""

        def step(cache: KVCache, num_tokens, tokens, done: np.ndarray) -> tuple[Array, KVCache]:
            to_record = None if texts is None else texts(done)
            slots = jnp.asarray(self.slots)
            return _run_chunk(self.model, slots, cache, num_tokens, tokens, to_record, stage.observed)

        done = np.zeros(len(self.slots), np.int32)
        if self.warm_up and (stage.size, stage.observed) not in self._warm:
            self._warm.add((stage.size, stage.observed))
            none, padding = jnp.zeros(len(self.slots), jnp.int32), jnp.zeros(stage.size, jnp.int32)
            logits, cache = step(cache, none, padding, done)
            jax.block_until_ready(logits)
        for num_tokens, tokens, ends in chunks(stage.prompts, stage.size, stage.most, stage.whole):
            began = time.perf_counter()
            done = done + np.asarray(num_tokens)
            logits, cache = step(cache, num_tokens, tokens, done)
            self.seconds += time.perf_counter() - began
            for entry in np.flatnonzero(ends).tolist():
                self.last_logits[entry] = logits[entry]
        self.num_computed += int(done.sum())
        return cache


def _run_waves(run: _Run, cache: KVCache, prompts: Prompts) -> KVCache:
    """Looks prompts up, runs the rest and records them: first those that begin like no earlier one."""
    config, numbers = cache.config, list(prompts.tokens)
    rows, lengths = (of[numbers] for of in prompts.rows())
    tokens = jnp.asarray(rows)
    waves = np.array([prompts.beginnings[n].wave if n in prompts.beginnings else 0 for n in numbers])
    asks = np.array([prompts.before[n] == [] and n in prompts.beginnings for n in numbers])
    known = np.array([prompts.before[n] is not None for n in numbers])
    if run.warm_up:
        nobody = jnp.full(len(numbers), -1, jnp.int32)
        cache, _ = _match(cache, nobody, tokens, nobody)
        cache = _record(cache, nobody, tokens, nobody)
    # One program for the steps of all waves.
    size = prompts.stages(cache)[0].size
    for wave in range(waves.max() + 1):
        began, runs = time.perf_counter(), waves == wave
        found = np.zeros(len(numbers), np.int32)
        if np.any(runs & asks):
            seqs = jnp.asarray(np.where(runs & asks, run.slots, -1))
            cache, matched = _match(cache, seqs, tokens, jnp.asarray(lengths))
            found = np.asarray(matched)
        run.num_found += int(found.sum())
        parts = [
            prompts.tokens[number][start:] if goes else []
            for number, start, goes in zip(numbers, found.tolist(), runs, strict=True)
        ]
        held = np.array([len(prompts.before[number] or []) for number in numbers]) + found

        def texts(done: np.ndarray, held=held) -> tuple[Array, Array]:
            return tokens, jnp.asarray(np.where(known, held + done, 0), jnp.int32)

        run.seconds += time.perf_counter() - began
        # What a window releases must be recorded before.
        windowed = config.layer_windows is not None
        for stage in stages(parts, 0, prompts.prefill_chunk, config, None):
            cache = run.stage(cache, stage._replace(size=size), texts if windowed else None)
        if not windowed:
            seqs = jnp.asarray(np.where(runs, run.slots, -1))
            cache = _record(cache, seqs, *texts(np.array([len(part) for part in parts], np.int32)))
    return cache


def _run_chunk(
    model: CausalLM, slots: Array, cache: KVCache, num_tokens: Array, tokens: Array, texts, observed: bool
) -> tuple[Array, KVCache]:
    seqs = jnp.where(num_tokens > 0, slots, -1)
    logits, cache, status, unwritten = _prefill(
        model, cache, seqs, num_tokens, tokens, texts=texts, observed=observed
    )
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
