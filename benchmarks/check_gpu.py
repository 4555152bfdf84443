"""The kernels on a real GPU: are they right, do they stay within bounds, how fast are they?

  conformance   Every case of the tests, each backend against NumPy float64, with the memory that the
                outputs will get filled with NaN beforehand.
  memcheck      A few of them again under `compute-sanitizer`, where it is installed, and a kernel that
                it must catch.
  speed         Decode, append and page copy against the copy bandwidth of the same run and against JAX's
                own paged attention. A time is that of several calls in one compiled program, each waiting
                for the one before, over layers that together do not fit the L2 cache.

Bars: decode at 85% of the copy bandwidth from 256 MB of K and V on; append of 256 tokens, and a copy of 256
pages, within 1.5 times a device copy of the same bytes.

Without a GPU it says so, and rehearses: the same code on small shapes, the kernels interpreted.

    python -m benchmarks.check_gpu [--conformance-only [PART ...]]

Exit status: 0, or 1 where a result is wrong or a bar is missed. The last line of output is one JSON
document, which a GPU's run also leaves under `benchmarks/results/`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

import pallas_kernels
from benchmarks.timing import Sample, interleave, publish, stopwatch
from pallas_kernels import cost
from pallas_kernels.device import Device
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention.tuning import lacks
from tests.kernels import reference
from tests.kernels.cases import PAGED_ATTENTION, TOLERANCE, Case, make

HAS_GPU = jax.default_backend() == "gpu"
DECODE_BAR, WRITE_BAR = 0.85, 1.5
BAR_FROM_BYTES = 256 * 10**6
GB = 1e9


# --- conformance


def conformance(cases: list[Case]) -> list[dict]:
    """Runs every case on every backend; returns what failed."""
    failures = []
    for case in cases:
        arguments = make(case)
        rows = arguments.page_table, arguments.kv_lengths, arguments.query_starts
        pages = arguments.k_pages, arguments.v_pages
        want = reference.paged_attention(arguments.q, *pages, *rows, layer=case.layer, **arguments.options)
        for backend in ("xla", "triton"):
            arrays = jax.block_until_ready(arguments.arrays)
            if backend == "triton" and (reason := lacks(Device.current(), case.head_dim, *arrays[:2])):
                print(f"{case.name} is left to the xla backend: no {reason}")
                continue
            run = jax.jit(
                partial(
                    pallas_kernels.paged_attention,
                    layer=case.layer,
                    return_lse=True,
                    backend=backend,
                    interpret=backend != "xla" and not HAS_GPU,
                    **arguments.options,
                )
            )
            compiled = run.lower(*arrays).compile()
            _poison(compiled)
            got = compiled(*arrays)
            for name, one, other, dtype in zip(
                ("out", "lse"), got, want, (case.dtype, "float32"), strict=True
            ):
                tolerance = TOLERANCE[dtype]
                one = np.asarray(one).astype(np.float64)
                if not np.allclose(one, other, rtol=tolerance, atol=tolerance * case.magnitude):
                    failures.append({"case": case.name, "backend": backend, "what": name})
                    print(f"WRONG: {case.name}, {backend}, {name}", flush=True)
    return failures


def write_conformance() -> list[dict]:
    """Append, page copy and moves against NumPy, exactly, with entries that must do nothing among them."""
    random, failures = np.random.default_rng(0), []
    for dtype in ("float32", "bfloat16", "float16"):
        k_pages, v_pages = random.normal(size=(2, 3, 40, 3, 7, 80)).astype(jnp.dtype(dtype))
        k, v = random.normal(size=(2, 33, 3, 80)).astype(jnp.dtype(dtype))
        page = np.where(np.arange(33) % 5 == 4, 40, random.permutation(40)[:33]).astype(np.int32)
        offset = random.integers(0, 7, size=33).astype(np.int32)
        sources, destinations = np.arange(20, dtype=np.int32), np.arange(20, 40, dtype=np.int32)
        destinations[::3] = 40
        calls = {
            "append_kv": ((k, v, page, offset), {"layer": 1}),
            "copy_pages": ((sources, destinations), {}),
            # One long cycle, and pages that trade places.
            "move_pages": ((np.r_[1:30, 0, 31, 30, 32:40].astype(np.int32),), {}),
        }
        for name, (arguments, options) in calls.items():
            want = getattr(reference, name)(k_pages, v_pages, *arguments, **options)
            for backend in ("xla", "triton"):
                interpret = backend != "xla" and not HAS_GPU
                run = partial(getattr(pallas_kernels, name), backend=backend, interpret=interpret, **options)
                got = jax.jit(run, donate_argnums=(0, 1))(jnp.array(k_pages), jnp.array(v_pages), *arguments)
                if not all(np.array_equal(one, other) for one, other in zip(got, want, strict=True)):
                    failures.append({"case": f"{name} {dtype}", "backend": backend, "what": "pool"})
                    print(f"WRONG: {name} {dtype}, {backend}", flush=True)
    return failures


def _poison(compiled) -> None:
    """Fills more memory than a program takes with NaN, in pieces of many sizes, and gives it back."""
    memory = compiled.memory_analysis()
    most = max(2**20, 2 * (memory.temp_size_in_bytes + memory.output_size_in_bytes))
    sizes = [most >> shift for shift in range(10)]
    jax.block_until_ready([jnp.full(max(1, size // 4), jnp.nan, jnp.float32) for size in sizes])


def memcheck() -> str:
    """What `compute-sanitizer` says of a few cases."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not HAS_GPU or tool is None:
        return "not run: " + ("no GPU" if not HAS_GPU else "compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", __spec__.name]
    # Each buffer an allocation of its own: within one pool of memory nothing would be out of bounds.
    environment = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)

    if run("--out-of-bounds").returncode != 9:
        return "worthless: it does not report a write past the end of an array"
    ours = run("--conformance-only", "window over", "rows of no", "71", "prefill and")
    return "clean" if ours.returncode == 0 else f"exit {ours.returncode}: {ours.stdout[-2000:]}"


