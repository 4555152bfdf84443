"""Prefix caching that is wrong on purpose: the oracle or `check_invariants` catches every fault.

Each history is short, and passes with the library as it is.
"""

import inspect
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheCorruptedError, Rope, ownership, pages, prefix_index, prefixes, reclaimable, rewrite
from jaxkv.policies import SlidingWindow, sliding_window
from tests import jitted
from tests.policy_twin import PolicyTwin
from tests.texts import TEXTS

A, B, C, D = [0, 1], [1, 0], [1, 1], [1, 2]  # texts of a page
CONFIG = replace(TEXTS, page_size=2, num_pages=6, max_seqs=3, max_pages_per_seq=4)


class Tables(PolicyTwin):
    """Without K and V: which sequences and texts a page belongs to is what the table and the index say."""

    def __init__(self):
        policy = SlidingWindow(1, 2, rope=Rope.of(2, 10000.0))
        super().__init__(policy, config=CONFIG, entries=2, total_tokens=8)

    def write(self, slot, tokens):
        seqs, counts = self._padded([slot]), self._padded([len(tokens)], fill=0)
        self.cache, batch = jitted.allocate(self.cache, seqs, counts, total_tokens=self.total_tokens)
        self._evict(self.oracle.growing(seqs, counts, self.total_tokens))
        want = self.oracle.allocate(seqs, counts, self.total_tokens)
        self.oracle.note_ids(want, np.resize(tokens, self.total_tokens))
        assert batch.status.tolist() == want.status
        self.check()

    def record(self, slot, salt=0):
        ids = self.oracle.sequences[slot].ids
        self.record_prefix([slot], [ids], [len(ids)], [salt])

    def match(self, slot, tokens, salt=0):
        self.match_prefix([slot], [tokens], [len(tokens)], [salt])

    def check(self):
        jaxkv.check_invariants(self.cache)
        self._check_table(self.cache.table)
        self._check_stats(self.cache.stats)

    def _take_over(self, slot):
        pass


# Histories ------------------------------------------------------------------------------------------


def record_a_text(twin):
    twin.write(0, A)
    twin.record(0)


def ask_for_a_text_of_equal_hash(twin):
    record_a_text(twin)
    twin.match(1, B + A)


def ask_with_another_salt(twin):
    record_a_text(twin)
    twin.match(1, A + A, salt=1)


def ask_for_an_end_behind_another_beginning(twin):
    for slot, text in enumerate((C + D, A)):
        twin.write(slot, text)
        twin.record(slot)
    twin.match(2, A + D + A)


def ask_for_all_that_is_recorded(twin):
    twin.write(0, A + B)
    twin.record(0)
    twin.match(1, A + B)


def reclaim_one_page_of_two(twin):
    twin.write(0, A + B)
    twin.record(0)
    twin.free([0])
    twin.write(1, [0] * 8)
    twin.write(2, [1])
    twin.free([1])
    twin.match(1, A + B + A)


def write_to_the_first_page_of_a_text(twin):
    twin.write(0, A + B)
    twin.record(0)
    twin.truncate([0], [1])
    twin.write(0, [0])


def take_a_text_up_again(twin):
    record_a_text(twin)
    twin.free([0])
    twin.match(1, A + B)


def drop_some_tokens(twin):
    twin.write(0, A + B + C)
    twin.evict([0])
    twin.record(0)


def shift_some_tokens(twin):
    twin.write(0, A + B + C)
    twin.shift([0], [4])
    twin.record(0)


def cut_shifted_tokens(twin):
    twin.write(0, A + B + C)
    twin.shift([0], [4])
    twin.truncate([0], [6])
    twin.write(0, B + C)
    twin.record(0)


HISTORIES = [
    record_a_text,
    ask_for_all_that_is_recorded,
    reclaim_one_page_of_two,
    write_to_the_first_page_of_a_text,
    take_a_text_up_again,
    drop_some_tokens,
    shift_some_tokens,
    cut_shifted_tokens,
]
# Where hashes collide, others must tell texts apart.
WITH_COLLISIONS = [
    ask_for_a_text_of_equal_hash,
    ask_with_another_salt,
    ask_for_an_end_behind_another_beginning,
]


