"""jaxkv's prefix cache and vLLM's, ready to be run: through a trace of requests, and one operation at a time.

A pool of one layer, one head and a head_dim of 1 keeps K and V out of it.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks import peer_vllm_blocks
from benchmarks.conversations import MAX_TOKENS
from benchmarks.exact_lru import PAGE_SIZE, STEP, Tokens
from jaxkv.tune.timing import stopwatch

Run = Callable[[], float]
VOCABULARY = 49152


def int32(values: Sequence[int]) -> np.ndarray:
    """A vector on the host."""
    return np.array(values, np.int32)


def padded(tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Tokens as the only row of an array of `MAX_TOKENS`, and their number."""
    row = np.zeros((1, MAX_TOKENS), np.int32)
    row[0, : len(tokens)] = tokens
    return row, int32([len(tokens)])


def small_config(*, num_pages: int, max_seqs: int, max_tokens: int, prefix_cache: bool = True):
    """Sizes of a cache whose bookkeeping alone matters."""
    return jaxkv.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_seqs=max_seqs,
        max_pages_per_seq=-(-max_tokens // PAGE_SIZE),
        dtype="float32",
        prefix_cache=prefix_cache,
    )


class Served:
    """jaxkv as `exact_lru.serve` runs it: every token's K is its id, so that a match shows what it found.

    Attributes:
      cache: the cache.
      wrong: tokens that a match gave and that are not those of the prompt.
    """

    def __init__(self, num_pages: int, in_flight: int):
        self.cache = jaxkv.init(small_config(num_pages=num_pages, max_seqs=in_flight, max_tokens=MAX_TOKENS))
        self.wrong = 0
        self._slots = np.arange(in_flight, dtype=np.int32)

    def match(self, slot: int, prompt: Tokens) -> int:
        self.cache, matched, keys = _match(self.cache, int32([slot]), *padded(prompt))
        matched = int(matched[0])
        self.wrong += int(np.sum(np.asarray(keys)[:matched] != np.asarray(prompt[:matched])))
        return matched

    def prefill(self, slot: int, tokens: Tokens) -> None:
        row, num_tokens = padded(tokens)
        self._extend(int32([slot]), num_tokens, row[0])

    def decode(self, tokens: Mapping[int, Tokens]) -> None:
        parts = [tokens.get(int(slot), ()) for slot in self._slots]
        packed, num_tokens = jaxkv.pack(parts, total_tokens=len(parts) * STEP)
        self._extend(self._slots, num_tokens, packed)

    def record(self, slot: int, tokens: Tokens) -> None:
        self.cache = _record(self.cache, int32([slot]), *padded(tokens))

    def free(self, slot: int) -> None:
        self.cache = _free(self.cache, int32([slot]))

    def _extend(self, slots: np.ndarray, num_tokens: Any, tokens: Any) -> None:
        self.cache, status = _extend(self.cache, slots, num_tokens, tokens)
        jaxkv.raise_for_status(status)


@partial(jax.jit, donate_argnums=0)
def _match(cache, slots, tokens, num_tokens):
    cache, matched = jaxkv.match_prefix(cache, slots, tokens, num_tokens)
    return cache, matched, jaxkv.gather(cache, 0, slots)[0][0, :, 0, 0]


@partial(jax.jit, donate_argnums=0)
def _extend(cache, slots, num_tokens, tokens):
    cache, batch = jaxkv.allocate(cache, slots, num_tokens, total_tokens=tokens.shape[0])
    keys = tokens.astype(jnp.float32)[:, None, None]
    return jaxkv.append(cache, 0, batch, keys, keys), batch.status


_record = jax.jit(jaxkv.record_prefix, donate_argnums=0)
_free = jax.jit(jaxkv.free, donate_argnums=0)


# One operation at a time -----------------------------------------------------------------------

PROMPT_TOKENS = 8192
PROMPT_PAGES = PROMPT_TOKENS // PAGE_SIZE


