"""The kernels beside NumPy float64: what `check_gpu` runs first. A seed gives the same inputs again."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels.device import Device, lacks_dtype
from pallas_kernels.paged_attention.tuning import lacks, lacks_mass
from pallas_kernels.quantization import is_int4, is_quantized
from tests.kernels import reference
from tests.kernels.cases import PAGED_ATTENTION, TOLERANCE, Case, make

HAS_GPU = jax.default_backend() == "gpu"
CASES = [*PAGED_ATTENTION, Case("71 heads on one", (129, 64), q_heads=71, kv_heads=1, dtype="bfloat16")]
WRITTEN = "float32", "bfloat16", "float16", "int8", "uint8", "int32"


def conformance(cases: list[Case], seed: int = 0) -> list[dict]:
    """Runs every case on every backend, into memory filled with NaN beforehand; returns what failed."""
    failures = []
    for case in cases:
        arguments = make(case, seed)
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
                    failures.append({"case": case.name, "backend": backend, "what": name, "seed": seed})
                    print(f"WRONG: {case.name}, {backend}, {name}, seed {seed}", flush=True)
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


def write_conformance(dtypes: tuple[str, ...] = WRITTEN, seed: int = 0) -> list[dict]:
    """Append, page copy and moves, with entries that must do nothing among them; returns what failed.

    Four-bit codes must be the reference's, bit for bit; others stand for the same numbers.
    """
    random, failures = np.random.default_rng(seed), []
    for dtype in dtypes:
        codes = is_quantized(dtype)
        numbers = jnp.bfloat16 if codes else jnp.dtype(dtype)
        k, v = random.normal(size=(2, 3, 40, 3, 7, 80)).astype(jnp.float32 if codes else numbers)
        pool = reference.encode(k, v, np.dtype(dtype)) if codes else (k, v)
        lacking = lacks_dtype(Device.current(), jnp.zeros((1, 4), dtype)) if HAS_GPU else None
        if lacking:
            print(f"writes of {dtype} are left to the xla backend: no {lacking}")
        k, v = random.normal(size=(2, 33, 3, 80)).astype(numbers)
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
            near = name == "append_kv" and codes and not is_int4(dtype)
            for backend in ("xla",) if lacking else ("xla", "triton"):
                interpret = backend != "xla" and not HAS_GPU
                call = partial(getattr(pallas_kernels, name), backend=backend, interpret=interpret, **options)

                def run(k_pages, v_pages, scales, arguments, call=call):
                    return call(k_pages, v_pages, *arguments, **scales)

                on_device = jax.tree.map(jnp.array, (*pool[:2], scales))
                got = jax.jit(run, donate_argnums=(0, 1, 2))(*on_device, arguments)
                if not (_near if near else _equal)(got, want):
                    failures.append(
                        {"case": f"{name} {dtype}", "backend": backend, "what": "pool", "seed": seed}
                    )
                    print(f"WRONG: {name} {dtype}, {backend}, seed {seed}", flush=True)
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
