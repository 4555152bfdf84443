"""The kernels against NumPy float64: what `check_gpu` runs first. A seed gives the same inputs again.

    python -m tests.gpu.conformance [--cases PART ...] [--seed N ...] [--share K/N] [--only WHAT]

Exit status: 0, or 1 where a result is wrong. The last line of output is one JSON document.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from pallas_kernels import formats, reference
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton.tuning import lacks as lacks_attention
from pallas_kernels.paged_attention.triton.tuning import lacks_mass
from pallas_kernels.reference.cases import PAGED_ATTENTION, TOLERANCE, Arguments, Case, make

HAS_GPU = jax.default_backend() == "gpu"
CASES = [*PAGED_ATTENTION, Case("71 heads on one", (129, 64), q_heads=71, kv_heads=1, dtype="bfloat16")]
WRITTEN = "float32", "bfloat16", "float16", "int8", "uint8", "int32"


def conformance(cases: Sequence[Case], seeds: Sequence[int] = (0,)) -> list[dict]:
    """Runs every case on every backend, into memory filled with NaN beforehand; returns what failed."""
    runs = (_run(case, backend, seeds) for case in cases for backend in ("xla", "triton"))
    return [failure for failures in runs for failure in failures]


def _run(case: Case, backend: str, seeds: Sequence[int]) -> list[dict]:
    """One program, with each seed's inputs; nothing where the device lacks something."""
    first = make(case)
    no_attention, no_mass = lacking(*first.arrays[:2]) if backend == "triton" else (None, None)
    if no_attention:
        print(f"{case.name} is left to the xla backend: no {no_attention}")
        return []
    if no_mass:
        print(f"{case.name}: its mass is left to the xla backend: no {no_mass}")
    failures, compiled = [], None
    for seed in seeds:
        arguments = make(case, seed)
        given = jax.block_until_ready(on_device(arguments))
        try:
            compiled = compiled or program(case, backend, mass=not no_mass).lower(*given).compile()
            _poison(compiled)
            found = _differences(case, arguments, jax.block_until_ready(compiled(*given)))
        except Exception as error:  # One that does not compile or run is no reason to stop the others.
            found = [{"what": f"{type(error).__name__}: {str(error)[:500]}"}]
        failures += [{"case": case.name, "backend": backend, "seed": seed, **one} for one in found]
    for failure in failures:
        print(f"WRONG: {failure}", flush=True)
    return failures


def on_device(arguments: Arguments) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """The arguments of a `program`: arrays by position, and by name."""
    options = arguments.options.items()
    return arguments.arrays, {name: jnp.asarray(it) for name, it in options if isinstance(it, np.ndarray)}


def program(case: Case, backend: str, *, mass: bool) -> Any:
    """A case's call, of `(out, lse)` or `(out, lse, mass)`; the same for every seed."""
    options = make(case).options.items()
    static = {name: option for name, option in options if not isinstance(option, np.ndarray)}
    static |= {"layer": case.layer, "backend": backend, "interpret": backend != "xla" and not HAS_GPU}
    results = _attention_and_mass if mass else _attention
    return jax.jit(lambda arrays, more: results(*arrays, **more, **static))


def _differences(case: Case, arguments: Arguments, got: Sequence[jax.Array]) -> list[dict]:
    """Of out, lse and mass, those whose error against float64 is too large."""
    rows = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    q, pages, options = arguments.q, (arguments.k_pages, arguments.v_pages), arguments.options
    out, lse = reference.paged_attention(q, *pages, *rows, layer=case.layer, **options)
    mass = reference.attention_mass(q, pages[0], *rows, layer=case.layer, **options)
    wanted = {
        "out": (out, TOLERANCE[case.dtype]),
        # Four-bit keys are decoded to q's dtype before they meet q.
        "lse": (lse, TOLERANCE[case.dtype if case.stored == "int32" else "float32"]),
        # What a token received from many queries is a sum, and so is its rounding.
        "mass": (mass, TOLERANCE["float32"] * max(1.0, mass.max())),
    }
    found = []
    for (name, (want, tolerance)), result in zip(wanted.items(), got, strict=False):
        one = np.asarray(result).astype(np.float64)
        if not np.allclose(one, want, rtol=tolerance, atol=tolerance * case.magnitude):
            off = np.abs(one - want)[np.isfinite(want)].max(initial=0.0)
            found.append({"what": name, "off": float(off), "tolerance": float(tolerance)})
    return found