def our_runs(num_pages: int, batches: Sequence[int]) -> dict[str, Run]:
    """jaxkv's operations on a full pool: every page is recorded, and no sequence has any.

    Tokens come from the host as NumPy arrays, and each is a call of its own, as with a server on the host.

    Args:
      num_pages: of the pool, a multiple of a prompt's pages.
      batches: numbers of prompts that are looked up at once.
    """
    config = small_config(num_pages=num_pages, max_seqs=max(batches), max_tokens=PROMPT_TOKENS)
    empty = jaxkv.init(config)
    caches = {name: _filled(_copy(empty)) for name in ("match", "record", "allocate")}
    prompts, fresh = _known_prompts(max(batches)), _new_prompts()
    slot, length = int32([0]), int32([PROMPT_TOKENS])

    def look_up(batch: int) -> Run:
        slots, lengths = np.arange(batch, dtype=np.int32), np.full(batch, PROMPT_TOKENS, np.int32)

        def run() -> float:
            seconds, (cache, matched) = stopwatch(
                _match_only, caches["match"], slots, prompts[:batch], lengths
            )
            assert np.all(np.asarray(matched) == PROMPT_TOKENS - PAGE_SIZE), np.asarray(matched)
            caches["match"] = jax.block_until_ready(_free(cache, slots))
            return seconds

        return run

    def record() -> float:
        cache, status = jax.block_until_ready(_allocate(caches["record"], slot, length))
        jaxkv.raise_for_status(status)
        seconds, cache = stopwatch(_record, cache, slot, next(fresh), length)
        caches["record"] = jax.block_until_ready(_free(cache, slot))
        return seconds

    def allocate() -> float:
        seconds = allocate_once()
        # Where a bucket of the index is full, the rest of a prompt is not recorded, and its pages are free.
        while int(caches["allocate"].table.num_free):
            allocate_once()
        return seconds

    def allocate_once() -> float:
        seconds, (cache, status) = stopwatch(_allocate, caches["allocate"], slot, length)
        jaxkv.raise_for_status(status)
        cache = _record(cache, slot, next(fresh), length)
        caches["allocate"] = jax.block_until_ready(_free(cache, slot))
        return seconds

    looked_up: dict[str, Run] = {_look_up_name(batch): look_up(batch) for batch in batches}
    return looked_up | {"record": record, "allocate": allocate}


