"""Machine code of every kernel for every GPU it is meant for, with no GPU at hand.

Each kernel is lowered by Pallas for CUDA and for ROCm, compiled by Triton for the targets below, and what
came out is read:

  registers    of a thread.
  spills       bytes (CUDA) or registers (ROCm) that did not fit and went to memory.
  shared       bytes of shared memory of a program.
  matrix       matrix instructions (mma, wgmma, mfma, wmma).
  16-byte      loads of 16 bytes from global memory.
  in flight    CUDA: bytes of K and V under way for a multiprocessor while it computes: programs resident at
               once, by registers, shared memory and warps, times the copies a program does not wait for; what
               pads a row does not count.

Bars: no spills anywhere; no more shared memory than a program may have; matrix instructions wherever
attention is computed, and 16-byte loads for at least the whole of a tile of K and of V; 16-byte loads where
pages are copied; at least 40 KB in flight on CUDA in decode with up to 32 query rows
a KV head, which is bound by memory.

Kernels that are wrong on purpose are compiled too: a bar that passes one of them is no bar.

    python -m benchmarks.check_targets [--only NAME ...] [--target NAME ...]

It needs the `triton` package. Exit status: 0, or 1 where a bar is missed. The last line of output is one
JSON document.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

import pallas_kernels
from pallas_kernels import formats
from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import rows as attention_rows
from pallas_kernels.paged_attention.triton.tuning import choose, choose_mass, choose_shared, lacks, lacks_mass
from pallas_kernels.sizes import next_power_of_two

BYTES_IN_FLIGHT = 40 * 1024
KIB = 1024
MEASURED = {
    "cuda": {"spills", "matrix", "wide loads", "shared memory", "in flight"},
    "hip": {"spills", "matrix", "wide loads"},
}
COLUMNS = "registers", "spills", "shared", "matrix", "16-byte", "in flight"


@dataclass(frozen=True)
class Target:
    """A GPU, as Triton names it, and what limits the programs resident on one multiprocessor."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    device: Device
    shared: int = 0
    registers: int = 65536
    warps: int = 64
    shared_of_a_program: int = 64 * KIB


TARGETS = (
    Target("sm_80", "cuda", 80, 32, Device("sm_80", 108), shared=164 * KIB, shared_of_a_program=163 * KIB),
    Target("sm_90", "cuda", 90, 32, Device("sm_90", 132), shared=228 * KIB, shared_of_a_program=227 * KIB),
    Target("sm_100", "cuda", 100, 32, Device("sm_100", 148), shared=228 * KIB, shared_of_a_program=227 * KIB),
    Target("gfx942", "hip", "gfx942", 64, Device("gfx942", 304)),
    Target("gfx950", "hip", "gfx950", 64, Device("gfx950", 256)),
    Target("gfx1100", "hip", "gfx1100", 32, Device("gfx1100", 96)),
)
# Device kinds that JAX may be told of, where it asks.
_DEVICE_KINDS = {"cuda": "NVIDIA H100", "rocm": "gfx942"}


@dataclass(frozen=True)
class Kernel:
    """A call to compile. `of` names the launches of it that are looked at."""

    name: str
    call: Callable
    shapes: tuple
    of: tuple[str, ...]
    bars: frozenset[str]
    head_dim: int = 0  # of attention
    quantized: bool = False
    lacks: Callable[[Device], str | None] = lambda _: None
    wide_loads: Callable[[Device], int] = lambda _: 1  # at least


@dataclass(frozen=True)
class Launch:
    """One launch of a call, as Pallas hands it to Triton, and what it is held to."""

    name: str
    ir: str
    warps: int
    stages: int
    kernel: str
    bars: frozenset[str]
    least_wide_loads: int
    unpadded: float  # share of a row that is not padding
    quantized: bool


@dataclass(frozen=True)
class Report:
    """What came out for one kernel and one target."""

    kernel: str
    launch: str
    target: str
    registers: int
    spills: int
    shared: int
    matrix: int
    wide_loads: int
    in_flight: int | None
    missed: tuple[str, ...]