def lacking(q, k_pages) -> tuple[str | None, str | None]:
    """What this device lacks for the kernel of attention, and for that of its mass."""
    device, storage = Device.current(), formats.of(k_pages.dtype)
    return lacks_attention(device, q, storage), lacks_mass(device, q, storage)


def _attention(*arrays, **options):
    """`(out, lse)`."""
    return pallas_kernels.paged_attention(*arrays, return_lse=True, **options)


def _attention_and_mass(q, k_pages, v_pages, page_table, kv_lengths, query_starts, **options):
    """`(out, lse, mass)`."""
    rows = page_table, kv_lengths, query_starts
    out, lse = _attention(q, k_pages, v_pages, *rows, **options)
    for name in ("v_scales", "sink_logits", "shared_prefix"):
        options.pop(name, None)
    return out, lse, pallas_kernels.attention_mass(q, k_pages, *rows, lse, **options)


def write_conformance(dtypes: tuple[str, ...] = WRITTEN, seed: int = 0) -> list[dict]:
    """Append, page copy and moves, with entries that must do nothing among them; returns what failed.

    Four-bit codes must be the reference's, bit for bit; others must stand for the same values.
    """
    failures = []
    for dtype in dtypes:
        # The same inputs, whichever other dtypes are tried.
        random = np.random.default_rng([seed, WRITTEN.index(dtype)])
        storage = formats.of(dtype)
        codes = storage.quantized
        values = jnp.bfloat16 if codes else jnp.dtype(dtype)
        k, v = random.normal(size=(2, 3, 40, 3, 7, 80)).astype(jnp.float32 if codes else values)
        pool = reference.encode(k, v, np.dtype(dtype)) if codes else (k, v)
        lacking = storage.lacks(Device.current(), row_size=4) if HAS_GPU else None
        if lacking:
            print(f"writes of {dtype} are left to the xla backend: no {lacking}")
        k, v = random.normal(size=(2, 33, 3, 80)).astype(values)
        page = np.where(np.arange(33) % 5 == 4, 40, random.permutation(40)[:33]).astype(np.int32)
        offset = random.integers(0, 7, size=33).astype(np.int32)
        sources, destinations = np.arange(20, dtype=np.int32), np.arange(20, 40, dtype=np.int32)
        destinations[::3] = 40
        calls = {
            "append_kv": ((k, v, page, offset), {"layer": 1}),
            "copy_pages": ((sources, destinations), {}),
            # One long cycle, and two pages that are exchanged.
            "move_pages": ((np.r_[1:30, 0, 31, 30, 32:40].astype(np.int32),), {}),
        }
        for name, (arguments, options) in calls.items():
            scales = dict(zip(("k_scales", "v_scales"), pool[2:], strict=False))
            want = getattr(reference, name)(*pool[:2], *arguments, **scales, **options)
            near = name == "append_kv" and codes and storage.name != "int4"
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
    """Codes and scales that stand for the same values, but for how a half is rounded."""
    got = [np.asarray(array) for array in got]
    values = [
        [reference.dequantize(codes, scales) for codes, scales in zip(pool[:2], pool[2:], strict=True)]
        for pool in (got, want)
    ]
    return all(np.allclose(one, other, rtol=0.13, atol=0.03) for one, other in zip(*values, strict=True))


def _poison(compiled) -> None:
    """Fills more memory than a program takes with NaN, in pieces of many sizes, and gives it back."""
    memory = compiled.memory_analysis()
    most = max(2**20, 2 * (memory.temp_size_in_bytes + memory.output_size_in_bytes))
    sizes = [most >> shift for shift in range(10)]
    jax.block_until_ready([jnp.full(max(1, size // 4), jnp.nan, jnp.float32) for size in sizes])


def main() -> int:
    """Runs a share of the cases, and of the writes; returns the exit status."""
    parser = argparse.ArgumentParser(description="The kernels against NumPy float64.")
    parser.add_argument("--cases", nargs="+", default=[""], metavar="PART", help="of the cases' names")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--share", default="1/1", metavar="K/N", help="the K-th of N shares of the work")
    parser.add_argument("--only", choices=("attention", "writes"))
    options = parser.parse_args()
    nth, shares = map(int, options.share.split("/"))
    chosen = [case for case in CASES if any(part in case.name for part in options.cases)]
    chosen = [] if options.only == "writes" else chosen
    written = () if options.only == "attention" else WRITTEN
    failures = conformance(chosen[nth - 1 :: shares], options.seed)
    for seed in options.seed:
        failures += write_conformance(written[nth - 1 :: shares], seed)
    print(json.dumps({"failures": failures}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