def vllm_runs(peer: SimpleNamespace, num_pages: int, batches: Sequence[int]) -> dict[str, Run]:
    """vLLM's operations on a pool of the same contents."""
    prompts, fresh = _known_prompts(num_pages // PROMPT_PAGES), _new_prompts()
    pools = {}
    for name in ("match", "record", "allocate"):
        pools[name] = pool = peer_vllm_blocks.Operations(peer, num_pages=num_pages, page_size=PAGE_SIZE)
        for prompt in prompts:
            request = pool.request(prompt.tolist())
            pool.hash(request)
            pool.allocate(request)
            pool.record(request)
            pool.free(request)
    # As its server does, so that these objects are not looked at in every collection.
    gc.collect()
    gc.freeze()

    def look_up(batch: int, *, hashed: bool) -> Run:
        pool = pools["match"]
        requests = [pool.request(prompt.tolist()) for prompt in prompts[:batch]]

        def run() -> float:
            if hashed:
                for request in requests:
                    pool.hash(request)
            matched, start = 0, time.perf_counter()
            for request in requests:
                if not hashed:
                    pool.hash(request)
                matched += pool.match(request)
            seconds = time.perf_counter() - start
            assert matched == batch * (PROMPT_TOKENS - PAGE_SIZE)
            for request in requests:
                pool.free(request)
            return seconds

        return run

    def new_request(pool: peer_vllm_blocks.Operations) -> peer_vllm_blocks.Request:
        request = pool.request(next(fresh)[0].tolist())
        pool.hash(request)
        return request

    def record() -> float:
        pool = pools["record"]
        request = new_request(pool)
        pool.allocate(request)
        start = time.perf_counter()
        pool.record(request)
        seconds = time.perf_counter() - start
        pool.free(request)
        return seconds

    def allocate() -> float:
        pool = pools["allocate"]
        request = new_request(pool)
        start = time.perf_counter()
        new = pool.allocate(request)
        seconds = time.perf_counter() - start
        assert new == PROMPT_PAGES
        pool.record(request)
        pool.free(request)
        return seconds

    looked_up: dict[str, Run] = {_look_up_name(batch): look_up(batch, hashed=False) for batch in batches}
    known = {f"{_look_up_name(batch)}, hashes known": look_up(batch, hashed=True) for batch in batches}
    return looked_up | known | {"record": record, "allocate": allocate}


def _look_up_name(batch: int) -> str:
    return f"look up {batch}"


@partial(jax.jit, donate_argnums=0)
def _match_only(cache, slots, tokens, num_tokens):
    return jaxkv.match_prefix(cache, slots, tokens, num_tokens)


@partial(jax.jit, donate_argnums=0)
def _allocate(cache, slots, num_tokens):
    cache, batch = jaxkv.allocate(cache, slots, num_tokens, total_tokens=PROMPT_TOKENS)
    return cache, batch.status


@partial(jax.jit, donate_argnums=0)
def _filled(cache):
    """The pool full of recorded prompts, which no sequence has."""
    slot, length = jnp.zeros(1, jnp.int32), jnp.full(1, PROMPT_TOKENS, jnp.int32)

    def fill(number, cache):
        cache, _ = jaxkv.allocate(cache, slot, length, total_tokens=PROMPT_TOKENS)
        cache = jaxkv.record_prefix(cache, slot, _tokens_of(number)[None], length)
        return jaxkv.free(cache, slot)

    return jax.lax.fori_loop(0, cache.config.num_pages // PROMPT_PAGES, fill, cache)


def _tokens_of(number: jax.Array | int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(0), number)
    return jax.random.randint(key, (PROMPT_TOKENS,), 0, VOCABULARY, jnp.int32)


def _known_prompts(count: int) -> np.ndarray:
    """Tokens of the first prompts that `_filled` records."""
    return np.asarray(jax.jit(jax.vmap(_tokens_of))(jnp.arange(count)))


def _new_prompts():
    """Prompts that no pool has seen."""
    random = np.random.default_rng(0)
    while True:
        yield random.integers(0, VOCABULARY, (1, PROMPT_TOKENS), np.int32)


def _copy(state: Any) -> Any:
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


# A step of decoding ----------------------------------------------------------------------------


def allocations(num_seqs: int, context: int, steps: int, *, prefix_cache: bool) -> Run:
    """`steps` allocations of a token for each sequence, in one compiled loop."""
    pages = -(-(context + steps) // PAGE_SIZE)
    config = small_config(
        num_pages=num_seqs * pages,
        max_seqs=num_seqs,
        max_tokens=pages * PAGE_SIZE,
        prefix_cache=prefix_cache,
    )
    seqs = jnp.arange(num_seqs, dtype=jnp.int32)
    one, begin = jnp.ones_like(seqs), jnp.full_like(seqs, context)
    cache, _ = jaxkv.allocate(jaxkv.init(config), seqs, begin, total_tokens=num_seqs * context)

    @partial(jax.jit, donate_argnums=0)
    def run(cache):
        # The batch is carried along, so that all of it is computed.
        def step(_, carry):
            return jaxkv.allocate(carry[0], seqs, one)

        return jax.lax.fori_loop(1, steps, step, jaxkv.allocate(cache, seqs, one))

    rewind = jax.jit(jaxkv.truncate, donate_argnums=0)

    def timed() -> float:
        nonlocal cache
        seconds, (cache, _) = stopwatch(run, cache)
        cache, _ = jax.block_until_ready(rewind(cache, seqs, begin))
        return seconds

    return timed