def write_out_of_bounds() -> None:
    """Wrong on purpose: what memcheck must catch."""

    def kernel(_, out):
        plgpu.store(out.at[128 + jax.lax.iota(jnp.int32, 128)], jnp.ones(128, jnp.float32))

    array = jax.ShapeDtypeStruct((128,), jnp.float32)
    write = launch(
        kernel, grid=(1,), out_shape=array, name="wrong", num_warps=4, num_stages=1, interpret=not HAS_GPU
    )
    jax.block_until_ready(jax.jit(write)(jnp.zeros(128, jnp.float32)))


# --- speed


@dataclass(frozen=True)
class Shape:
    """Decode of `lengths`, on a pool of `layers` layers."""

    name: str
    lengths: tuple[int, ...]
    page_size: int
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 4

    @property
    def kv_bytes(self) -> int:
        """K and V that one layer's attention reads."""
        return self.cost.bytes_accessed

    @property
    def cost(self):
        """Counted flops and bytes."""
        keys, pairs = cost.causal(self.lengths, [1] * len(self.lengths))
        return cost.paged_attention(
            num_keys=keys,
            num_pairs=pairs,
            tokens=len(self.lengths),
            q_heads=self.q_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            q_dtype=jnp.bfloat16,
            kv_dtype=jnp.bfloat16,
        )


def shapes() -> list[Shape]:
    """256 MB of K and V and more, uniform and skewed; something tiny for a rehearsal."""
    if not HAS_GPU:
        return [
            Shape("rehearsal", (40, 7), 16, q_heads=4, kv_heads=2, head_dim=64, layers=2),
            Shape("rehearsal, skewed", (300, 1), 8, q_heads=4, kv_heads=2, head_dim=64, layers=2),
        ]
    uniform = [
        Shape(f"{seqs} x {length}, pages of {page}", (length,) * seqs, page)
        for page in (16, 64)
        for seqs, length in ((8, 8192), (64, 2048), (128, 4096))
    ]
    skewed = [
        Shape(f"one of 131072 beside 63 of 1024, pages of {page}", (131072,) + (1024,) * 63, page)
        for page in (16, 64)
    ]
    return uniform + skewed


