"""Draws the next tokens of a step: every one that may follow, accepted as far as proposals were right."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.decode import Finish
from jaxkv.entries import DROP, rows_of
from jaxkv.sampling import SamplingBatch, sample_each
from jaxkv.selection import likeliest
from jaxkv.serving.config import ServingConfig
from jaxkv.serving.plan import Plan, Slots
from jaxkv.serving.state import ALL_TOKENS, RequestTable
from pallas_kernels.control_flow import cond

LogitsFn: TypeAlias = Callable[[Array, Array, Array, Array], Array]


class Drawn(NamedTuple):
    """What a step chose.

    Attributes:
      tokens: of each slot; the last ones beyond `counts` are rejected.
      log_probs: of these; None if they are not kept.
      counts: new tokens of each slot.
      finish: a `Finish`.
    """

    tokens: Int[Array, "slots new"]
    log_probs: Float[Array, "slots new"] | None
    counts: Int[Array, " slots"]
    finish: Int[Array, " slots"]


def draw(
    logits: Array,
    table: RequestTable,
    slots: Slots,
    plan: Plan,
    draws: Bool[Array, " slots"],
    config: ServingConfig,
    logits_fn: LogitsFn | None,
) -> Drawn:
    """Draws every token that may follow, and accepts them as long as the proposed ones are what was drawn."""
    count, most = draws.shape[0], 1 + plan.proposed.shape[1]
    logits = logits.astype(jnp.float32)
    nth = jnp.arange(most, dtype=jnp.int32)[None]
    offered = draws[:, None] & (nth <= plan.num_proposed[:, None])
    if logits_fn is not None:
        logits = _changed(logits_fn, logits, table, slots, plan, offered)
    number = slots.lengths - rows_of(table.prompt_lengths, slots.row)
    tokens = _sampled(logits, table, slots.row, number[:, None] + nth).reshape(count, most)
    right = jnp.pad(plan.proposed == tokens[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    accepted = offered & (jnp.cumsum(~right, axis=1, dtype=jnp.int32) == 0)
    stops = jnp.any(tokens[..., None] == rows_of(table.stop_tokens, slots.row, -1)[:, None], axis=2)
    # A stop token is the last.
    accepted &= jnp.cumsum(stops, axis=1, dtype=jnp.int32) == stops.astype(jnp.int32)
    room = rows_of(table.limits, slots.row) - slots.lengths
    counts = jnp.minimum(jnp.sum(accepted, axis=1, dtype=jnp.int32), room)
    stopped = jnp.any(stops & accepted & (nth < counts[:, None]), axis=1)
    full = draws & (counts == room)
    if config.policy is None:
        # The newest token is not in the cache.
        full |= draws & (slots.lengths + counts > config.cache.max_tokens_per_seq)
    finish = jnp.where(stopped, Finish.STOP, jnp.where(full, Finish.LENGTH, Finish.RUNNING))
    log_probs = None
    if config.log_probs:
        each = jnp.take_along_axis(logits, tokens.reshape(-1, 1), axis=1)[:, 0]
        log_probs = (each - jax.nn.logsumexp(logits, axis=1)).reshape(count, most)
    return Drawn(tokens, log_probs, counts, finish.astype(jnp.int32))


def _changed(logits_fn: LogitsFn, logits: Array, table: RequestTable, slots: Slots, plan: Plan, offered):
    """Logits after the user's function, whose texts end with the proposals before each token."""
    count, most = offered.shape
    texts = rows_of(table.tokens, slots.row)
    slot = jnp.arange(count, dtype=jnp.int32)[:, None]
    column = slots.lengths[:, None] + jnp.arange(most - 1, dtype=jnp.int32)[None]
    texts = texts.at[slot, column].set(plan.proposed, **DROP)
    lengths = jnp.where(offered, slots.lengths[:, None] + jnp.arange(most, dtype=jnp.int32)[None], 0)
    changed = logits_fn(
        logits,
        jnp.repeat(texts, most, axis=0),
        lengths.reshape(-1),
        jnp.repeat(rows_of(table.ids, slots.row), most),
    )
    if changed.shape != logits.shape:
        raise ValueError(f"logits_fn must return logits {list(logits.shape)}, not {list(changed.shape)}")
    return changed.astype(jnp.float32)


def _sampled(
    logits: Float[Array, "draws vocab"],
    table: RequestTable,
    row: Int[Array, " slots"],
    number: Int[Array, "slots new"],
) -> Int[Array, " draws"]:
    """A token for each row of logits; neither a sort of the vocabulary nor a draw where no request asks."""
    most = number.shape[1]

    def each(values: Array, fill: int = 0) -> Array:
        return jnp.repeat(rows_of(values, row, fill), most)

    temperature, top_k, top_p = each(table.temperature), each(table.top_k, ALL_TOKENS), each(table.top_p, 1)
    settings = SamplingBatch(temperature, top_k, top_p, each(table.min_p), sorts=False)

    def drawn(sorts: bool) -> Array:
        keys = jax.vmap(_key)(each(table.seeds), each(table.samples), number.reshape(-1))
        return sample_each(keys, logits, replace(settings, sorts=sorts))

    def unsorted() -> Array:
        return cond(jnp.any(temperature > 0), partial(drawn, False), lambda: likeliest(logits))

    # A greedy request has neither.
    sorts = jnp.any((top_k < ALL_TOKENS) | (top_p < 1))
    return cond(sorts, partial(drawn, True), unsorted)


def _key(seed: Array, sample: Array, number: Array) -> Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), number)
