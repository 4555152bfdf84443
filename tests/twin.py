"""A cache and its oracle driven side by side: every operation is applied to both and compared.

The cache's operations are compiled once a config, donate the cache, and poison it: pages are NaN
before they are first handed out and again from the moment they are given back, so that a read of
memory that is not a sequence's own cannot go unseen.
"""

import functools
from dataclasses import replace
from math import lcm
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig, Status
from jaxkv.intact import NEVER_TOUCHED, limit_intact
from jaxkv.testing import poison_pages
from tests.caches import SMALL, poisoned_init
from tests.oracle import Oracle

LOOKS = 2  # tokens at the end of each sequence that ask for attention again after every operation
SEEN_THROUGH = {"window": 5, "softcap": 4.0, "scale": 0.7}  # options of the last layer's attention

# How far a result computed in float32 and rounded to the dtype may lie from float64, for values
# of order one.
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-9, "bfloat16": 2.0**-6}


def poisoning(operation):
    """The operation, after which every page it gave back holds NaN."""

    @functools.wraps(operation)
    def run(cache, *args, **options):
        live = cache.table.refcounts > 0
        cache, *rest = operation(cache, *args, **options)
        return poison_pages(cache, live & (cache.table.refcounts == 0)), *rest

    return run


def extend(cache, old_batch, seqs, num_tokens, k, v, q):
    """Allocate, then append and attend in every layer, as a model does. k, v, q: [tokens, ..] of each layer.

    An earlier batch tries to write too, and to attend: once the page table has changed it must do neither.
    """
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=q[0].shape[0])
    stale = jnp.any(old_batch.fingerprint != cache.table.fingerprint)
    old_batch = replace(old_batch, page_ids=jnp.where(stale, old_batch.page_ids, cache.config.num_pages))
    cache = jaxkv.append(cache, 0, old_batch, k[0], v[0])
    nothing = jnp.isnan(jaxkv.attend(cache, 0, old_batch, q[0])).all() | ~stale
    if len(cache.config.groups) > 1:
        results = []
        for layer in range(len(q)):
            cache = jaxkv.append(cache, layer, batch, k[layer], v[layer])
            results.append(jaxkv.attend(cache, layer, batch, q[layer], return_lse=True))
        out, lse = zip(*results, strict=True)
        return cache, batch, out, lse, nothing

    def one_layer(cache, layer):
        layer, k, v, q = layer
        cache = jaxkv.append(cache, layer, batch, k, v)
        return cache, jaxkv.attend(cache, layer, batch, q, return_lse=True)

    layers = jnp.arange(len(q), dtype=jnp.int32)
    cache, (out, lse) = jax.lax.scan(one_layer, cache, (layers, *map(jnp.stack, (k, v, q))))
    return cache, batch, out, lse, nothing


class View(NamedTuple):
    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    lengths: tuple[jax.Array, ...]
    starts: jax.Array
    counts: jax.Array
    attended: list[tuple[jax.Array, jax.Array]]
    narrow: jax.Array
    profile: jaxkv.MemoryProfile


def look(cache, q, sinks) -> View:
    """Everything that can be read: each slot gathered, and its last tokens' attention in each group.

    Of a cache without its policy, whose window limits what a batch sees: the oracle says what is there.
    """
    config = cache.config
    slots = jnp.arange(config.max_seqs, dtype=jnp.int32)
    gathered = [jaxkv.gather(cache, layer, slots) for layer in range(config.num_layers)]
    _, batch = jaxkv.allocate(cache, slots, jnp.zeros_like(slots), total_tokens=q[0].shape[0])
    # As few as the shortest row has: a group's row may be empty just before its next token.
    counts = jnp.minimum(jnp.min(cache.table.lengths.reshape(-1, config.max_seqs), axis=0), LOOKS)
    starts = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    batch = replace(batch, num_tokens=counts, query_starts=starts)
    attended = [
        jaxkv.attend(cache, layer, batch, q[layer], window=still_seen(config, layer), return_lse=True)
        for layer in looked_at(config)
    ]
    last = config.num_layers - 1
    narrow = jaxkv.attend(cache, last, batch, q[last], sink_logits=sinks, **seen_through(config, last))
    k, v, lengths = zip(*gathered, strict=True)
    return View(k, v, lengths, starts, counts, attended, narrow, jaxkv.memory_profile(cache))


def looked_at(config) -> list[int]:
    """A layer of each group, the first."""
    return [group.layers[0] for group in config.groups]


def still_seen(config, layer) -> int | None:
    """The window through which the last tokens can be looked at again: the next token's is what is kept."""
    window = config.groups[config.homes[layer].group].window
    return None if window is None else max(1, window - LOOKS)