def decode(shape: Shape) -> dict[str, Callable[[], float]]:
    """Contestants that each return the seconds of one layer's attention."""
    random = np.random.default_rng(0)
    pages = [-(-length // shape.page_size) for length in shape.lengths]
    num_pages, width = sum(pages), max(pages)
    order = random.permutation(num_pages).astype(np.int32)
    table = np.zeros((len(pages), width), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *pages]), pages, strict=False)):
        table[row, :count] = order[first : first + count]
    key = jax.random.key(0)
    pool_shape = shape.layers, num_pages, shape.kv_heads, shape.page_size, shape.head_dim
    k, v = (jax.random.normal(key, pool_shape, jnp.bfloat16) for key in jax.random.split(key))
    q = jax.random.normal(key, (len(pages), shape.q_heads, shape.head_dim), jnp.bfloat16)
    lengths, starts = jnp.asarray(shape.lengths, jnp.int32), jnp.arange(len(pages) + 1, dtype=jnp.int32)
    table = jnp.asarray(table)
    rounds = 5

    @jax.jit
    def ours(q, k, v, table, lengths, starts):
        for call in range(rounds * shape.layers):
            attended = pallas_kernels.paged_attention(
                q,
                k,
                v,
                table,
                lengths,
                starts,
                layer=call % shape.layers,
                backend="triton",
                interpret=not HAS_GPU,
            )
            q = (q + attended).astype(q.dtype)
        return q

    arguments = q, k, v, table, lengths, starts
    contestants = {"jaxkv": lambda: stopwatch(ours, *arguments)[0] / (rounds * shape.layers)}
    if HAS_GPU:
        contestants["jax"] = _jax_own(shape, q, k, v, table, lengths, rounds)
    return contestants


