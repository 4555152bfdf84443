"""A cache in which every token slot holds a number of its text up to there: a page of another text shows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv import CacheConfig, Status
from tests import jitted
from tests.caches import ints

TEXTS = CacheConfig(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    num_pages=8,
    page_size=4,
    max_seqs=4,
    max_pages_per_seq=4,
    dtype="float32",
    prefix_cache=True,
)
WINDOWS_ONLY = replace(TEXTS, page_size=1, num_pages=9, max_pages_per_seq=9, layer_windows=(3,), max_chunk=8)
MOST = 16  # tokens of a call
WIDTH = 36  # of rows of tokens, more than a sequence can have


def numbers(tokens, salt=0):
    """Of each token one that tells the salt and all tokens so far, above zero and exact in float32."""
    found, so_far = [], int(salt) + 1
    for token in tokens:
        so_far = (so_far * 40503 + int(token) + 7) % 2**22
        found.append(so_far + 1)
    return np.array(found, np.float32)


@partial(jax.jit, donate_argnums=0)
def write(cache, seqs, counts, values):
    """`values` [MOST]: what each token's slot will hold."""
    cache, batch = jaxkv.allocate(cache, seqs, counts, total_tokens=MOST)
    for layer in range(cache.config.num_layers):
        of = cache.config.groups[cache.config.homes[layer].group]
        k = jnp.broadcast_to(values[:, None, None], (MOST, of.num_kv_heads, of.head_dim))
        cache = jaxkv.append(cache, layer, batch, k, -k)
    return cache, batch


class Server:
    """What a server does with a cache; every match is read back and compared with the text's numbers."""

    def __init__(self, config=TEXTS, policy=None):
        self.config, self.cache = config, jitted.init(config, policy)
        self.texts = {}

    def write(self, slot, tokens, salt=0) -> Status:
        """Continues the text of a slot."""
        salt, before = self.texts.get(slot, (salt, []))
        text = before + list(tokens)
        values = np.zeros(MOST, np.float32)
        values[: len(tokens)] = numbers(text, salt)[len(before) :]
        self.cache, batch = write(self.cache, ints(slot), ints(len(tokens)), values)
        status = Status(int(batch.status[0]))
        if status == Status.OK:
            self.texts[slot] = salt, text
        jaxkv.check_invariants(self.cache)
        return status

    def record(self, *slots, num_tokens=None):
        """In calls of two entries, so that one program serves."""
        for first in range(0, len(slots), 2):
            some = slots[first : first + 2]
            texts = [self.texts[slot] for slot in some]
            counts = [len(text) if num_tokens is None else num_tokens for _, text in texts]
            self.record_as(some, [text for _, text in texts], counts, [salt for salt, _ in texts])

    def record_as(self, slots, texts, counts, salts):
        arguments = self.entries(slots, texts, counts, salts)
        self.cache = jitted.record_prefix(self.cache, *arguments[:3], salt=arguments[3])
        jaxkv.check_invariants(self.cache)

    def match(self, slot, tokens, salt=0) -> int:
        return self.match_as([slot], [tokens], [len(tokens)], [salt])[0]

    def match_as(self, slots, texts, counts, salts) -> list[int]:
        arguments = self.entries(slots, texts, counts, salts)
        before = jax.device_get(self.cache.table)
        self.cache, matched = jitted.match_prefix(self.cache, *arguments[:3], salt=arguments[3])
        jaxkv.check_invariants(self.cache)
        matched = matched.tolist()[: len(slots)]
        for slot, text, count, salt, length in zip(slots, texts, counts, salts, matched, strict=True):
            assert 0 <= length <= max(count - 1, 0)
            if length:
                assert before.positions[slot] == 0 and self.cache.table.positions[slot] == length
                self.texts[slot] = salt, list(text[:length])
                self.check(slot)
        return matched

    def entries(self, slots, texts, counts, salts):
        rows = np.full((2, WIDTH), -1, np.int32)
        for row, text in zip(rows, texts, strict=False):
            row[: len(text)] = text
        more = 2 - len(slots)
        columns = ([*slots, *[-1] * more], [*counts, *[0] * more], [*salts, *[0] * more])
        seqs, counts, salts = (np.array(column, np.int32) for column in columns)
        return seqs, rows, counts, salts

    def check(self, slot):
        """What a sequence's next token sees holds its text."""
        salt, text = self.texts[slot]
        want = numbers(text, salt)
        for layer in range(self.config.num_layers):
            k, v, lengths = jitted.gather(self.cache, layer, ints(slot))
            assert lengths[0] == len(text)
            window = self.config.groups[self.config.homes[layer].group].window
            seen = slice(0 if window is None else max(0, len(text) - window + 1), len(text))
            for got in (np.asarray(k)[0], -np.asarray(v)[0]):
                assert np.all(got[seen] == want[seen, None, None]), f"slot {slot} holds another text"

    def free(self, *slots):
        for first in range(0, len(slots), 2):
            some = slots[first : first + 2]
            self.cache, _ = jitted.truncate(self.cache, ints(*some, *[-1] * (2 - len(some))), ints(0, 0))
        for slot in slots:
            self.texts.pop(slot, None)
        jaxkv.check_invariants(self.cache)

    def leave(self, *slots):
        """Records texts, and frees their slots."""
        self.record(*slots)
        self.free(*slots)

    def truncate(self, slot, length) -> Status:
        self.cache, status = jitted.truncate(self.cache, ints(slot, -1), ints(length, 0))
        if status[0] == Status.OK:
            salt, text = self.texts[slot]
            self.texts[slot] = salt, text[:length]
        jaxkv.check_invariants(self.cache)
        return Status(int(status[0]))

    def fork(self, parent, child):
        self.cache, status = jitted.fork(self.cache, ints(parent), ints(child))
        assert status[0] == Status.OK
        self.texts[child] = self.texts[parent]

    @property
    def free_pages(self) -> int:
        return int(self.cache.table.num_free)

    @property
    def reclaimable(self) -> int:
        return int(self.cache.table.num_reclaimable)

    @property
    def table(self):
        return jax.device_get(self.cache.table)
