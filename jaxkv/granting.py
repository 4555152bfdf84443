"""What each entry of an `allocate` asks for, what it gets, and where its tokens go."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.config import MAX_TOKENS, CacheConfig
from jaxkv.entries import clean_slots, first_fault, page_sizes, pages_for, rows_of, table_rows
from jaxkv.ownership import Taken, num_owners, take
from jaxkv.state import KVCache, PageTable, Status
from pallas_kernels.ragged import ragged_rows


class Request(NamedTuple):
    """What each entry of an `allocate` asks for."""

    slot: Array  # `max_seqs` for padding, and for a slot that is none or named before
    num_tokens: Array  # as asked for
    ends: Array  # running sum of it
    status: Array  # a `Status`, as far as the entries alone tell it


class Needs(NamedTuple):
    """What so many more tokens of each slot take, from the state before the call."""

    row: Array  # of the page table, in each group
    position: Array
    length: Array  # of each row
    too_long: Array  # whether the tokens outgrow the row; it then takes nothing
    tail: Array  # the page that the next token would go to, if it is part full
    part_full: Array
    copies: Array  # whether that page is copied first
    first_column: Array  # of the first page taken
    need: Array  # pages of each row


class Grant(NamedTuple):
    """What each entry of an `allocate` gets; one of padding may stand beside a lone entry.

    Attributes:
      slot: `max_seqs` for padding.
      row: of the page table, in each group.
      status: a `Status`.
      position: before the call.
      length: of each row before the call.
      num_tokens: granted; 0 for a refused entry.
      ends: running sum of the tokens asked for.
      tail: the page that the next token would go to, if it is part full.
      copies: whether that page is copied first.
      leaves: the page that is written to though the index of prefixes holds it, `num_pages` if it does not:
        no other sequence has it.
      taken: pages for all entries.
      start: where in `taken.pages` those of each row begin.
      first_page: the first of a row's, `num_pages` if it got none.
      first_column: column of the row that this goes to.
    """

    slot: Int[Array, " entries"]
    row: Int[Array, "groups entries"]
    status: Int[Array, " entries"]
    position: Int[Array, " entries"]
    length: Int[Array, "groups entries"]
    num_tokens: Int[Array, " entries"]
    ends: Int[Array, " entries"]
    tail: Int[Array, "groups entries"]
    copies: Bool[Array, "groups entries"]
    leaves: Int[Array, "groups entries"]
    taken: Taken
    start: Int[Array, "groups entries"]
    first_page: Int[Array, "groups entries"]
    first_column: Int[Array, "groups entries"]


class Tokens(NamedTuple):
    """Where each row of the token axis goes; the first three as in a `Batch`."""

    page_ids: Int[Array, "groups tokens"]
    offsets: Int[Array, "groups tokens"]
    positions: Int[Array, " tokens"]
    row: Int[Array, "groups tokens"]  # where a new page is entered, by the first token on it; else no row
    column: Int[Array, "groups tokens"]


def read_request(config: CacheConfig, seqs: Array, num_tokens: Array, total: int) -> Request:
    """The entries, cleaned, and what is wrong with them whatever the cache holds."""
    most = MAX_TOKENS if config.layer_windows is None else config.max_chunk
    ends = jnp.cumsum(jnp.clip(num_tokens, 0, total + 1), dtype=jnp.int32)
    slot = clean_slots(seqs, config.max_seqs)
    status = first_fault(
        (seqs < 0, Status.PADDING),
        (slot == config.max_seqs, Status.INVALID_SEQ),
        ((num_tokens < 0) | (ends > total) & (num_tokens > 0) | (num_tokens > most), Status.INVALID_LENGTH),
    )
    return Request(slot, num_tokens, ends, status)


def decide(cache: KVCache, request: Request, total: int) -> tuple[PageTable, Grant]:
    """Counts every need from the state before the call, and says who gets what."""
    config, table = cache.config, cache.table
    slot, num_tokens, ends, status = request
    needs = page_needs(cache, slot, jnp.where(status == Status.OK, num_tokens, 0))
    row, position, length, too_long, tail, part_full, copies, first_column, need = needs
    status = jnp.where(too_long, Status.SEQUENCE_TOO_LONG, status)
    wants = (status == Status.OK) & (num_tokens > 0)
    table, taken = take(
        table, jnp.sum(need, axis=0, dtype=jnp.int32), _most_pages(config, total, slot.shape[0])
    )
    granted = wants & taken.granted
    start = taken.group_starts(need)
    first_page = rows_of(taken.pages, start, config.num_pages)
    grant = Grant(
        slot=slot,
        row=row,
        ends=ends,
        status=jnp.where(taken.granted, status, Status.OUT_OF_PAGES),
        position=position,
        length=length,
        num_tokens=jnp.where(granted, num_tokens, 0),
        tail=tail,
        copies=copies & granted[None],
        leaves=jnp.where(granted[None] & part_full & ~copies, tail, config.num_pages),
        taken=taken,
        start=start,
        first_page=jnp.where(granted[None] & (need > 0), first_page, config.num_pages),
        first_column=first_column,
    )
    return table, grant


def page_needs(cache: KVCache, slot: Array, num_tokens: Array) -> Needs:
    """What so many more tokens of each slot take; each slot once, `max_seqs` for none."""
    config, table = cache.config, cache.table
    row, size = table_rows(slot, config), page_sizes(config)
    position, length = rows_of(table.positions, slot), rows_of(table.lengths, row)
    # With windows only a sequence ends where `gather` does.
    used = length[0] if config.groups[0].window is None else position
    too_long = num_tokens > config.max_tokens_per_seq - used
    wants = (num_tokens > 0) & ~too_long
    tail = rows_of(table.pages, (row, length // size), config.num_pages)
    part_full = length % size > 0
    copies = wants[None] & part_full & (num_owners(table, tail) > 1)
    # A copy takes the column of the page it is made from.
    first_column = pages_for(length, size) - copies.astype(jnp.int32)
    need = jnp.where(wants[None], pages_for(length + num_tokens[None], size) - first_column, 0)
    return Needs(row, position, length, too_long, tail, part_full, copies, first_column, need)


def _most_pages(config: CacheConfig, total: int, entries: int) -> int:
    """Each page taken receives a token, and all but two of a row's a page full of them."""
    return sum(min(total, total // group.page_size + 2 * entries) for group in config.groups)


def place_tokens(config: CacheConfig, grant: Grant, total: int) -> Tokens:
    """A token slot for each token. A new page is entered in the table by the first token on it."""
    entry, offset = ragged_rows(grant.ends, total)
    # What the tokens of an entry share, in one read.
    of_groups = grant.row, grant.length, grant.tail, grant.first_column, grant.start - grant.first_column
    shared = jnp.stack([grant.num_tokens, grant.position, *jnp.concatenate(of_groups)], axis=1)
    num_tokens, position, *rest = rows_of(shared, entry).T
    row, length, tail, first_column, start = jnp.stack(rest).reshape(
        len(of_groups), *grant.row.shape[:1], total
    )
    real, index, size = num_tokens > 0, length + offset[None], page_sizes(config)
    column = index // size
    is_new = column >= first_column
    page = jnp.where(is_new, rows_of(grant.taken.pages, start + column), tail)
    opens = real[None] & is_new & ((index % size == 0) | (offset[None] == 0))
    return Tokens(
        page_ids=jnp.where(real[None], page, config.num_pages),
        offsets=jnp.where(real[None], index % size, 0),
        positions=jnp.where(real, position + offset, 0),
        row=jnp.where(opens, row, config.num_rows),
        column=column,
    )
