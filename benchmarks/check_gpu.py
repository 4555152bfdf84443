"""The kernels on a real GPU: are they right, do they stay within bounds?

  conformance   Every case of the tests, each backend against NumPy float64, with the memory that the
                outputs will get filled with NaN beforehand; and the operations that write.
  memcheck      A few of them again under `compute-sanitizer`, where it is installed, and a kernel that
                it must catch.

`bench_attention` says how fast they are. Without a GPU it says so, and rehearses: some of the cases, the
kernels interpreted.

    python -m benchmarks.check_gpu [--conformance-only [PART ...]]

Exit status: 0, or 1 where a result is wrong. The last line of output is one JSON document, which a GPU's run
also leaves under `benchmarks/results/`.
"""

import argparse
import os
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu

import pallas_kernels
from benchmarks.timing import publish
from pallas_kernels.device import Device, lacks_dtype
from pallas_kernels.launch import launch
from pallas_kernels.paged_attention.tuning import lacks, lacks_mass
from pallas_kernels.quantization import is_quantized
from tests.kernels import reference
from tests.kernels.cases import PAGED_ATTENTION, TOLERANCE, Case, make

HAS_GPU = jax.default_backend() == "gpu"


def conformance(cases: list[Case]) -> list[dict]:
    """Runs every case on every backend; returns what failed."""
    failures = []
    for case in cases:
        arguments = make(case)
        rows = arguments.page_table, arguments.kv_lengths, arguments.query_starts
        pages = arguments.k_pages, arguments.v_pages
        q, options = arguments.q, {"layer": case.layer, **arguments.options}
        want = (
            *reference.paged_attention(q, *pages, *rows, **options),
            reference.attention_mass(q, pages[0], *rows, **options),
        )
        # What a place received from many queries is a sum, and so is its rounding.
        tolerances = (
            TOLERANCE[case.dtype],
            TOLERANCE["float32"],
            TOLERANCE["float32"] * max(1.0, want[2].max()),
        )
        for backend in ("xla", "triton"):
            arrays = jax.block_until_ready(arguments.arrays)
            if backend == "triton" and (reason := _lacks(*arrays[:2])):
                print(f"{case.name} is left to the xla backend: no {reason}")
                continue
            where = {"backend": backend, "interpret": backend != "xla" and not HAS_GPU}
            run = jax.jit(partial(_attention_and_mass, **options, **where))
            compiled = run.lower(*arrays).compile()
            _poison(compiled)
            got = compiled(*arrays)
            for name, one, other, tolerance in zip(
                ("out", "lse", "mass"), got, want, tolerances, strict=True
            ):
                one = np.asarray(one).astype(np.float64)
                if not np.allclose(one, other, rtol=tolerance, atol=tolerance * case.magnitude):
                    failures.append({"case": case.name, "backend": backend, "what": name})
                    print(f"WRONG: {case.name}, {backend}, {name}", flush=True)
    return failures


def _lacks(q, k_pages) -> str | None:
    device = Device.current()
    return lacks(device, q.shape[2], q, k_pages) or lacks_mass(device, k_pages, q)


def _attention_and_mass(q, k_pages, v_pages, page_table, kv_lengths, query_starts, **options):
    """`(out, lse, mass)`."""
    rows = page_table, kv_lengths, query_starts
    out, lse = pallas_kernels.paged_attention(q, k_pages, v_pages, *rows, return_lse=True, **options)
    for name in ("v_scales", "sinks", "shared_prefix"):
        options.pop(name, None)
    return out, lse, pallas_kernels.attention_mass(q, k_pages, *rows, lse, **options)


def write_conformance() -> list[dict]:
    """Append, page copy and moves against NumPy, with entries that must do nothing among them."""
    random, failures = np.random.default_rng(0), []
    for dtype in ("float32", "bfloat16", "float16", "int8", "uint8"):
        codes = is_quantized(dtype)
        if codes and HAS_GPU and (reason := lacks_dtype(Device.current(), jnp.zeros((1, 4), dtype))):
            print(f"writes of {dtype} are left to the xla backend: no {reason}")
            continue
        pool = random.normal(size=(2, 3, 40, 3, 7, 80)).astype(jnp.float32 if codes else jnp.dtype(dtype))
        pool = tuple(pool)
        if codes:
            (k_codes, k_scales), (v_codes, v_scales) = (reference.quantize(pages, dtype) for pages in pool)
            pool = k_codes, v_codes, k_scales, v_scales
        k, v = random.normal(size=(2, 33, 3, 80)).astype(jnp.bfloat16 if codes else jnp.dtype(dtype))
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
            scales = dict(zip(("k_scales", "v_scales"), pool[2:], strict=False))
            want = getattr(reference, name)(*pool[:2], *arguments, **scales, **options)
            for backend in ("xla", "triton"):
                interpret = backend != "xla" and not HAS_GPU
                call = partial(getattr(pallas_kernels, name), backend=backend, interpret=interpret, **options)

                def run(k_pages, v_pages, scales, arguments, call=call):
                    return call(k_pages, v_pages, *arguments, **scales)

                on_device = jax.tree.map(jnp.array, (*pool[:2], scales))
                got = jax.jit(run, donate_argnums=(0, 1, 2))(*on_device, arguments)
                same = _near(got, want) if name == "append_kv" and codes else _equal(got, want)
                if not same:
                    failures.append({"case": f"{name} {dtype}", "backend": backend, "what": "pool"})
                    print(f"WRONG: {name} {dtype}, {backend}", flush=True)
    return failures


def _equal(got, want) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(got, want, strict=True))


def _near(got, want) -> bool:
    """Codes and scales that stand for the same numbers, but for how a half is rounded."""
    got = [np.asarray(array) for array in got]
    numbers = [
        [reference.dequantize(codes, scales) for codes, scales in zip(pool[:2], pool[2:], strict=True)]
        for pool in (got, want)
    ]
    return all(np.allclose(one, other, rtol=0.13, atol=0.03) for one, other in zip(*numbers, strict=True))


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
    ours = run("--conformance-only", "window over", "rows of no", "71", "prefill and", "samples")
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


def main() -> int:
    """Runs all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="The kernels on a real GPU: right, within bounds?")
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
    sound = not failures and (sanitizer == "clean" or sanitizer.startswith("not run"))
    publish(
        "gpu",
        {"on_gpu": HAS_GPU, "failures": failures, "memcheck": sanitizer},
        keep=HAS_GPU,
    )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