def _jax_own(shape: Shape, q, k, v, table, lengths, rounds: int) -> Callable[[], float]:
    """JAX's own kernel, on pools in the layout that it wants. It takes no scale: q comes scaled."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    layers = [(k[i].swapaxes(0, 1), v[i].swapaxes(0, 1)) for i in range(shape.layers)]

    @jax.jit
    def run(q, layers, table, lengths):
        for call in range(rounds * shape.layers):
            own_k, own_v = layers[call % shape.layers]
            q = (q + paged_attention(q * shape.head_dim**-0.5, own_k, own_v, table, lengths)).astype(q.dtype)
        return q

    return lambda: stopwatch(run, q, layers, table, lengths)[0] / (rounds * shape.layers)


def copy_seconds(num_bytes: int, calls: int = 10) -> Callable[[], float]:
    """A contestant that reads and writes so many bytes in all, by a plain device copy."""
    source = jnp.ones(max(1, num_bytes // 4), jnp.bfloat16)

    @jax.jit
    def run(x):
        for _ in range(calls):
            # Adding zero would be taken out; each pass must wait for the one before.
            x = jax.lax.optimization_barrier(x + jnp.bfloat16(1))
        return x

    return lambda: stopwatch(run, source)[0] / calls


def writes() -> dict[str, tuple[dict[str, Callable[[], float]], int]]:
    """Append of 256 tokens and a copy of 256 pages, each beside a device copy of the same bytes."""
    layers, pages, tokens, copies = (32, 1024, 256, 256) if HAS_GPU else (2, 32, 4, 4)
    interpret, calls = not HAS_GPU, 10
    pool = jnp.zeros((layers, pages, 8, 16, 128), jnp.bfloat16)
    new = jnp.ones((tokens, 8, 128), jnp.bfloat16)
    page = jax.random.permutation(jax.random.key(0), pages)[:tokens].astype(jnp.int32)
    offset = jnp.arange(tokens, dtype=jnp.int32) % 16
    state = {"append": (pool, pool + 0), "copy": (pool + 0, pool + 0)}

    @partial(jax.jit, donate_argnums=(0, 1))
    def append(k, v):
        for call in range(calls):
            k, v = pallas_kernels.append_kv(
                k, v, new, new, page, offset, layer=call % layers, backend="triton", interpret=interpret
            )
        return k, v

    @partial(jax.jit, donate_argnums=(0, 1))
    def copy(k, v):
        number = jnp.arange(copies, dtype=jnp.int32)
        for _ in range(calls):
            k, v = pallas_kernels.copy_pages(
                k, v, number, number + pages // 2, backend="triton", interpret=interpret
            )
        return k, v

    def contestant(name: str, run: Callable) -> Callable[[], float]:
        def once() -> float:
            seconds, state[name] = stopwatch(run, *state[name])
            return seconds / calls

        return once

    appended = cost.append_kv(
        tokens=tokens, kv_heads=8, head_dim=128, dtype=jnp.bfloat16, pool_dtype=jnp.bfloat16
    ).bytes_accessed
    copied = cost.copy_pages(
        copies=copies, layers=layers, page_numbers=8 * 16 * 128, dtype=jnp.bfloat16
    ).bytes_accessed
    return {
        f"append {tokens} tokens": (
            {"jaxkv": contestant("append", append), "copy": copy_seconds(appended)},
            appended,
        ),
        f"copy {copies} pages, {layers} layers": (
            {"jaxkv": contestant("copy", copy), "copy": copy_seconds(copied)},
            copied,
        ),
    }


def speed() -> list[dict]:
    """Prints the tables; returns a row for each measurement."""
    rounds = 9 if HAS_GPU else 2
    rows = []
    if not HAS_GPU:
        print("the times of an interpreter, which mean nothing:")
    print(f"\n{'decode':<48}{'us':>10}{'TB/s':>8}{'of copy':>9}{'JAX own':>9}")
    for shape in shapes():
        contestants = decode(shape)
        contestants["copy"] = copy_seconds(shape.kv_bytes)
        samples = interleave(contestants, rounds=rounds)
        share = samples["copy"].over(samples["jaxkv"]).median
        own = samples["jax"].over(samples["jaxkv"]).median if "jax" in samples else None
        met = not HAS_GPU or shape.kv_bytes < BAR_FROM_BYTES or share >= DECODE_BAR
        seconds = samples["jaxkv"].median
        print(
            f"{shape.name:<48}{1e6 * seconds:>10.1f}{shape.kv_bytes / seconds / GB / 1000:>8.2f}"
            f"{share:>9.2f}{'-' if own is None else f'{own:.2f}x':>9}{'' if met else '  MISSED'}",
            flush=True,
        )
        rows.append(_row(shape.name, samples, shape.kv_bytes, share, met))
    print(f"\n{'writes':<48}{'us':>10}{'':>8}{'to copy':>9}")
    for name, (contestants, num_bytes) in writes().items():
        samples = interleave(contestants, rounds=rounds)
        ratio = samples["jaxkv"].over(samples["copy"]).median
        met = not HAS_GPU or ratio <= WRITE_BAR
        seconds = samples["jaxkv"].median
        print(f"{name:<48}{1e6 * seconds:>10.1f}{'':>8}{ratio:>8.2f}x{'' if met else '  MISSED'}", flush=True)
        rows.append(_row(name, samples, num_bytes, ratio, met))
    return rows


def _row(name: str, samples: dict[str, Sample], num_bytes: int, ratio: float, met: bool) -> dict:
    seconds = {contestant: sample.as_json() for contestant, sample in samples.items()}
    return {"case": name, "bytes": num_bytes, "seconds": seconds, "ratio_to_copy": ratio, "met": met}


def main() -> int:
    """Runs all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="The kernels on a real GPU: right, within bounds, fast?")
    parser.add_argument("--conformance-only", nargs="*", metavar="PART", help="of the cases' names")
    parser.add_argument("--out-of-bounds", action="store_true", help="only a kernel that is wrong on purpose")
    options = parser.parse_args()
    if options.out_of_bounds:
        write_out_of_bounds()
        return 0
    cases = [*PAGED_ATTENTION, Case("71 heads on one", (129, 64), q_heads=71, kv_heads=1, dtype="bfloat16")]
    if options.conformance_only is not None:
        parts = options.conformance_only or [""]
        chosen = [case for case in cases if any(part in case.name for part in parts)]
        return 1 if conformance(chosen) + write_conformance() else 0
    device = jax.devices()[0]
    if HAS_GPU:
        print(f"on {device.device_kind}, JAX {jax.__version__}")
    else:
        print("There is no GPU here, so nothing below was run on one. A rehearsal, kernels interpreted:")
        cases = cases[::8]
    failures = conformance(cases) + write_conformance()
    print(f"conformance: {len(cases)} cases on 2 backends, {len(failures)} wrong results")
    sanitizer = memcheck()
    print(f"memcheck: {sanitizer}")
    rows = speed()
    sound = not failures and (sanitizer == "clean" or sanitizer.startswith("not run"))
    publish(
        "gpu",
        {"on_gpu": HAS_GPU, "failures": failures, "memcheck": sanitizer, "rows": rows},
        keep=HAS_GPU,
    )
    return 0 if sound and all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