def sums(tokens, salts):
    """A poor hash: the sum of a block's tokens."""
    hashes = jnp.sum(tokens, axis=-1).astype(jnp.uint32)
    return hashes, hashes


# Faults ---------------------------------------------------------------------------------------------


def changed(module, name, old, new):
    """A function with one expression of its source replaced."""

    def apply(monkeypatch):
        source = inspect.getsource(getattr(module, name))
        assert source.count(old) == 1
        made = {}
        exec(source.replace(old, new), vars(module), made)
        monkeypatch.setattr(module, name, made[name])

    return apply


def idle(module, name):
    """A function that returns its first argument."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda first, *_: first)


def stays_in_the_queue(monkeypatch):
    proper = reclaimable.dequeue
    monkeypatch.setattr(reclaimable, "dequeue", lambda index, pages: (index, proper(index, pages)[1]))


WHOLE = "(jnp.maximum(num_tokens, 1) - 1) // size"
FAULTS = {
    # what: (the fault, a history that shows it)
    "the hash is trusted": (
        changed(prefix_index, "look_up", "jnp.all(rows_of(index.tokens, found) == tokens, axis=-1)", "True"),
        ask_for_a_text_of_equal_hash,
    ),
    "the parent is not compared": (
        changed(prefix_index, "look_up", "rows_of(index.parents, found, -1) == above", "True"),
        ask_for_an_end_behind_another_beginning,
    ),
    "the salt is not compared": (
        changed(prefix_index, "look_up", "rows_of(index.salts, found) == salts[:, None]", "True"),
        ask_with_another_salt,
    ),
    "the last token is matched too": (
        changed(prefixes, "_match", WHOLE, "num_tokens // size"),
        ask_for_all_that_is_recorded,
    ),
    "half a page is matched": (
        changed(prefixes, "_match", WHOLE, "(num_tokens + size // 2 - 1) // size"),
        ask_for_all_that_is_recorded,
    ),
    "a matched page stays in the queue": (stays_in_the_queue, take_a_text_up_again),
    "the index is no owner": (idle(prefixes, "hold"), record_a_text),
    "a reclaimed page is still found": (
        changed(ownership, "_reclaim_some", "prefix_index.let_go(index, pages)", "index"),
        reclaim_one_page_of_two,
    ),
    "the beginning is reclaimed before the end": (
        changed(pages, "_shorten", "table.prefixes is not None", "False"),
        reclaim_one_page_of_two,
    ),
    "a node goes and leaves its children": (
        changed(prefix_index, "let_go", "| (rows_of(index.children, node) > num_bare_below)", ""),
        write_to_the_first_page_of_a_text,
    ),
    "a node without page or child stays": (
        changed(prefix_index, "let_go", "goes = bare & ~stays", "goes = bare & stays"),
        reclaim_one_page_of_two,
    ),
    "a page that is written to stays in the index": (
        lambda monkeypatch: monkeypatch.setattr("jaxkv.allocation.forget", lambda table, _: table),
        write_to_the_first_page_of_a_text,
    ),
    "more is recorded than is intact": (
        changed(
            prefixes,
            "_record",
            "jnp.minimum(rows_of(index.intact, slot), rows_of(table.positions, slot))",
            "rows_of(table.positions, slot)",
        ),
        shift_some_tokens,
    ),
    "dropped tokens count as intact": (idle(sliding_window, "limit_intact"), drop_some_tokens),
    "shifted tokens count as intact": (idle(rewrite, "limit_intact"), shift_some_tokens),
    "what comes behind a shift counts as intact": (
        changed(pages, "_truncate", "cut & (positions == new[0])", "cut"),
        cut_shifted_tokens,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_histories_pass_without_a_fault(history):
    history(Tables())


@pytest.mark.slow
def test_they_do_where_hashes_collide(monkeypatch, traced_anew):
    monkeypatch.setattr(prefix_index, "hash_prefixes", sums)
    for history in WITH_COLLISIONS:
        history(Tables())


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault, monkeypatch, traced_anew):
    apply, history = FAULTS[fault]
    if history in WITH_COLLISIONS:
        monkeypatch.setattr(prefix_index, "hash_prefixes", sums)
    apply(monkeypatch)
    with pytest.raises((AssertionError, CacheCorruptedError)):
        history(Tables())