def attention(
    name: str,
    *,
    q_heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bfloat16",
    q_dtype: str | None = None,
    page_size: int = 16,
    seqs: int = 64,
    tokens: int = 64,
    retuned: Mapping[str, int] = MappingProxyType({}),
    shared: bool = False,
    mass: bool = False,
    bars: tuple[str, ...] = ("spills", "matrix", "wide loads"),
    **options,
) -> Kernel:
    """A call of `paged_attention` on a pool that takes 64-bit offsets, as large ones do: the launch for each
    sequence's own places, or that for what they share."""
    storage = formats.of(dtype)
    pages = 2 ** (19 if storage.quantized else 17) // page_size
    pool = _pool(pages, kv_heads, page_size, head_dim, dtype)
    q = _shape((tokens, q_heads, head_dim), q_dtype or dtype)
    rows, vector = _shape((seqs, 8192 // page_size), "int32"), _shape((seqs,), "int32")

    def tuned(device, table=choose_shared if shared else choose_mass if mass else choose):
        shape: dict[str, Any] = dict(
            tokens=tokens, group=q_heads // kv_heads, head_dim=head_dim, storage=storage, q_dtype=q.dtype
        )
        return replace(table(device, seqs=seqs, **shape), **retuned)

    def call(device, *arrays):
        arrays, scales = arrays[:6], _scales_by_name(arrays[6:])
        tuning = {"tuning": tuned(device)}
        if mass:
            q, k, _, table, lengths, starts = arrays
            scales.pop("v_scales", None)
            arrays = q, k, table, lengths, starts, jnp.zeros(q.shape[:2])
            return pallas_kernels.attention_mass(*arrays, layer=7, **tuning, **scales, **options)
        if shared:
            tuning = {"tuning": tuned(device, choose), "shared_tuning": tuned(device)}
        return pallas_kernels.paged_attention(*arrays, layer=7, **tuning, **scales, **options)

    def wide_loads(device):
        """Of a tile of K and, but for the mass, one of V, by all threads together."""
        tuning, lanes = tuned(device), 64 if device.arch.startswith("gfx9") else 32
        tile = tuning.key_tile * next_power_of_two(pool.shape[-1]) * pool.dtype.itemsize
        return max(1, (1 if mass else 2) * tile // (16 * lanes * tuning.num_warps))

    return Kernel(
        name,
        call,
        (q, pool, pool, rows, vector, _shape((seqs + 1,), "int32"), *_scales(pool)),
        of=("paged_attention_shared" if shared else "paged_attention",),
        bars=frozenset(bars),
        head_dim=head_dim,
        quantized=storage.quantized,
        lacks=lambda device: (lacks_mass if mass else lacks)(device, q, storage),
        wide_loads=wide_loads,
    )


def mass(name: str, **options) -> Kernel:
    """A call of `attention_mass`, shaped like one of `attention`: a log-sum more a row, and no V."""
    whole = attention(name, mass=True, **options)
    # Log-sums of a tile of queries are few, and copied by fours as the scales of codes are.
    return replace(whole, of=("attention_mass",), quantized=True)


def merge(name: str, **options) -> Kernel:
    """The last launch of a decode step."""
    whole = attention(name, bars=("spills",), **options)
    return Kernel(whole.name, whole.call, whole.shapes, ("paged_attention_merge",), whole.bars)


def append(name: str, *, kv_heads: int, head_dim: int, dtype: str, pool_dtype: str) -> Kernel:
    """A call of `append_kv`."""
    pool = _pool(65536, kv_heads, 16, head_dim, pool_dtype)
    new, place = _shape((256, kv_heads, head_dim), dtype), _shape((256,), "int32")

    def call(_, *arrays):
        return pallas_kernels.append_kv(*arrays[:6], layer=7, **_scales_by_name(arrays[6:]))

    shapes = pool, pool, new, new, place, place, *_scales(pool)
    lacking = partial(_lacks_dtype, pool)
    return Kernel(name, call, shapes, ("append_kv",), frozenset({"spills"}), lacks=lacking)


def copy(name: str, *, dtype: str, page_size: int) -> Kernel:
    """A call of `copy_pages`."""
    pool = _pool(32768, 8, page_size, 128, dtype)

    def call(_, *arrays):
        return pallas_kernels.copy_pages(*arrays[:4], **_scales_by_name(arrays[4:]))

    shapes = pool, pool, _shape((64,), "int32"), _shape((64,), "int32"), *_scales(pool)
    return _mover("copy", name, call, shapes)


def move(name: str, *, dtype: str, page_size: int) -> Kernel:
    """A call of `move_pages`."""
    pool = _pool(32768, 8, page_size, 128, dtype)

    def call(_, *arrays):
        return pallas_kernels.move_pages(*arrays[:3], **_scales_by_name(arrays[3:]))

    shapes = pool, pool, _shape((32768,), "int32"), *_scales(pool)
    return _mover("move", name, call, shapes)


def _mover(verb: str, name: str, call: Callable, shapes: tuple) -> Kernel:
    lacking = partial(_lacks_dtype, shapes[0], converts=False)
    bars = frozenset({"spills", "wide loads"})
    return Kernel(name, call, shapes, (f"{verb}_pages",), bars, lacks=lacking)


def _lacks_dtype(pool, device: Device, *, converts: bool = True) -> str | None:
    return formats.of(pool.dtype).lacks(device, pool.shape[-1], converts=converts)


def kernels() -> list[Kernel]:
    """Every kernel and dtype class."""
    decode_bars = ("spills", "matrix", "wide loads", "in flight")
    decode = partial(attention, bars=decode_bars)
    return [
        decode("decode 32/8/128 bf16"),
        decode("decode 32/8/128 f16", dtype="float16"),
        decode("decode 32/8/128 f32", dtype="float32"),
        decode("decode 9/3/64 bf16", q_heads=9, kv_heads=3, head_dim=64),
        decode("decode 32/32/80 bf16", kv_heads=32, head_dim=80),
        decode("decode 32/32/96 bf16", kv_heads=32, head_dim=96),
        decode("decode 16/8/256 bf16", q_heads=16, head_dim=256),
        attention("decode 71/1/64 bf16", q_heads=71, kv_heads=1, head_dim=64),
        decode("decode, pages of 24", page_size=24),
        decode("decode, pages of 1", page_size=1),
        decode("decode, window softcap", window=1000, softcap=30.0),
        decode("decode 16/8/256 f32", q_heads=16, head_dim=256, dtype="float32"),
        attention("decode bf16 q, f32 pool", dtype="float32", q_dtype="bfloat16"),
        attention("16 tokens a sequence bf16", tokens=1024),
        attention("16 tokens a sequence f32", tokens=1024, dtype="float32"),
        attention("16 tokens, head_dim 256 f32", tokens=1024, head_dim=256, dtype="float32"),
        decode("decode 32/8/128 int8", dtype="int8", q_dtype="bfloat16"),
        decode("decode 32/8/128 fp8", dtype="uint8", q_dtype="bfloat16"),
        decode("decode 32/8/64 int8, f16 q", head_dim=64, dtype="int8", q_dtype="float16"),
        attention("decode int8, f32 q", dtype="int8", q_dtype="float32"),
        decode("decode 16/8/256 int8", q_heads=16, head_dim=256, dtype="int8", q_dtype="bfloat16"),
        attention("16 tokens a sequence int8", tokens=1024, dtype="int8", q_dtype="bfloat16"),
        attention("16 tokens a sequence fp8", tokens=1024, dtype="uint8", q_dtype="bfloat16"),
        decode("decode 32/8/128 int4", dtype="int32", q_dtype="bfloat16"),
        decode(
            "decode 9/3/64 int4, f16 q", q_heads=9, kv_heads=3, head_dim=64, dtype="int32", q_dtype="float16"
        ),
        attention(
            "decode 32/32/80 int4",
            kv_heads=32,
            head_dim=80,
            dtype="int32",
            q_dtype="bfloat16",
            bars=("spills", "matrix"),
        ),
        decode("decode 16/8/256 int4", q_heads=16, head_dim=256, dtype="int32", q_dtype="bfloat16"),
        attention("decode int4, f32 q", dtype="int32", q_dtype="float32"),
        attention("16 tokens a sequence int4", tokens=1024, dtype="int32", q_dtype="bfloat16"),
        attention("prefill 512 tokens int4", tokens=512, seqs=1, dtype="int32", q_dtype="bfloat16"),
        attention("prefill, 256 int4", tokens=8192, seqs=1, head_dim=256, dtype="int32", q_dtype="bfloat16"),
        attention("shared prefix int4", shared=True, dtype="int32", q_dtype="bfloat16"),
        decode("4 tokens a sequence bf16", tokens=256),
        attention("prefill 512 tokens bf16", tokens=512, seqs=1),
        attention("prefill 512 tokens f32", tokens=512, seqs=1, dtype="float32"),
        attention("prefill 512 tokens int8", tokens=512, seqs=1, dtype="int8", q_dtype="bfloat16"),
        attention("prefill 512 tokens fp8", tokens=512, seqs=1, dtype="uint8", q_dtype="bfloat16"),
        attention("prefill, head_dim 64", tokens=8192, seqs=1, head_dim=64),
        attention("prefill, head_dim 80", tokens=8192, seqs=1, head_dim=80, kv_heads=32),
        attention("prefill, head_dim 256", tokens=8192, seqs=1, head_dim=256),
        attention("prefill, 256 int8", tokens=8192, seqs=1, head_dim=256, dtype="int8", q_dtype="bfloat16"),
        attention("prefill, 64 fp8", tokens=8192, seqs=1, head_dim=64, dtype="uint8", q_dtype="float16"),
        attention("prefill, window softcap", tokens=8192, seqs=1, window=1000, softcap=30.0),
        attention("prefill and decode, f16", tokens=1024, seqs=32, dtype="float16"),
        attention("shared prefix bf16", shared=True),
        attention("shared prefix f32", shared=True, dtype="float32"),
        attention("shared prefix int8", shared=True, dtype="int8", q_dtype="bfloat16"),
        attention("shared prefix fp8", shared=True, dtype="uint8", q_dtype="bfloat16"),
        attention(
            "shared prefix 9/3/64 f16", shared=True, q_heads=9, kv_heads=3, head_dim=64, dtype="float16"
        ),
        decode("decode, window sink tokens", window=1000, sink_tokens=4),
        attention("prefill, window sink tokens", tokens=8192, seqs=1, window=1000, sink_tokens=4),
        mass("mass of decode bf16"),
        mass("mass of decode f32", dtype="float32"),
        mass("mass of decode 9/3/64 f16", q_heads=9, kv_heads=3, head_dim=64, dtype="float16"),
        mass("mass of decode 9/3/64 f32", q_heads=9, kv_heads=3, head_dim=64, dtype="float32"),
        mass("mass of decode 256 bf16", q_heads=16, head_dim=256),
        mass("mass of decode int8", dtype="int8", q_dtype="bfloat16"),
        mass("mass of decode fp8", dtype="uint8", q_dtype="bfloat16"),
        mass("mass, window sink tokens", window=1000, sink_tokens=4, softcap=30.0),
        mass("mass of prefill bf16", tokens=512, seqs=1),
        mass("mass of prefill f32", tokens=512, seqs=1, dtype="float32"),
        mass("mass of prefill 64 f32", tokens=512, seqs=1, head_dim=64, dtype="float32"),
        mass("mass of prefill 80 f16", tokens=512, seqs=1, head_dim=80, dtype="float16"),
        mass("mass of prefill 256 bf16", tokens=512, seqs=1, head_dim=256),
        mass("mass of prefill int8", tokens=512, seqs=1, dtype="int8", q_dtype="bfloat16"),
        mass("mass of prefill fp8", tokens=512, seqs=1, dtype="uint8", q_dtype="bfloat16"),
        merge("merge of partial results", seqs=1, tokens=1),
        merge("merge with what is shared"),
        append("append 8/128 bf16", kv_heads=8, head_dim=128, dtype="bfloat16", pool_dtype="bfloat16"),
        append("append 8/128 f32", kv_heads=8, head_dim=128, dtype="float32", pool_dtype="float32"),
        append("append 32/80 f32 to bf16", kv_heads=32, head_dim=80, dtype="float32", pool_dtype="bfloat16"),
        append("append bf16 to int8", kv_heads=8, head_dim=128, dtype="bfloat16", pool_dtype="int8"),
        append("append bf16 to fp8", kv_heads=8, head_dim=128, dtype="bfloat16", pool_dtype="uint8"),
        append("append 3/80 f32 to int8", kv_heads=3, head_dim=80, dtype="float32", pool_dtype="int8"),
        append("append bf16 to int4", kv_heads=8, head_dim=128, dtype="bfloat16", pool_dtype="int32"),
        copy("copy pages of 16 int4", dtype="int32", page_size=16),
        replace(
            move("move the scales of int4", dtype="int32", page_size=16),
            of=("move_scales",),
            bars=frozenset({"spills"}),
        ),
        copy("copy pages of 16 bf16", dtype="bfloat16", page_size=16),
        copy("copy pages of 7 f32", dtype="float32", page_size=7),
        copy("copy pages of 16 int8", dtype="int8", page_size=16),
        replace(
            copy("copy the scales of int8", dtype="int8", page_size=16),
            of=("copy_scales",),
            bars=frozenset({"spills"}),
        ),
        replace(
            move("move the scales of fp8", dtype="uint8", page_size=16),
            of=("move_scales",),
            bars=frozenset({"spills"}),
        ),
        move("move pages of 16 bf16", dtype="bfloat16", page_size=16),
        move("move pages of 7 f32", dtype="float32", page_size=7),
        move("move pages of 16 fp8", dtype="uint8", page_size=16),
    ]


def wrong_kernels() -> list[Kernel]:
    """Each must miss the one bar it is held to."""

    class Swapped(attention_rows.Rows):
        """Neighbours of a row trade places: right numbers, two bytes at a time."""

        def __init__(self, *arguments, **geometry):
            super().__init__(*arguments, **geometry)
            self.layout = replace(self.layout, word=self.layout.word ^ 1)
            self.dims = [dims ^ len(self.dims) for dims in self.dims]

    def swapped(honest: Kernel) -> Kernel:
        def call(device, *arrays):
            with mock.patch.object(attention_rows, "Rows", Swapped):
                return honest.call(device, *arrays)

        return replace(honest, call=call)

    return [
        swapped(attention("narrow loads", bars=("wide loads",))),
        swapped(attention("narrow loads of int8", bars=("wide loads",), dtype="int8", q_dtype="bfloat16")),
        attention("one tile at a time", bars=("in flight",), retuned={"num_stages": 1}),
        attention("too few threads", bars=("spills",), retuned={"key_tile": 256, "num_warps": 1}),
        attention("too many stages", bars=("shared memory",), retuned={"key_tile": 256, "num_stages": 5}),
        replace(copy("no matrix product", dtype="float32", page_size=16), bars=frozenset({"matrix"})),
    ]


def _scales(pool) -> tuple:
    """Of K and V, if the pool is one of codes."""
    storage = formats.of(pool.dtype)
    return tuple(_shape(shape, storage.scale_dtype) for shape in storage.scale_shapes(pool.shape))


def _pool(pages, kv_heads, page_size, head_dim, dtype):
    return _shape((32, pages, kv_heads, page_size, formats.of(dtype).row_size(head_dim)), dtype)


def _scales_by_name(scales) -> dict:
    return dict(zip(("k_scales", "v_scales"), scales, strict=False))


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def launches(kernel: Kernel, device: Device) -> Iterator[Launch]:
    """The launches of a call that are looked at."""
    with pallas_kernels.use_backend("triton"), pretend(device.platform):
        lowered = jax.jit(partial(kernel.call, device)).trace(*kernel.shapes)
        module = lowered.lower(lowering_platforms=(device.platform,)).compiler_ir("stablehlo")
    assert module is not None
    for operation in _walk(module.operation):
        if operation.name != "stablehlo.custom_call":
            continue
        if "triton" not in operation.attributes["call_target_name"].value:
            continue
        config = operation.attributes["mhlo.backend_config"]
        if config["name"].value in kernel.of:
            yield Launch(
                config["name"].value,
                _as_text(config["ir"].value_bytes),
                config["num_warps"].value,
                config["num_stages"].value,
                kernel.name,
                kernel.bars,
                kernel.wide_loads(device),
                kernel.head_dim / next_power_of_two(kernel.head_dim) if kernel.head_dim else 1.0,
                kernel.quantized,
            )


def pretend(platform: str):
    """JAX 0.11 and later ask what device they lower for."""
    try:
        from jax.sharding import AbstractDevice

        device = AbstractDevice(device_kind=_DEVICE_KINDS[platform], num_cores=None, platform="gpu")
    except (ImportError, TypeError):
        return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _walk(operation):
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _walk(inner.operation)


def _as_text(bytecode: bytes) -> str:
    from jax.interpreters.mlir import make_ir_context
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with make_ir_context() as context:
        dialect.register_dialect(context)
        return str(ir.Module.parse(bytecode))


def build(launch: Launch, target: Target) -> Report:
    """Compiles one launch for one target and reads what came out."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{launch.name}.ttir")
        path.write_text(launch.ir)
        compiled = triton.compile(
            str(path),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=dict(num_warps=launch.warps, num_stages=launch.stages),
        )
        shared = compiled.metadata.shared
        if target.backend == "cuda":
            # Scales of a tile of codes are few, and copied by fours.
            sizes = "8" if launch.quantized else "48"
            narrow = rf"cp\.async\.c[ag]\.shared\.global[^;]*, 0x[{sizes}]\b"
            narrow = len(re.findall(narrow, compiled.asm["ptx"]))
            numbers = _read_ptx(compiled.asm["ptx"], target, launch, shared, Path(folder))
        else:
            narrow = 0
            numbers = _read_amdgcn(compiled.asm["amdgcn"])
    held = {
        "spills": numbers["spills"] == 0,
        "matrix": numbers["matrix"] > 0 or not _has_matrix_units(target, launch.kernel),
        "wide loads": numbers["wide_loads"] >= launch.least_wide_loads and not narrow,
        "shared memory": shared <= target.shared_of_a_program,
        "in flight": numbers["in_flight"] is None or numbers["in_flight"] >= BYTES_IN_FLIGHT,
    }
    missed = tuple(bar for bar in sorted(launch.bars | {"shared memory"}) if not held[bar])
    return Report(launch.kernel, launch.name, target.name, shared=shared, missed=missed, **numbers)


def _has_matrix_units(target: Target, kernel: str) -> bool:
    # RDNA 3 multiplies 16-bit matrices only.
    return not (target.name == "gfx1100" and "f32" in kernel)


def _read_ptx(ptx: str, target: Target, launch: Launch, shared: int, folder: Path) -> dict:
    import triton  # pyright: ignore[reportMissingImports]

    path = folder / "kernel.ptx"
    path.write_text(ptx)
    tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
    arch = _find(r"\.target (sm_\w+)", ptx)
    ptxas = tools / ("ptxas-blackwell" if target.name == "sm_100" else "ptxas")
    run = subprocess.run(
        [ptxas, "-v", f"--gpu-name={arch}", path, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    registers = int(_find(r"Used (\d+) registers", run.stderr))
    resident = min(
        target.registers // (launch.warps * 32 * -(-registers // 8) * 8),
        target.shared // (shared + KIB),
        target.warps // launch.warps,
    )
    return dict(
        registers=registers,
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", run.stderr))),
        matrix=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx)),
        wide_loads=len(
            re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10|ld\.global\S*\.v4\.b32", ptx)
        ),
        in_flight=int(resident * _copies_not_waited_for(ptx, launch.warps) * launch.unpadded),
    )


def _copies_not_waited_for(ptx: str, warps: int) -> int:
    """Bytes of 16-byte copies that a program leaves under way where it waits for the ones it needs."""
    most, group, sizes = 0, [], []
    for line in ptx.splitlines():
        if "cp.async.c" in line and "0x10" in line:
            group.append(16 * 32 * warps)
        elif "cp.async.commit_group" in line:
            sizes.append(sum(group))
            group = []
        elif wait := re.search(r"cp\.async\.wait_group\s+(\d+)", line):
            under_way = int(wait[1])
            most = max(most, sum(sizes[-under_way:]) if under_way else 0)
    return most


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output holds no {pattern}")
    return found[1]


def _read_amdgcn(code: str) -> dict:
    def number(pattern: str) -> int:
        return int(_find(pattern, code))

    return dict(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        # Scalar registers spill to vector ones, which costs no memory.
        spills=number(r"\.vgpr_spill_count:\s+(\d+)") + number(r"ScratchSize:\s+(\d+)"),
        matrix=len(re.findall(r"\bv_(?:mfma|wmma|smfmac)", code)),
        wide_loads=len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128|lds_dwordx4)", code)),
        in_flight=None,
    )


def compile_all(
    kernels: list[Kernel], targets: list[Target], compilers: Mapping[str, Executor]
) -> Iterator[Report]:
    """Every kernel for every target, in that order."""
    futures = []
    for kernel in kernels:
        for target in targets:
            if reason := kernel.lacks(target.device):
                print(f"{kernel.name} is left to the xla backend on {target.name}: no {reason}")
                continue
            found = list(launches(kernel, target.device))
            if not found:
                raise RuntimeError(f"{kernel.name} launches none of {kernel.of}")
            futures += [compilers[target.name].submit(build, launch, target) for launch in found]
    print(_line("kernel", "target", *COLUMNS, ""))
    return (future.result() for future in futures)


def show(report: Report, verdict: str) -> None:
    """A line of the table."""
    flight = "-" if report.in_flight is None else f"{report.in_flight // KIB} KB"
    numbers = report.registers, report.spills, report.shared, report.matrix, report.wide_loads, flight
    print(_line(report.kernel, report.target, *numbers, verdict), flush=True)


def main() -> int:
    """Compiles everything, prints the table, and says whether the bars hold."""
    parser = argparse.ArgumentParser(description="Compiles every kernel for every target.")
    parser.add_argument("--only", nargs="+", default=[""], help="kernels whose name contains one of these")
    parser.add_argument("--target", nargs="+", default=[target.name for target in TARGETS])
    arguments = parser.parse_args()
    chosen = [kernel for kernel in kernels() if any(part in kernel.name for part in arguments.only)]
    targets = [target for target in TARGETS if target.name in arguments.target]
    if not chosen or len(targets) < len(set(arguments.target)):
        parser.error("no such kernel or target")
    reports, passed = [], []
    with ExitStack() as stack:
        # A process for each target: the AMD compiler keeps some of what it learned of one GPU for the next.
        compilers = {
            target.name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for target in TARGETS
        }
        print("must be caught")
        for platform in ("cuda", "hip"):
            wrong = [kernel for kernel in wrong_kernels() if kernel.bars <= MEASURED[platform]]
            one = next(target for target in TARGETS if target.backend == platform)
            for kernel, report in zip(wrong, compile_all(wrong, [one], compilers), strict=True):
                caught = kernel.bars <= set(report.missed)
                show(report, f"caught: {', '.join(kernel.bars)}" if caught else "PASSED")
                passed += [] if caught else [report]
        print("\nmust hold")
        for report in compile_all(chosen, targets, compilers):
            show(report, "MISSED: " + ", ".join(report.missed) if report.missed else "ok")
            reports.append(report)
    missed = [report for report in reports if report.missed]
    print(f"\n{len(reports)} compiled, {len(missed)} miss a bar; {len(passed)} wrong ones passed")
    print(json.dumps({"benchmark": "targets", "reports": [asdict(report) for report in reports]}))
    return 1 if missed or passed else 0


def _line(*cells) -> str:
    kernel, target, *numbers, verdict = cells
    return f"{kernel:<26} {target:<8}" + "".join(f"{number!s:>10}" for number in numbers) + f"  {verdict}"


if __name__ == "__main__":
    sys.exit(main())
