"""What goes into a server and comes out of it: submit, cancel, take."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.arguments import integer
from jaxkv.decode import Finish
from jaxkv.entries import DROP, check_vectors, first_fault, rows_of
from jaxkv.pages import free
from jaxkv.serving.config import ServingConfig
from jaxkv.serving.demand import fits_alone
from jaxkv.serving.requests import Requests
from jaxkv.serving.state import Phase, RequestTable, ServingState
from jaxkv.state import Status
from pallas_kernels.control_flow import fori_loop, only_if
from pallas_kernels.ragged import ragged_rows


def submit(state: ServingState, requests: Requests) -> tuple[ServingState, Int[Array, " entries"]]:
    """Puts requests in the queue, in order; each of its samples takes a row of the request table.

    Args:
      state: the server.
      requests: as arrays; see `Requests.of`.

    Returns:
      The server, and a `Status` for each entry: TABLE_FULL from the first entry on whose samples find too few
      empty rows; SEQUENCE_TOO_LONG for a prompt that leaves no room for a token in `max_tokens` or in a row
      of the page table, or is longer than its row of `tokens`; OUT_OF_PAGES for a request that not even an
      empty cache can hold with one token of each sample; INVALID_LENGTH for an empty prompt, fewer than one
      new token, or more samples than slots; PADDING for an entry of no samples. What is refused leaves
      nothing behind.

    Raises:
      ValueError: at trace time, for arrays that do not fit the server.
    """
    config, table = state.config, state.requests
    _check(requests, config)
    status = _faults(requests, config)
    wanted = jnp.where(status == Status.OK, requests.num_samples, 0)
    empty = table.phase == Phase.EMPTY
    ends = jnp.cumsum(wanted, dtype=jnp.int32)
    fits = ends <= jnp.sum(empty, dtype=jnp.int32)
    status = jnp.where((status == Status.OK) & ~fits, Status.TABLE_FULL, status)
    ends = jnp.cumsum(jnp.where(status == Status.OK, wanted, 0), dtype=jnp.int32)
    row = jnp.argsort(~empty, stable=True).astype(jnp.int32)
    entry, sample = ragged_rows(ends, row.shape[0])
    row = jnp.where(entry < wanted.shape[0], row, row.shape[0])
    return replace(state, requests=_enter(table, requests, row, entry, sample, ends[-1], config)), status


def _enter(
    table: RequestTable, requests: Requests, row, entry, sample, count, config: ServingConfig
) -> RequestTable:
    live = (table.phase == Phase.WAITING) | (table.phase == Phase.RUNNING)
    # Counted from the oldest that is left, so that numbers stay small.
    oldest = jnp.min(jnp.where(live, table.arrivals, jnp.iinfo(jnp.int32).max))
    arrivals = jnp.where(live, table.arrivals - oldest, 0)
    last = jnp.max(jnp.where(live, arrivals, -1))
    width = requests.tokens.shape[1]

    def write_prompt(nth: Array, tokens: Array) -> Array:
        text = jnp.pad(rows_of(requests.tokens, entry[nth]), (0, tokens.shape[1] - width))
        return tokens.at[row[nth]].set(text, **DROP)

    def put(into: Array, values: Array) -> Array:
        return into.at[row].set(values.astype(into.dtype), **DROP)

    of = jax.tree.map(lambda values: rows_of(values, entry), replace(requests, tokens=requests.lengths))
    fresh = jnp.zeros_like(row)
    return replace(
        table,
        phase=put(table.phase, fresh + Phase.WAITING),
        finish=put(table.finish, fresh + Finish.RUNNING),
        slots=put(table.slots, fresh + config.cache.max_seqs),
        ids=put(table.ids, of.ids),
        samples=put(table.samples, sample),
        arrivals=put(arrivals, last + 1 + entry),
        priorities=put(table.priorities, of.priorities),
        tokens=fori_loop(0, count, write_prompt, table.tokens),
        prompt_lengths=put(table.prompt_lengths, of.lengths),
        lengths=put(table.lengths, of.lengths),
        # The sum might overflow.
        limits=put(table.limits, of.lengths + jnp.minimum(of.max_new_tokens, config.max_tokens - of.lengths)),
        taken=put(table.taken, of.lengths),
        temperature=put(table.temperature, of.temperature),
        top_k=put(table.top_k, of.top_k),
        top_p=put(table.top_p, of.top_p),
        min_p=put(table.min_p, of.min_p),
        seeds=put(table.seeds, of.seeds),
        stop_tokens=put(table.stop_tokens, of.stop_tokens),
        salts=put(table.salts, of.salts),
    )


def _faults(requests: Requests, config: ServingConfig) -> Int[Array, " entries"]:
    """What is wrong with each request, whatever the server holds."""
    lengths, samples, cache = requests.lengths, requests.num_samples, config.cache
    most = min(config.max_tokens - 1, requests.tokens.shape[1])
    if config.policy is None:
        most = min(most, cache.max_tokens_per_seq)
    most_samples = min(cache.max_seqs, config.max_requests)
    wrong = (lengths < 1) | (requests.max_new_tokens < 1) | (samples < 0) | (samples > most_samples)
    return first_fault(
        (samples == 0, Status.PADDING),
        (wrong, Status.INVALID_LENGTH),
        (lengths > most, Status.SEQUENCE_TOO_LONG),
        (~fits_alone(lengths, samples, config), Status.OUT_OF_PAGES),
    )


def _check(requests: Requests, config: ServingConfig) -> None:
    if not isinstance(requests, Requests):
        raise ValueError(f"submit takes jaxkv.serving.Requests, not {type(requests).__name__}")
    if requests.tokens.ndim != 2 or requests.tokens.shape[1] > config.max_tokens:
        raise ValueError(
            f"tokens must be int32 [entries, up to max_tokens={config.max_tokens}], not "
            f"{requests.tokens.dtype}{list(requests.tokens.shape)}"
        )
    if requests.stop_tokens.shape[1:] != (config.max_stop_tokens,):
        raise ValueError(
            f"stop_tokens must be int32 [entries, max_stop_tokens={config.max_stop_tokens}], not "
            f"{requests.stop_tokens.dtype}{list(requests.stop_tokens.shape)}"
        )


def cancel(
    state: ServingState, ids: Int[Array, " ids"], *, samples: Int[Array, " ids"] | None = None
) -> ServingState:
    """Ends requests; what they have generated can still be taken.

    Args:
      state: the server.
      ids: of requests; one that no request has, such as -1, does nothing.
      samples: of each the sample to end. Default: all.

    Raises:
      ValueError: for a wrong shape or dtype, at trace time.
    """
    table = state.requests
    live = (table.phase == Phase.WAITING) | (table.phase == Phase.RUNNING)
    if samples is None:
        (ids,) = check_vectors(ids=ids)
        return finish_rows(state, live & jnp.isin(table.ids, ids), Finish.CANCELLED)
    ids, samples = check_vectors(ids=ids, samples=samples)
    named = (table.ids[:, None] == ids[None]) & (table.samples[:, None] == samples[None])
    ends = live & jnp.any(named, axis=1)
    slots = _slots_left(table, ends, state.config.cache.max_seqs)
    return finish_rows(replace(state, requests=replace(table, slots=slots)), ends, Finish.CANCELLED)


def _slots_left(table: RequestTable, ends: Array, none: int) -> Int[Array, " rows"]:
    """Slots of rows once some end: the first of those that wait for its prompt takes the slot of one."""
    rows = table.phase.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    waits = (table.phase == Phase.RUNNING) & (table.leaders != table.slots) & ~ends
    heirs = jnp.full(none, rows, jnp.int32)
    heirs = heirs.at[jnp.where(waits, table.leaders, none)].min(row, **DROP)
    heir = jnp.where(ends, rows_of(heirs, table.slots, rows), rows)
    slots = table.slots.at[heir].set(table.slots, **DROP)
    return jnp.where(heir < rows, none, slots)


def finish_rows(state: ServingState, ends: Array, finish: Array | Finish) -> ServingState:
    """Ends samples and releases their pages; nothing is recorded."""
    table, none = state.requests, state.config.cache.max_seqs
    slots = jnp.where(ends, table.slots, none)
    cache = only_if(jnp.any(slots < none), lambda cache: free(cache, slots), state.cache)
    table = replace(
        table,
        phase=jnp.where(ends, Phase.FINISHED, table.phase).astype(jnp.int32),
        finish=jnp.where(ends, finish, table.finish).astype(jnp.int32),
        slots=jnp.where(ends, none, table.slots),
    )
    stats = state.stats.plus(finished=jnp.sum(ends, dtype=jnp.int32))
    return replace(state, cache=cache, requests=table, stats=stats)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Events:
    """What happened since the last `take`, a row for each row of the request table.

    Attributes:
      ids, samples: whose tokens these are.
      tokens: new ones, padded at the end.
      counts: how many; 0 where nothing is new.
      finish: a `Finish`, once the last token is among them; until then RUNNING.
      log_probs: of the tokens, with `ServingConfig.log_probs`.
    """

    ids: Int[Array, " rows"]
    samples: Int[Array, " rows"]
    tokens: Int[Array, "rows width"]
    counts: Int[Array, " rows"]
    finish: Int[Array, " rows"]
    log_probs: Float[Array, "rows width"] | None = None


def take(state: ServingState, *, width: int | None = None) -> tuple[ServingState, Events]:
    """New tokens and finished requests since the last call; a finished row is then empty.

    Args:
      state: the server.
      width: most tokens of each sample to take; further ones stay for the next call. Default: all.

    Returns:
      The server and the events.

    Raises:
      ValueError: for a width that is no positive integer.
    """
    table, config = state.requests, state.config
    width = config.max_tokens if width is None else min(integer("width", width), config.max_tokens)
    used = table.phase != Phase.EMPTY
    counts = jnp.where(used, jnp.minimum(table.lengths - table.taken, width), 0)
    row = jnp.arange(table.phase.shape[0], dtype=jnp.int32)[:, None]
    column = jnp.arange(width, dtype=jnp.int32)[None]
    at = row, jnp.where(column < counts[:, None], table.taken[:, None] + column, config.max_tokens)
    taken = table.taken + counts
    leaves = (table.phase == Phase.FINISHED) & (taken == table.lengths)
    events = Events(
        ids=jnp.copy(table.ids),
        samples=jnp.copy(table.samples),
        tokens=rows_of(table.tokens, at),
        counts=counts,
        finish=jnp.where(leaves, table.finish, Finish.RUNNING),
        log_probs=None if table.log_probs is None else rows_of(table.log_probs, at),
    )
    table = replace(table, taken=taken, phase=jnp.where(leaves, Phase.EMPTY, table.phase).astype(jnp.int32))
    return replace(state, requests=table), events
