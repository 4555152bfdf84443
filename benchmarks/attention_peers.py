"""Baselines of `bench_attention` on a GPU: FlashAttention-3, FlashInfer and vLLM's Triton kernel.

`make peers` brings them; none of their code is kept here. All read pages through a page table, and a shared
prefix as they read any pages.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_baselines import Absent, of_torch
from jaxkv.tune.implementation import HAS_GPU, Implementation, of_jax
from jaxkv.tune.problems import Arrays, Problem

# Triton's interpreter runs vLLM's kernel on a CPU: its results can be held to float64 there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# vLLM's: a grid of fewer programs is made larger by splitting each sequence into so many segments.
LEAST_PROGRAMS, SEGMENTS = 128, 16
# FlashInfer's scratch, in bytes. It recommends 128 MB; large batches may want more.
WORKSPACE = 384 * 2**20


def flash_attention_3(problem: Problem, arrays: Arrays) -> Implementation:
    """FlashAttention-3 through its binding to JAX, on pools in the layout that it wants.

    It splits sequences as often as it is told: what is fastest here is found outside the clock.
    """
    _require_gpu()
    kernels = _import("flash_attn3_jax")
    if jax.devices()[0].compute_capability != "9.0":
        raise Absent("it is compiled for sm_90")
    if problem.heads[2] != 128 or problem.dtype == "float32":
        raise Absent("it is compiled for head_dim 128, of 16 bits")
    _require_floats(problem)
    if len(set(problem.queries)) > 1:
        raise Absent("it wants as many queries of each sequence")
    splits = (1, 2, 4, 8, 16, 32) if max(problem.queries) == 1 else (1,)
    return min(_split(kernels, problem, arrays, splits), key=_seconds)


def _split(kernels: Any, problem: Problem, arrays: Arrays, splits: Sequence[int]) -> list[Implementation]:
    """FlashAttention-3 with each number of splits, over one copy of the pools `[pages, page_size, ..]`."""
    shape = len(problem.lengths), problem.queries[0], *arrays.q.shape[1:]

    def attend(num_splits, layer, q, pools, table, lengths):
        out = kernels.flash_mha_with_kvcache(
            q.reshape(shape),
            *(pool[layer] for pool in pools),
            cache_seqlens=lengths,
            page_table=table,
            softmax_scale=problem.heads[2] ** -0.5,
            is_causal=True,
            num_splits=num_splits,
        )
        return out.reshape(q.shape)

    pools = [tuple(pages.swapaxes(2, 3)) for pages in arrays[1:3]]
    rest = pools, jnp.asarray(_table(arrays)), arrays.kv_lengths
    return [of_jax(partial(attend, num), problem, arrays.q, *rest) for num in splits]


def _seconds(one: Implementation) -> float:
    one.seconds()  # compiles
    # Of differences, the least may be one whose shorter run was slow.
    return statistics.median(one.seconds() for _ in range(3))


def flashinfer(problem: Problem, arrays: Arrays) -> Implementation:
    """FlashInfer on our pool as it lies, its layout HND. What it plans on the host goes untimed."""
    _require_gpu()
    torch, package = _torch(), _import("flashinfer")
    _require_floats(problem)
    _require_compiler()
    q, *pools = (torch.from_dlpack(array) for array in arrays[:3])
    wrapper, out = _planned(package, problem, arrays), torch.empty_like(q)

    def attend(layer):
        return wrapper.run(q, tuple(pool[layer] for pool in pools), out=out)

    return of_torch(attend, problem, _values)


def _require_compiler() -> None:
    """FlashInfer compiles its kernels on first use."""
    if not shutil.which("ninja"):
        raise Absent("ninja is not on the PATH")
    try:
        toolkit = Path(_import("flashinfer.jit.cpp_ext").get_cuda_path())
    except RuntimeError as error:
        raise Absent(str(error)) from None
    if not (toolkit / "bin" / "nvcc").exists():
        raise Absent(f"there is no nvcc in {toolkit}")


def _planned(package: Any, problem: Problem, arrays: Arrays) -> Any:
    """FlashInfer's wrapper for decode, or the one for prefill, with its plan for all layers."""
    torch, (q_heads, kv_heads, _) = _torch(), problem.heads
    pages = [torch.from_numpy(array) for array in _page_lists(problem, np.asarray(arrays.page_table))]
    shape = *problem.heads, problem.page_size
    dtype = getattr(torch, problem.dtype)
    options = dict(q_data_type=dtype, kv_data_type=dtype, sm_scale=problem.heads[2] ** -0.5)
    if max(problem.queries) == 1:
        # With one query head a KV head there is nothing that tensor cores could share.
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(
            _workspace(), "HND", use_tensor_cores=q_heads > kv_heads
        )
        wrapper.plan(*pages, *shape, **options)
    else:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "HND")
        wrapper.plan(_int32(arrays.query_starts), *pages, *shape, causal=True, **options)
    return wrapper