def seen_through(config, layer) -> dict:
    window = still_seen(config, layer)
    return SEEN_THROUGH if window is None else SEEN_THROUGH | {"window": min(SEEN_THROUGH["window"], window)}


class Programs(NamedTuple):
    extend: ...
    fork: ...
    reorder: ...
    free: ...
    truncate: ...
    compact: ...
    match_prefix: ...
    record_prefix: ...
    clear_prefixes: ...
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
        truncate=donated(jaxkv.truncate),
        compact=donated(jaxkv.compact),
        match_prefix=donated(lambda cache, *of, salt: jaxkv.match_prefix(cache, *of, salt=salt)),
        record_prefix=donated(lambda cache, *of, salt: (jaxkv.record_prefix(cache, *of, salt=salt),)),
        clear_prefixes=donated(lambda cache: (jaxkv.clear_prefixes(cache),)),
        look=jax.jit(look),
    )


class Twin:
    """The operations take any number of entries up to `entries`; the rest is padding."""

    def __init__(self, config: CacheConfig = SMALL, *, policy=None, entries=5, total_tokens=40, q_heads=None):
        self.config, self.entries, self.total_tokens = config, entries, total_tokens
        self.q_heads = q_heads or 2 * lcm(*(group.num_kv_heads for group in config.groups))
        self.cache, self.oracle = poisoned_init(config, policy), Oracle(config)
        self.options = {}  # of every `attend` in `extend`
        nobody = np.full(entries, -1, np.int32)
        _, self.batch = jax.jit(jaxkv.allocate, static_argnames="total_tokens")(
            self.cache, nobody, np.zeros_like(nobody), total_tokens=total_tokens
        )
        self.table_of = {}
        self.random = np.random.default_rng(0)
        self.sinks = self.random.normal(size=self.q_heads).astype(np.float32)

    def extend(self, seqs, num_tokens, ids=None) -> list[Status]:
        """allocate; append and attend in every layer. `ids`: of the tokens."""
        count = len(seqs)
        seqs, num_tokens = self._padded(seqs), self._padded(num_tokens, fill=0)
        k, v = (self._of_layers(self.total_tokens) for _ in "kv")
        q = self._of_layers(self.total_tokens, self.q_heads)
        stack = self._stack()
        self.cache, self.batch, out, lse, nothing = programs().extend(
            self.cache, self.batch, seqs, num_tokens, k, v, q
        )
        assert nothing, "a stale batch saw something"
        reclaimed = self.oracle.num_reclaimed
        want = self.oracle.allocate(seqs, num_tokens, self.total_tokens)
        self.oracle.note_ids(want, self.random.integers(0, 2, self.total_tokens) if ids is None else ids)
        for layer, pair in enumerate(zip(k, v, strict=True)):
            self.oracle.append(want, layer, *map(_float64, pair))
        batch, out, lse = jax.device_get((self.batch, out, lse))
        self.check()
        self._check_batch(batch, want)
        if self.oracle.num_reclaimed == reclaimed:
            self._check_order(want, stack)
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

    def truncate(self, seqs, lengths) -> list[Status]:
        return self._of_pairs("truncate", seqs, lengths)

    def match_prefix(self, seqs, tokens, num_tokens, salts) -> list[int]:
        """`tokens`: a list of token ids for each entry."""
        count, (seqs, num_tokens, salts) = len(seqs), self._prompts(seqs, num_tokens, salts)
        tokens = self._token_rows(tokens)
        self.cache, got = programs().match_prefix(self.cache, seqs, tokens, num_tokens, salt=salts)
        want = self.oracle.match_prefix(seqs, tokens, num_tokens, salts)
        assert got.tolist() == want
        self.check()
        return want[:count]

    def record_prefix(self, seqs, tokens, num_tokens, salts):
        seqs, num_tokens, salts = self._prompts(seqs, num_tokens, salts)
        tokens = self._token_rows(tokens)
        (self.cache,) = programs().record_prefix(self.cache, seqs, tokens, num_tokens, salt=salts)
        self.oracle.record_prefix(seqs, tokens, num_tokens, salts)
        self.check()

    def _prompts(self, seqs, num_tokens, salts):
        return self._padded(seqs), self._padded(num_tokens, fill=0), self._padded(salts, fill=0)

    def _token_rows(self, rows):
        """Some more than a sequence can have."""
        tokens = np.full((self.entries, self.config.max_tokens_per_seq + 3), -1, np.int32)
        for number, row in enumerate(rows):
            tokens[number, : len(row)] = row[: tokens.shape[1]]
        return tokens

    def clear_prefixes(self):
        (self.cache,) = programs().clear_prefixes(self.cache)
        self.oracle.clear_prefixes()
        self.check()

    def compact(self) -> int:
        self.cache, num_moved = programs().compact(self.cache)
        self.oracle.compact(num_moved)
        self.check()
        self._check_bytes(jaxkv.memory_profile(self.cache))
        table, used = jax.device_get(self.cache.table), self.oracle.num_used
        live = used + self.oracle.num_reclaimable
        assert np.all(table.refcounts[:live] > 0), "a hole below a live page"
        assert self._stack() == list(range(live, self.config.num_pages))
        # A policy may have moved a shared page to another column in one of its rows: its first reader counts.
        mentions = [
            page
            for group in range(len(self.config.groups))
            for slot in range(self.config.max_seqs)
            for page in self.pages(slot, group)
        ]
        assert list(dict.fromkeys(mentions)) == list(range(used)), "pages are out of order"
        return int(num_moved)

    def advance_position(self, slot, tokens):
        """What a policy leaves behind that dropped tokens: a position ahead of its length."""
        table = self.cache.table
        table = replace(
            table,
            positions=table.positions.at[slot].add(tokens),
            fingerprint=table.fingerprint + jnp.uint32(1),
            prefixes=limit_intact(table.prefixes, jnp.array([slot]), jnp.array([0])),
        )
        self.cache = replace(self.cache, table=table)
        self.oracle.sequences[slot].position += tokens
        self.oracle.sequences[slot].intact = 0
        self.check()

    def pages(self, slot, group=0) -> list[int]:
        """The ids of a sequence's pages, in token order."""
        count = len(self.oracle.sequences[slot].rows[group].pages)
        return np.asarray(self.cache.table.pages)[group * self.config.max_seqs + slot, :count].tolist()

    def check(self):
        """Everything the cache says of itself and everything that can be read from it."""
        config, oracle = self.config, self.oracle
        jaxkv.check_invariants(self.cache)
        q = self._of_layers(LOOKS * config.max_seqs, self.q_heads)
        # What can be read does not depend on a policy: one program for the caches of all.
        view = programs().look(replace(self.cache, policy=None), q, self.sinks)
        table, stats, view = jax.device_get((self.cache.table, self.cache.stats, view))
        self._check_table(table)
        self._check_stats(stats)
        self._check_profile(view.profile)
        for layer in range(config.num_layers):
            assert view.k[layer].shape[1] == config.max_tokens_per_seq
            for slot in range(config.max_seqs):
                stored = oracle.gather(layer, slot)
                length = len(stored[0])
                assert view.lengths[layer][slot] == length
                for got, want in zip((view.k[layer], view.v[layer]), stored, strict=True):
                    assert np.array_equal(got[slot, :length], want[: got.shape[1]]), (layer, slot)
                    assert not got[slot, length:].any(), "not zero past the length"
        self._check_look(view, q)

    # the parts of a comparison -------------------------------------------------------------

    def _check_table(self, table):
        config, sequences = self.config, self.oracle.sequences
        rows = [s.rows[group] for group in range(len(config.groups)) for s in sequences]
        assert table.lengths.tolist() == [row.length for row in rows]
        assert table.positions.tolist() == [s.position for s in sequences]
        assert table.num_reclaimable == self.oracle.num_reclaimable
        assert table.num_free + table.num_reclaimable == self.oracle.num_free
        # What a batch depends on: which pages a sequence has, and where in its text it stands.
        state = table.pages.tobytes(), table.lengths.tobytes(), table.positions.tobytes()
        before = self.table_of.setdefault(table.fingerprint.tobytes(), state)
        assert before == state, "two states of the table have one fingerprint"
        self.id_of = {}
        for number, row in enumerate(rows):
            ids, beyond = np.split(table.pages[number], [len(row.pages)])
            assert np.all(beyond == config.num_pages)
            for label, page in zip(row.pages, ids.tolist(), strict=True):
                assert self.id_of.setdefault(label, page) == page, "a shared page has two ids"
        assert len(set(self.id_of.values())) == len(self.id_of), "two pages have one id"
        refcounts = np.zeros(config.num_pages, np.int32)
        for label, owners in self.oracle.owners().items():
            refcounts[self.id_of[label]] = owners
        recorded = set()
        if table.prefixes is not None:
            recorded = {self.id_of[label] for label in self.oracle.prefixes.holder if label in self.id_of}
            alone = np.flatnonzero(table.prefixes.queued_at >= 0)
            assert len(alone) == self.oracle.num_reclaimable
            intact = [NEVER_TOUCHED if s.intact is None else s.intact for s in sequences]
            assert table.prefixes.intact.tolist() == intact
            refcounts[[*recorded, *alone]] += 1
        np.testing.assert_array_equal(table.refcounts, refcounts)
        free = table.free_pages[: table.num_free].tolist()
        assert sorted(free) == np.flatnonzero(refcounts == 0).tolist()

    def _check_stats(self, stats):
        want = {**self.oracle.stats, "current_pages": self.oracle.num_used}
        want["prefix_pages_reclaimed"] = self.oracle.num_reclaimed
        for name in stats.names():
            assert getattr(stats, name) == want.get(name, 0), name

    def _check_profile(self, profile):
        want = self.oracle.profile()
        assert {name: getattr(profile, name) for name in want} == want
        live = np.flatnonzero(np.asarray(self.cache.table.refcounts) > 0)
        assert profile.holes == max(live, default=-1) + 1 - len(live)

    def _check_bytes(self, profile):
        """These follow from the counts and the config; working them out takes as long as the rest."""
        assert profile.used_bytes + profile.reclaimable_bytes + profile.free_bytes == profile.pool_bytes
        assert profile.total_bytes == sum(x.nbytes for x in jax.tree.leaves(self.cache))

    def _check_batch(self, batch, want):
        config = self.config
        assert [Status(s) for s in batch.status.tolist()] == want.status
        assert batch.query_starts.tolist() == want.query_starts
        assert batch.kv_lengths.tolist() == want.kv_lengths
        for row in range(self.total_tokens):
            if row in want.rows:
                slot, _, position = want.rows[row]
                assert batch.positions[row] == position
                for group, index in enumerate(want.indices[row]):
                    size = config.groups[group].page_size
                    page = self.oracle.sequences[slot].rows[group].pages[index // size]
                    assert batch.page_ids[group, row] == self.id_of[page]
                    assert batch.offsets[group, row] == index % size
            else:
                assert batch.positions[row] == 0
                assert np.all(batch.page_ids[:, row] == config.num_pages)

    def _check_order(self, want, stack):
        """Pages come off the top of the stack, where the call released and reclaimed none before."""
        if not self.oracle.windowed:
            assert [self.id_of[label] for label in want.handed_out] == stack[: len(want.handed_out)]

    def _check_attention(self, out, lse, want, q):
        """Rows of refused and padding entries are zero; the others see their sequence."""
        for layer in range(self.config.num_layers):
            expected, expected_lse = np.zeros(out[layer].shape), np.full(lse[layer].shape, -np.inf)
            # A policy's window and sink tokens are of layers with full attention.
            options = self.options if layer in self.config.full_layers else {}
            for row, (slot, place, _) in want.rows.items():
                one = _float64(q[layer][row : row + 1])
                seen = self.oracle.attend(layer, slot, one, place, **options)
                expected[row], expected_lse[row] = seen
            self._close(out[layer], expected)
            self._close(lse[layer], expected_lse)

    def _check_look(self, view, q):
        """The last tokens' attention, as many of them as the shortest row has."""
        rows, row = {}, 0
        for slot, sequence in enumerate(self.oracle.sequences):
            assert view.starts[slot] == row
            count = min(LOOKS, *(of.length for of in sequence.rows))
            assert view.counts[slot] == count
            if count:
                rows[slot], row = slice(row, row + count), row + count
        for layer, (out, lse) in zip(looked_at(self.config), view.attended, strict=True):
            want, want_lse = self._looked(layer, q[layer], rows, window=still_seen(self.config, layer))
            self._close(out, want)
            self._close(lse, want_lse)
        last, sinks = self.config.num_layers - 1, _float64(self.sinks)
        options = seen_through(self.config, last)
        self._close(view.narrow, self._looked(last, q[last], rows, sink_logits=sinks, **options)[0])

    def _looked(self, layer, q, rows, **options):
        out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
        for slot, of in rows.items():
            last = self.oracle.sequences[slot].length - 1
            out[of], lse[of] = self.oracle.attend(layer, slot, _float64(q[of]), last, **options)
        return out, lse

    def _close(self, got, want):
        assert not np.isnan(got).any()
        tolerance = TOLERANCE[str(got.dtype)]
        np.testing.assert_allclose(_float64(got), want, rtol=tolerance, atol=tolerance)

    # inputs --------------------------------------------------------------------------------

    def _of_layers(self, count, heads=None):
        """Random tokens for each layer, of its KV heads or of so many."""
        shapes = [self.config.groups[home.group] for home in self.config.homes]
        return tuple(self._normal(count, heads or of.num_kv_heads, of.head_dim) for of in shapes)

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
