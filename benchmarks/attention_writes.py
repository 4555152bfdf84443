"""Append and page copy for `bench_attention`, and the rates of the device that figures are compared with."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

import pallas_kernels
from benchmarks.attention_targets import OURS
from jaxkv.tune.implementation import HAS_GPU, of_one_call
from jaxkv.tune.timing import interleave, stopwatch, times
from pallas_kernels import cost, formats


def copy_seconds(num_bytes: int) -> Callable[[], float]:
    """A device copy that reads and writes so many bytes together."""
    source = jnp.ones(max(1, int(num_bytes) // 4), jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def run(calls, x):
        for _ in range(calls):
            # Adding zero would be taken out; each pass must wait for the one before.
            x = jax.lax.optimization_barrier(x + jnp.bfloat16(1))
        return x

    return lambda: of_one_call(lambda calls: stopwatch(run, calls, source)[0])


def product_seconds(flops: int, dtype: str) -> Callable[[], float]:
    """The time of so many flops at the rate of a large square matrix product."""
    size = 8192 if HAS_GPU else 1024
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)

    @partial(jax.jit, static_argnums=0)
    def run(calls, a):
        b = a
        for _ in range(calls):
            b = a @ b
        return b

    share = flops / (2 * size**3)
    return lambda: share * of_one_call(lambda calls: stopwatch(run, calls, a)[0])


def writes(rounds: int) -> list[dict]:
    """Append of 256 tokens and a copy of 256 pages, each beside a device copy of the same bytes."""
    layers, pages, tokens, copies = (32, 1024, 256, 256) if HAS_GPU else (4, 1024, 256, 256)
    backend = "triton" if HAS_GPU else "xla"
    # On a CPU XLA copies a pool of bfloat16 to write to it.
    dtype = jnp.bfloat16 if HAS_GPU else jnp.float32
    pool = jnp.zeros((layers, pages, 8, 16, 128), dtype)
    new = jnp.ones((tokens, 8, 128), dtype)
    page = jax.random.permutation(jax.random.key(0), pages)[:tokens].astype(jnp.int32)
    offset = jnp.arange(tokens, dtype=jnp.int32) % 16
    # Each its own: they are donated.
    state = {"append": (pool + 0, pool + 0), "copy": (pool + 0, pool + 0)}

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def append(calls, k, v):
        for call in range(calls):
            k, v = pallas_kernels.append_kv(
                k, v, new, new, page, offset, layer=call % layers, backend=backend
            )
        return k, v

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def copy(calls, k, v):
        number = jnp.arange(copies, dtype=jnp.int32)
        for _ in range(calls):
            k, v = pallas_kernels.copy_pages(k, v, number, number + pages // 2, backend=backend)
        return k, v

    def ours(name: str, run: Callable) -> Callable[[], float]:
        def seconds(calls: int) -> float:
            spent, state[name] = stopwatch(run, calls, *state[name])
            return spent

        # As a device copy of the same bytes is timed.
        return lambda: of_one_call(seconds)

    appended = cost.append_kv(tokens=tokens, kv_heads=8, head_dim=128, dtype=dtype, storage=formats.of(dtype))
    copied = cost.copy_pages(copies=copies, layers=layers, page_numbers=8 * 16 * 128, dtype=dtype)
    rows = []
    for name, run, counted in (
        (f"append {tokens} tokens", ours("append", append), appended.bytes_accessed),
        (f"copy {copies} pages, {layers} layers", ours("copy", copy), copied.bytes_accessed),
    ):
        samples = interleave({OURS: run, "copy bandwidth": copy_seconds(counted)}, rounds=rounds)
        ratio, target = samples[OURS].over(samples["copy bandwidth"]), 1.5 if HAS_GPU else None
        met = target is None or ratio.median <= target
        print(
            f"\n{name}: {1e6 * samples[OURS].median:,.0f} us, {times(ratio)} the time of a device copy of "
            f"the same bytes{'' if target is None else f', target {target}: ' + ('met' if met else 'MISSED')}"
        )
        rows.append({"problem": name, "bytes": counted, "ratio_to_copy": ratio.as_json(), "met": met})
    return rows
