"""A corrupted cache is recognised, with the page or slot that is wrong; a refusal becomes an error."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import (
    CacheCorruptedError,
    InvalidLengthError,
    InvalidSequenceError,
    JaxKVError,
    OutOfPagesError,
    SequenceTooLongError,
    SlotOccupiedError,
    Status,
)
from tests import jitted
from tests.caches import SMALL, filled, ints


def sound():
    """Slots 0 to 2 hold 6, 4 and 1 tokens in pages [0 1], [2], [3]; slot 3 shares the first page of 0."""
    cache, _ = filled(SMALL, (6, 4, 1))
    cache, _ = jitted.fork(cache, ints(0), ints(3))
    return jitted.truncate(cache, ints(3), ints(4))[0]


def test_a_sound_cache_passes():
    jaxkv.check_invariants(sound())


CORRUPTIONS = {
    # what: (field of the table, index, its new value, what the error must say)
    "a refcount too high": ("refcounts", 2, 2, "page 2.*refcount 2"),
    "a refcount too low": ("refcounts", 0, 1, "page 0.*refcount 1"),
    "a negative refcount": ("refcounts", 5, -1, "page 5.*-1"),
    "a page in two rows, counted once": ("pages", (1, 0), 3, "page [23]"),
    "a page twice in one row": ("pages", (0, 1), 0, "slot 0.*page 0"),
    "a page that does not exist": ("pages", (1, 0), 99, "slot 1.*99"),
    "a negative page": ("pages", (1, 0), -1, "slot 1.*-1"),
    "a hole in a row": ("pages", (0, 0), 8, "slot 0"),
    "a page past the end of a row": ("pages", (2, 1), 5, "slot 2.*5"),
    "a page in an empty past": ("pages", (2, 3), 0, "slot 2"),
    "a length with more pages than the row has": ("lengths", 2, 5, "slot 2"),
    "a length with fewer pages than the row has": ("lengths", 0, 4, "slot 0"),
    "a negative length": ("lengths", 1, -3, "slot 1.*-3"),
    "a length beyond a full row": ("lengths", 1, 17, "slot 1.*17"),
    "a position behind its length": ("positions", 0, 5, "slot 0.*5"),
    "a free page on the stack twice": ("free_pages", 0, 4, "page 4.*2 times|page 7"),
    "a live page on the stack": ("free_pages", 0, 2, "page [27]"),
    "an id on the stack that does not exist": ("free_pages", 0, 8, "8"),
    "a negative id on the stack": ("free_pages", 1, -1, "-1"),
    "a leaked page": ("num_free", ..., 3, "page 4"),
    "a stack that is too tall": ("num_free", ..., 5, "page 3"),
    "a stack taller than the pool": ("num_free", ..., 9, "num_free.*9"),
    "a stack below zero": ("num_free", ..., -1, "num_free.*-1"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_table_is_recognised(corruption):
    field, index, value, message = CORRUPTIONS[corruption]
    cache = sound()
    table = replace(cache.table, **{field: getattr(cache.table, field).at[index].set(value)})
    with pytest.raises(CacheCorruptedError, match=message):
        jaxkv.check_invariants(replace(cache, table=table))


def test_an_empty_slot_with_a_position_is_recognised():
    cache = jaxkv.init(SMALL)
    table = replace(cache.table, positions=cache.table.positions.at[2].set(7))
    with pytest.raises(CacheCorruptedError, match=r"slot 2.*7"):
        jaxkv.check_invariants(replace(cache, table=table))


def test_a_position_ahead_of_its_length_is_sound():
    """A policy that drops tokens leaves it so."""
    cache = sound()
    table = replace(cache.table, positions=cache.table.positions.at[0].set(1000))
    jaxkv.check_invariants(replace(cache, table=table))


@pytest.mark.parametrize(
    ("counter", "value"),
    [("current_pages", 3), ("peak_pages", 3), ("total_allocations", -1), ("pages_moved", -5)],
)
def test_a_counter_that_cannot_be_is_recognised(counter, value):
    cache = sound()
    counters = cache.stats.counters.at[cache.stats.names().index(counter)].set(value)
    with pytest.raises(CacheCorruptedError, match=rf"{counter}.*{value}"):
        jaxkv.check_invariants(replace(cache, stats=replace(cache.stats, counters=counters)))


def test_arrays_of_another_config_are_recognised():
    cache = replace(sound(), config=replace(SMALL, page_size=8))
    with pytest.raises(CacheCorruptedError, match=r"pool\.k"):
        jaxkv.check_invariants(cache)


# From a status to an error ----------------------------------------------------------------------

ERRORS = {
    Status.OUT_OF_PAGES: OutOfPagesError,
    Status.SEQUENCE_TOO_LONG: SequenceTooLongError,
    Status.INVALID_SEQ: InvalidSequenceError,
    Status.OCCUPIED: SlotOccupiedError,
    Status.INVALID_LENGTH: InvalidLengthError,
}


@pytest.mark.parametrize("status", ERRORS)
def test_every_refusal_has_its_error(status):
    with pytest.raises(ERRORS[status], match="entry 2") as caught:
        jaxkv.raise_for_status(ints(Status.OK, Status.PADDING, status, Status.OUT_OF_PAGES))
    assert isinstance(caught.value, JaxKVError)


def test_ok_and_padding_are_no_error():
    jaxkv.raise_for_status(ints(Status.OK, Status.PADDING))
    jaxkv.raise_for_status(np.array([], np.int32))


def test_a_batch_names_entry_slot_and_what_was_asked():
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(1, 3, -1), ints(2, 17, 1), total_tokens=20)
    with pytest.raises(SequenceTooLongError, match=r"entry 1.*slot 3.*17"):
        jaxkv.raise_for_status(batch)


def test_a_good_batch_is_no_error():
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(1, -1), ints(1, 1))
    jaxkv.raise_for_status(batch)


def test_the_errors_of_a_batch_say_what_there_was():
    room = SMALL.max_tokens_per_seq
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(room + 1), total_tokens=room + 1)
    with pytest.raises(SequenceTooLongError, match=rf"which holds {room} tokens"):
        jaxkv.raise_for_status(batch)
    config = replace(SMALL, num_pages=SMALL.max_pages_per_seq)
    _, batch = jitted.allocate(jaxkv.init(config), ints(0, 1), ints(room - 1, 1), total_tokens=room)
    with pytest.raises(OutOfPagesError, match=rf"entry 1 .*: 0 of {config.num_pages} are left"):
        jaxkv.raise_for_status(batch)
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(SMALL.max_seqs), ints(1))
    with pytest.raises(InvalidSequenceError, match=rf"slots are below max_seqs={SMALL.max_seqs}"):
        jaxkv.raise_for_status(batch)
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(2, 0, 2), ints(1, 1, 1))
    with pytest.raises(InvalidSequenceError, match=r"entry 2 \(slot 2.*entry 0 of the call names the same"):
        jaxkv.raise_for_status(batch)


def test_the_errors_of_lengths_say_which_of_the_limits_it_was():
    lengths = jnp.array([[3, 2], [1, -1]])
    _, batches = jax.vmap(lambda n: jaxkv.allocate(jaxkv.init(SMALL), ints(0, 1), n))(lengths)
    with pytest.raises(InvalidLengthError, match=r"have 3 tokens; give allocate\(total_tokens=...\), now 2"):
        jaxkv.raise_for_status(batches)
    alone = jax.tree.map(lambda whole: whole[1], batches)
    with pytest.raises(InvalidLengthError, match=r"entry 1 .*: num_tokens is negative"):
        jaxkv.raise_for_status(alone)
    windowed = replace(SMALL, layer_windows=(4,) * SMALL.num_layers, max_chunk=3)
    _, batch = jitted.allocate(jaxkv.init(windowed), ints(0), ints(4), total_tokens=4)
    with pytest.raises(InvalidLengthError, match="at most max_chunk=3 tokens of each"):
        jaxkv.raise_for_status(batch)


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_cache_and_no_batch_is_named():
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    k = jnp.ones((1, SMALL.num_kv_heads, SMALL.head_dim))
    pair = r"must be a jaxkv.KVCache, not a tuple: it is the first of what allocate returns"
    for call in (
        lambda: jaxkv.append((cache, batch), 0, batch, k, k),
        lambda: jaxkv.attend((cache, batch), 0, batch, k),
        lambda: jaxkv.free((cache, batch), ints(0)),
        lambda: jaxkv.allocate((cache, batch), ints(0), ints(1)),
        lambda: jaxkv.compact((cache, batch)),
        lambda: jaxkv.memory_profile((cache, batch)),
        lambda: jaxkv.check_invariants((cache, batch)),
    ):
        with pytest.raises(ValueError, match=pair):
            call()
    with pytest.raises(ValueError, match="that allocate returned, not a KVCache"):
        jaxkv.append(cache, 0, cache, k, k)
    with pytest.raises(ValueError, match="layer must be an integer scalar, not a Batch"):
        jaxkv.append(cache, batch, 0, k, k)
    with pytest.raises(ValueError, match="not a tuple: give it one result"):
        jaxkv.raise_for_status((cache, batch))
    with pytest.raises(ValueError, match=r"one slot is jnp.array\(\[0\]\)"):
        jaxkv.allocate(cache, 0, 1)


def test_a_batch_of_another_cache_is_refused():
    _, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    other = jaxkv.init(replace(SMALL, num_pages=SMALL.num_pages + 1))
    k = jnp.ones((1, SMALL.num_kv_heads, SMALL.head_dim))
    with pytest.raises(ValueError, match=r"another cache.*num_pages"):
        jaxkv.append(other, 0, batch, k, k)
    with pytest.raises(ValueError, match="another cache"):
        jaxkv.attend(other, 0, batch, k)


def test_a_forks_status_is_taken_too():
    _, status = jitted.fork(sound(), ints(0, 0), ints(-1, 1))
    with pytest.raises(SlotOccupiedError, match="entry 1"):
        jaxkv.raise_for_status(status)


def test_statuses_stacked_by_a_scan_name_step_and_entry():
    stacked = np.full((3, 2), Status.OK)
    jaxkv.raise_for_status(stacked)
    stacked[2, 1], stacked[2, 0] = Status.OUT_OF_PAGES, Status.PADDING
    with pytest.raises(OutOfPagesError, match=r"entry \(2, 1\): the pool has too few"):
        jaxkv.raise_for_status(stacked)


def test_a_stacked_batch_names_slot_and_free_pages_of_the_step_that_failed():
    def step(cache, seqs):
        return jaxkv.allocate(cache, seqs, ints(16, 16), total_tokens=32)

    _, batches = jax.jit(lambda cache, seqs: jax.lax.scan(step, cache, seqs))(
        jaxkv.init(SMALL), jnp.stack([ints(-1, 3), ints(1, 2)])
    )
    message = r"entry \(1, 1\) \(slot 2, 16 more tokens\).*: 0 of 8 are left, of 4 tokens each"
    with pytest.raises(OutOfPagesError, match=message):
        jaxkv.raise_for_status(batches)
    assert batches.ok.tolist() == [[False, True], [True, False]]
    assert batches.last_rows.tolist() == [[15, 31], [15, 31]]


def test_within_jit_raise_for_status_says_where_it_belongs():
    with pytest.raises(ValueError, match="return the status from jit"):
        jax.jit(jaxkv.raise_for_status)(jnp.zeros(2, jnp.int32))
