"""Decode speed of SmolLM2-135M: the paged cache against a hand-written dense one, and `transformers`.

The same weights, the same model code, float32, greedy; each round decodes `STEPS` tokens in one compiled
loop, and the caches take turns. Lengths are set back between rounds, outside the clock. Pages of the
sequences are interleaved in the pool, as they are after a while of serving.

Targets: at least 0.95 of the dense cache's tokens/s at context 512 (one sequence and eight), at least 1.3
times for eight ragged sequences up to 4,096 tokens, and at least those of `transformers` for one sequence.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from benchmarks import peer_transformers
from benchmarks.publishing import publish
from jaxkv.models import LoadedModel, dense_cache, load
from jaxkv.tune.timing import Sample, interleave, stopwatch, times

STEPS, ROUNDS, PAGE_SIZE = 32, 9, 16
# Name, lengths at the start of a round, places of a dense row, least ratio to the dense cache.
CASES = (
    ("1 sequence, context 512", [512 - STEPS], 512, 0.95),
    ("8 sequences, context 512", [512 - STEPS] * 8, 512, 0.95),
    ("8 ragged sequences to 4096", np.linspace(128, 4096 - STEPS, 8).astype(int).tolist(), 4096, 1.3),
)


def paged(loaded: LoadedModel, lengths: list[int], max_tokens: int, **options) -> Callable[[], float]:
    """The paged cache, its pool no larger than the sequences need; `options` are of its config."""
    num_seqs = len(lengths)
    config = loaded.config.cache_config(
        num_pages=sum(-(-(length + STEPS) // PAGE_SIZE) for length in lengths),
        page_size=PAGE_SIZE,
        max_seqs=num_seqs,
        max_pages_per_seq=-(-max_tokens // PAGE_SIZE),
        dtype="float32",
        **options,
    )
    seqs, begin = jnp.arange(num_seqs, dtype=jnp.int32), jnp.asarray(lengths, jnp.int32)
    state = [_interleaved(config, seqs, begin), jnp.zeros(num_seqs, jnp.int32)]

    @partial(jax.jit, donate_argnums=1)
    def run(model, cache, tokens):
        def step(_, carry):
            cache, tokens = carry
            cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
            logits, cache = model(tokens, cache, batch)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))

    rewind = jax.jit(jaxkv.truncate, donate_argnums=0)

    def decode() -> float:
        state[0], _ = jax.block_until_ready(rewind(state[0], seqs, begin))
        seconds, state[:] = stopwatch(run, loaded.model, *state)
        return seconds

    return decode


def _interleaved(config: jaxkv.CacheConfig, seqs, lengths) -> jaxkv.KVCache:
    """A cache whose sequences took their pages in turn, with random K and V in the whole pool."""
    grow = jax.jit(jaxkv.allocate, static_argnames="total_tokens", donate_argnums=0)
    cache = jaxkv.init(config)
    for start in range(0, config.max_tokens_per_seq, config.page_size):
        more = jnp.clip(lengths - start, 0, config.page_size)
        cache, _ = grow(cache, seqs, more, total_tokens=config.page_size * len(seqs))
    k, v = (jax.random.normal(jax.random.key(i), config.pool_shape) for i in range(2))
    return jaxkv.KVCache(jaxkv.KVPool(k, v), cache.table, cache.stats, config)


def dense(loaded: LoadedModel, lengths: list[int], max_tokens: int) -> Callable[[], float]:
    """The dense static cache."""
    begin = jnp.asarray(lengths, jnp.int32)
    cache = dense_cache.init(loaded.config, len(lengths), max_tokens)
    k, v = (tuple(jax.random.normal(jax.random.key(i), layer.shape) for layer in cache.k) for i in range(2))
    state = [dense_cache.DenseCache(k, v, begin), jnp.zeros(len(lengths), jnp.int32)]

    @partial(jax.jit, donate_argnums=1)
    def run(model, cache, tokens):
        def step(_, carry):
            cache, tokens = carry
            logits, cache = dense_cache.decode_step(model, cache, tokens)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, STEPS, step, (cache, tokens))

    def decode() -> float:
        state[0] = jax.block_until_ready(dense_cache.DenseCache(state[0].k, state[0].v, begin.copy()))
        seconds, state[:] = stopwatch(run, loaded.model, *state)
        return seconds

    return decode


def main() -> int:
    """Prints the table, writes the result, and returns 1 if a target is missed."""
    loaded = load("smollm2-135m", dtype="float32")
    print(f"{'case':<28}{'cache':<22}{'tokens/s':>9}   jaxkv against it   target")
    rows, met = [], True
    for name, lengths, max_tokens, target in CASES:
        functions = {
            "jaxkv": paged(loaded, lengths, max_tokens),
            "dense": dense(loaded, lengths, max_tokens),
        }
        targets = {"dense": target}
        peer = peer_transformers.decode(lengths[0], STEPS) if len(lengths) == 1 else None
        if peer is not None:
            functions["transformers"], targets["transformers"] = peer, 1.0
        seconds = interleave(functions, rounds=ROUNDS, warm_up=1)
        del functions
        rows += [_row(name, len(lengths), other, seconds, targets.get(other)) for other in seconds]
        met &= all(row["met"] for row in rows)
    if not peer_transformers.present():
        print("transformers: absent (not installed here)")
    publish("decode", {"steps": STEPS, "rows": rows})
    return 0 if met else 1


def _row(case: str, num_seqs: int, name: str, seconds: dict[str, Sample], target: float | None) -> dict:
    """The speed of one cache, and how many of its tokens/s the paged cache reaches."""
    ratio = seconds[name].over(seconds["jaxkv"])
    speed = num_seqs * STEPS / seconds[name].median
    met = target is None or ratio.median >= target
    verdict = "" if target is None else f"{times(ratio):<18} {target:.2f} {'met' if met else 'NOT MET'}"
    print(f"{case:<28}{name:<22}{speed:>9.1f}   {verdict}", flush=True)
    return {
        "case": case,
        "name": name,
        "tokens_per_second": speed,
        "seconds": seconds[name].as_json(),
        "ratio": ratio.as_json(),
        "target": target,
        "met": met,
    }


if __name__ == "__main__":
    raise SystemExit(main())
