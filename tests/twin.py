"""A cache and its oracle driven side by side: every operation is applied to both and compared.

The cache's operations are compiled once a config, donate the cache, and poison it: pages are NaN
before they are first handed out and again from the moment they are given back, so that a read of
memory that is not a sequence's own cannot go unseen.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig, Status
from tests.caches import SMALL, poison, poisoned_init
from tests.oracle import Oracle

LOOKS = 2  # tokens at the end of each sequence that ask for attention again after every operation
SEEN_THROUGH = {"window": 5, "softcap": 4.0, "scale": 0.7}  # options of the last layer's attention

# How far a result computed in float32 and rounded to the dtype may lie from float64, for values
# of order one.
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def poisoning(operation):
    """The operation, after which every page it gave back holds NaN."""

    @functools.wraps(operation)
    def run(cache, *args):
        live = cache.table.refcounts > 0
        cache, *rest = operation(cache, *args)
        return poison(cache, live & (cache.table.refcounts == 0)), *rest

    return run


def extend(cache, old_batch, seqs, num_tokens, k, v, q):
    """Allocate, then append and attend in every layer, as a model does. k, v, q: [layers, tokens, ..].

    An earlier batch tries to write too, and to attend: once the page table has changed it must do neither.
    """
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=q.shape[1])
    stale = jnp.any(old_batch.fingerprint != cache.table.fingerprint)
    old_batch = replace(old_batch, page_ids=jnp.where(stale, old_batch.page_ids, cache.config.num_pages))
    cache = jaxkv.append(cache, 0, old_batch, k[0], v[0])
    nothing = jnp.isnan(jaxkv.attend(cache, 0, old_batch, q[0])).all() | ~stale

    def one_layer(cache, layer):
        layer, k, v, q = layer
        cache = jaxkv.append(cache, layer, batch, k, v)
        return cache, jaxkv.attend(cache, layer, batch, q, return_lse=True)

    layers = jnp.arange(q.shape[0], dtype=jnp.int32)
    cache, (out, lse) = jax.lax.scan(one_layer, cache, (layers, k, v, q))
    return cache, batch, out, lse, nothing


class View(NamedTuple):
    k: jax.Array
    v: jax.Array
    gathered: jax.Array
    starts: jax.Array
    out: jax.Array
    lse: jax.Array
    narrow: jax.Array
    profile: jaxkv.MemoryProfile


def look(cache, q, sinks) -> View:
    """Everything that can be read: each slot gathered, and its last tokens' attention.

    Of a cache without its policy, whose window limits what a batch sees: the oracle says what is there.
    """
    max_seqs, num_layers = cache.config.max_seqs, cache.config.num_layers
    slots = jnp.arange(max_seqs, dtype=jnp.int32)
    gathered = [jaxkv.gather(cache, layer, slots) for layer in range(num_layers)]
    _, batch = jaxkv.allocate(cache, slots, jnp.zeros_like(slots), total_tokens=q.shape[0])
    counts = jnp.minimum(cache.table.lengths, LOOKS)
    starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    batch = replace(batch, num_tokens=counts, query_starts=starts)
    out, lse = jaxkv.attend(cache, 0, batch, q, return_lse=True)
    narrow = jaxkv.attend(cache, num_layers - 1, batch, q, sink_logits=sinks, **SEEN_THROUGH)
    k, v, lengths = (jnp.stack(parts) for parts in zip(*gathered, strict=True))
    return View(k, v, lengths, starts, out, lse, narrow, jaxkv.memory_profile(cache))


class Programs(NamedTuple):
    extend: ...
    fork: ...
    reorder: ...
    free: ...
    truncate: ...
    compact: ...
    look: ...


@functools.cache
def programs() -> Programs:
    def donated(operation):
        return jax.jit(poisoning(operation), donate_argnums=0)

    return Programs(
        extend=donated(extend),
        fork=donated(jaxkv.fork),
        reorder=donated(jaxkv.reorder),
        free=donated(lambda cache, seqs: (jaxkv.free(cache, seqs),)),
        truncate=donated(lambda cache, seqs, lengths: (jaxkv.truncate(cache, seqs, lengths),)),
        compact=donated(jaxkv.compact),
        look=jax.jit(look),
    )


class Twin:
    """The operations take any number of entries up to `entries`; the rest is padding."""

    def __init__(self, config: CacheConfig = SMALL, *, policy=None, entries=5, total_tokens=40, q_heads=None):
        self.config, self.entries, self.total_tokens = config, entries, total_tokens
        self.q_heads = q_heads or 2 * config.num_kv_heads
        self.cache, self.oracle = poisoned_init(config, policy), Oracle(config)
        self.options = {}  # of every `attend` in `extend`
        nobody = np.full(entries, -1, np.int32)
        _, self.batch = jax.jit(jaxkv.allocate, static_argnames="total_tokens")(
            self.cache, nobody, np.zeros_like(nobody), total_tokens=total_tokens
        )
        self.table_of = {}
        self.random = np.random.default_rng(0)
        self.sinks = self.random.normal(size=self.q_heads).astype(np.float32)

    def extend(self, seqs, num_tokens) -> list[Status]:
        """allocate; append and attend in every layer."""
        count, config = len(seqs), self.config
        seqs, num_tokens = self._padded(seqs), self._padded(num_tokens, fill=0)
        shape = (config.num_layers, self.total_tokens)
        k, v = (self._normal(*shape, config.num_kv_heads, config.head_dim) for _ in "kv")
        q = self._normal(*shape, self.q_heads, config.head_dim)
        stack = self._stack()
        self.cache, self.batch, out, lse, nothing = programs().extend(
            self.cache, self.batch, seqs, num_tokens, k, v, q
        )
        assert nothing, "a stale batch saw something"
        want = self.oracle.allocate(seqs, num_tokens, self.total_tokens)
        self.oracle.append(want, _float64(k), _float64(v))
        batch, out, lse = jax.device_get((self.batch, out, lse))
        self.check()
        self._check_batch(batch, want, stack)
        self._check_attention(out, lse, want, q)
        return want.status[:count]

    def fork(self, parents, children) -> list[Status]:
        return self._of_pairs("fork", parents, children)

    def reorder(self, seqs, parents) -> list[Status]:
        return self._of_pairs("reorder", seqs, parents)

    def _of_pairs(self, name, one, other) -> list[Status]:
        count = len(one)
        one, other = self._padded(one), self._padded(other)
        self.cache, status = getattr(programs(), name)(self.cache, one, other)
        want = getattr(self.oracle, name)(one, other)
        assert [Status(s) for s in status.tolist()] == want
        self.check()
        return want[:count]

    def free(self, seqs):
        seqs = self._padded(seqs)
        (self.cache,) = programs().free(self.cache, seqs)
        self.oracle.free(seqs)
        self.check()

    def truncate(self, seqs, lengths):
        seqs, lengths = self._padded(seqs), self._padded(lengths, fill=0)
        (self.cache,) = programs().truncate(self.cache, seqs, lengths)
        self.oracle.truncate(seqs, lengths)
        self.check()

    def compact(self) -> int:
        self.cache, num_moved = programs().compact(self.cache)
        self.oracle.compact(num_moved)
        self.check()
        self._check_bytes(jaxkv.memory_profile(self.cache))
        table, used = jax.device_get(self.cache.table), self.oracle.num_used
        assert np.all(table.refcounts[:used] > 0), "a hole below a live page"
        assert self._stack() == list(range(used, self.config.num_pages))
        # A policy may have moved a shared page to another column in one of its rows: its first reader counts.
        mentions = [page for slot in range(self.config.max_seqs) for page in self.pages(slot)]
        assert list(dict.fromkeys(mentions)) == list(range(used)), "pages are out of order"
        return int(num_moved)

    def advance_position(self, slot, tokens):
        """What a policy leaves behind that dropped tokens: a position ahead of its length."""
        table = self.cache.table
        table = replace(
            table,
            positions=table.positions.at[slot].add(tokens),
            fingerprint=table.fingerprint + jnp.uint32(1),
        )
        self.cache = replace(self.cache, table=table)
        self.oracle.sequences[slot].position += tokens
        self.check()

    def pages(self, slot) -> list[int]:
        """The ids of a sequence's pages, in token order."""
        count = len(self.oracle.sequences[slot].pages)
        return np.asarray(self.cache.table.pages)[slot, :count].tolist()

    def check(self):
        """Everything the cache says of itself and everything that can be read from it."""
        config, oracle = self.config, self.oracle
        jaxkv.check_invariants(self.cache)
        q = self._normal(LOOKS * config.max_seqs, self.q_heads, config.head_dim)
        # What can be read does not depend on a policy: one program for the caches of all.
        view = programs().look(replace(self.cache, policy=None), q, self.sinks)
        table, stats, view = jax.device_get((self.cache.table, self.cache.stats, view))
        self._check_table(table)
        self._check_stats(stats)
        self._check_profile(view.profile)
        lengths = [sequence.length for sequence in oracle.sequences]
        places = view.k.shape[2]
        assert places == config.max_tokens_per_seq
        for layer in range(config.num_layers):
            np.testing.assert_array_equal(view.gathered[layer], lengths)
            for slot, length in enumerate(lengths):
                for got, want in zip((view.k, view.v), oracle.gather(layer, slot), strict=True):
                    assert np.array_equal(got[layer, slot, :length], want), (layer, slot)
                    assert not got[layer, slot, length:].any(), "not zero past the length"
        self._check_look(view, q)

    # the parts of a comparison -------------------------------------------------------------

    def _check_table(self, table):
        config, sequences = self.config, self.oracle.sequences
        assert table.lengths.tolist() == [s.length for s in sequences]
        assert table.positions.tolist() == [s.position for s in sequences]
        assert table.num_free == self.oracle.num_free
        # What a batch depends on: which pages a sequence has, and where in its text it stands.
        state = table.pages.tobytes(), table.lengths.tobytes(), table.positions.tobytes()
        before = self.table_of.setdefault(table.fingerprint.tobytes(), state)
        assert before == state, "two states of the table have one fingerprint"
        self.id_of = {}
        for slot, sequence in enumerate(sequences):
            ids, beyond = np.split(table.pages[slot], [len(sequence.pages)])
            assert np.all(beyond == config.num_pages)
            for label, page in zip(sequence.pages, ids.tolist(), strict=True):
                assert self.id_of.setdefault(label, page) == page, "a shared page has two ids"
        assert len(set(self.id_of.values())) == len(self.id_of), "two pages have one id"
        refcounts = np.zeros(config.num_pages, np.int32)
        for label, owners in self.oracle.owners().items():
            refcounts[self.id_of[label]] = owners
        np.testing.assert_array_equal(table.refcounts, refcounts)
        free = table.free_pages[: table.num_free].tolist()
        assert sorted(free) == np.flatnonzero(refcounts == 0).tolist()

    def _check_stats(self, stats):
        want = {**self.oracle.stats, "current_pages": self.oracle.num_used}
        for name in stats.names():
            assert getattr(stats, name) == want.get(name, 0), name

    def _check_profile(self, profile):
        want = self.oracle.profile()
        assert {name: getattr(profile, name) for name in want} == want
        used = [self.id_of[label] for label in self.oracle.owners()]
        assert profile.holes == max(used, default=-1) + 1 - len(used)

    def _check_bytes(self, profile):
        """These follow from the counts and the config; working them out takes as long as the rest."""
        assert profile.used_bytes + profile.free_bytes == profile.pool_bytes
        assert profile.total_bytes == sum(x.nbytes for x in jax.tree.leaves(self.cache))

    def _check_batch(self, batch, want, stack):
        config = self.config
        assert [Status(s) for s in batch.status.tolist()] == want.status
        assert batch.query_starts.tolist() == want.query_starts
        assert batch.kv_lengths.tolist() == want.kv_lengths
        for row in range(self.total_tokens):
            if row in want.rows:
                slot, place, position = want.rows[row]
                page = self.oracle.sequences[slot].pages[place // config.page_size]
                assert batch.positions[row] == position
                assert batch.page_ids[row] == self.id_of[page]
                assert batch.offsets[row] == place % config.page_size
            else:
                assert batch.positions[row] == 0
                assert batch.page_ids[row] == config.num_pages
        assert [self.id_of[label] for label in want.handed_out] == stack[: len(want.handed_out)]

    def _check_attention(self, out, lse, want, q):
        """Rows of refused and padding entries are zero; the others see their sequence."""
        expected, expected_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
        for row, (slot, place, _) in want.rows.items():
            for layer in range(self.config.num_layers):
                one = _float64(q[layer, row : row + 1])
                seen = self.oracle.attend(layer, slot, one, place, **self.options)
                expected[layer, row], expected_lse[layer, row] = seen
        self._close(out, expected)
        self._close(lse, expected_lse)

    def _check_look(self, view, q):
        out, lse, narrow = np.zeros(q.shape), np.full(q.shape[:2], -np.inf), np.zeros(q.shape)
        row, last_layer, sinks = 0, self.config.num_layers - 1, _float64(self.sinks)
        for slot, sequence in enumerate(self.oracle.sequences):
            assert view.starts[slot] == row
            count, last = min(sequence.length, LOOKS), sequence.length - 1
            if count:
                rows, row = slice(row, row + count), row + count
                asked = _float64(q[rows])
                out[rows], lse[rows] = self.oracle.attend(0, slot, asked, last)
                narrow[rows], _ = self.oracle.attend(
                    last_layer, slot, asked, last, sink_logits=sinks, **SEEN_THROUGH
                )
        self._close(view.out, out)
        self._close(view.lse, lse)
        self._close(view.narrow, narrow)

    def _close(self, got, want):
        assert not np.isnan(got).any()
        tolerance = TOLERANCE[str(got.dtype)]
        np.testing.assert_allclose(_float64(got), want, rtol=tolerance, atol=tolerance)

    # inputs --------------------------------------------------------------------------------

    def _padded(self, entries, fill=-1):
        return np.array([*entries, *[fill] * (self.entries - len(entries))], np.int32)

    def _normal(self, *shape):
        return self.random.normal(size=shape).astype(jnp.dtype(self.config.dtype))

    def _stack(self) -> list[int]:
        """Free page ids, the next to be handed out first."""
        table = jax.device_get(self.cache.table)
        return table.free_pages[: table.num_free][::-1].tolist()


def _float64(x):
    return np.asarray(x).astype(np.float64)