def _page_lists(problem: Problem, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The page table as FlashInfer wants it: where each sequence's pages begin in a list, the list, and how
    many tokens lie in each last page."""
    counts = [-(-length // problem.page_size) for length in problem.lengths]
    starts = np.cumsum([0, *counts])
    pages = np.concatenate([row[:count] for row, count in zip(table, counts, strict=True)])
    last = np.array(problem.lengths) - (np.array(counts) - 1) * problem.page_size
    return starts.astype(np.int32), pages.astype(np.int32), last.astype(np.int32)


@functools.cache
def _workspace() -> Any:
    return _torch().zeros(WORKSPACE, dtype=_torch().uint8, device="cuda")


def vllm_triton(problem: Problem, arrays: Arrays) -> Implementation:
    """vLLM's kernel in Triton on our pool as it lies: it reads by strides. It takes our codes and scales too,
    one scale a token and KV head."""
    if not INTERPRETED:
        _require_gpu()
    torch, kernels = _torch(), _vllm()
    if problem.stored == "uint8" and HAS_GPU and torch.cuda.get_device_capability() < (8, 9):
        raise Absent("fp8 needs sm_89")
    q, k, v, *scales = map(torch.from_dlpack, (*arrays[:3], *arrays.scales))
    if problem.stored == "uint8":
        k, v = (codes.view(torch.float8_e4m3fn) for codes in (k, v))
    # [layers, pages, page_size, kv_heads, ..]; floats have no scales.
    names = "k", "v", "k_scale_cache", "v_scale_cache"
    pools = {name: pool.transpose(2, 3) for name, pool in zip(names, (k, v, *scales), strict=False)}
    modes = {"int8": "INT8_PER_TOKEN_HEAD", "uint8": "FP8_PER_TOKEN_HEAD"}
    rest = _vllm_arguments(problem, arrays, q.device)
    rest["kv_quant_mode"] = kernels.KVQuantMode[modes.get(problem.stored, "NONE")]
    out = torch.empty_like(q)

    def attend(layer):
        layers = {name: pool[layer] for name, pool in pools.items()}
        kernels.unified_attention(q=q, out=out, **layers, **rest)
        return out

    return of_torch(attend, problem, _values)


def _vllm_arguments(problem: Problem, arrays: Arrays, device: Any) -> dict[str, Any]:
    """What is the same for all layers."""
    q_heads, kv_heads, head_dim = problem.heads
    return dict(
        cu_seqlens_q=_int32(arrays.query_starts, device),
        max_seqlen_q=max(problem.queries),
        seqused_k=_int32(arrays.kv_lengths, device),
        max_seqlen_k=max(problem.lengths),
        softmax_scale=head_dim**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=_int32(_table(arrays), device),
        softcap=0,
        **dict.fromkeys(("q_descale", "k_descale", "v_descale")),
        **_segments(q_heads, LEAST_PROGRAMS // kv_heads, head_dim, device),
    )


def _segments(q_heads: int, most_seqs: int, head_dim: int, device: Any) -> dict[str, Any]:
    """When vLLM splits sequences, and its scratch for that."""
    torch = _torch()
    shape = most_seqs, q_heads, SEGMENTS
    scratch = partial(torch.empty, dtype=torch.float32, device=device)
    return dict(
        seq_threshold_3D=most_seqs,
        num_par_softmax_segments=SEGMENTS,
        softmax_segm_output=scratch((*shape, 1 << (head_dim - 1).bit_length())),
        softmax_segm_max=scratch(shape),
        softmax_segm_expsum=scratch(shape),
    )


@functools.cache
def _vllm() -> Any:
    """What holds `unified_attention`: a module of vLLM where it is installed, or the file of that name in
    `JAXKV_PEERS`, with stubs of what it imports."""
    name = "vllm.v1.attention.ops.triton_unified_attention"
    folder = Path(os.environ.get("JAXKV_PEERS", "."))
    if not importlib.util.find_spec("vllm"):
        if not (folder / "triton_unified_attention.py").exists():
            raise Absent("not installed")
        _stub_vllm(folder)
    return _import(name)


def _stub_vllm(folder: Path) -> None:
    """Enough of vLLM to import its two files from a folder."""
    torch, triton = _torch(), _import("triton")
    modes = ("NONE", "FP8_PER_TENSOR", "INT8_PER_TOKEN_HEAD", "FP8_PER_TOKEN_HEAD", "INT4_PER_TOKEN_HEAD")
    platform = SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_device_capability_family=lambda family: (
            HAS_GPU and torch.cuda.get_device_capability()[0] == family // 10
        ),
    )
    stubs: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": dict(VLLM_BATCH_INVARIANT=False),
        "vllm.logger": dict(init_logger=lambda name: SimpleNamespace(debug_once=lambda message: None)),
        "vllm.platforms": dict(current_platform=platform),
        "vllm.triton_utils": dict(triton=triton, tl=_import("triton.language")),
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.ops": dict(__path__=[str(folder)]),
        "vllm.v1.kv_cache_interface": dict(KVQuantMode=IntEnum("KVQuantMode", modes, start=0)),
    }
    for name, attributes in stubs.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        vars(module).update({"__path__": [], **attributes})
        sys.modules[name] = module


def _require_gpu() -> None:
    if not HAS_GPU:
        raise Absent("it needs a GPU")


def _require_floats(problem: Problem) -> None:
    if problem.stored != problem.dtype:
        raise Absent("it does not take our codes and scales")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent("not installed" if error.name == name else f"not installed: {error}") from None


def _torch() -> Any:
    torch = _import("torch")
    if HAS_GPU and not torch.cuda.is_available():
        raise Absent("PyTorch sees no GPU")
    return torch


def _table(arrays: Arrays) -> np.ndarray:
    """The page table with a page in every entry and spare columns: kernels read beyond a sequence's end."""
    table = np.clip(np.asarray(arrays.page_table), 0, arrays.k_pages.shape[1] - 1)
    return np.pad(table, ((0, 0), (0, 16 - table.shape[1] % 16)))


def _int32(array: Any, device: Any = "cpu") -> Any:
    return _torch().from_numpy(np.array(array, np.int32)).to(device)


def _values(out: Any) -> np.ndarray:
    return out.float().cpu().numpy()
