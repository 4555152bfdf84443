"""What `bench_attention` compares with: attention on dense caches, JAX's own kernel, and PyTorch's.

A baseline is prepared from a problem's arrays, in whatever layout it wants, outside the clock. It raises
`Absent` to say why it cannot run.
"""

import functools
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.tune.implementation import HAS_GPU, LONGER, Implementation, of_jax, of_one_call
from jaxkv.tune.problems import Arrays, Problem
from pallas_kernels import formats


class Absent(Exception):
    """A baseline cannot run this problem here; the message says why."""


def dot_product(
    problem: Problem, arrays: Arrays, *, implementation: Literal["cudnn"] | None = None
) -> Implementation:
    """`jax.nn.dot_product_attention` on a dense cache, padded to the longest sequence."""
    q, k, v, mask = _dense(problem, arrays)
    causal, masked = _masking(problem)
    if implementation is not None and problem.stored not in ("bfloat16", "float16"):
        raise Absent(f"{implementation} does not take {problem.stored}")

    def attend(layer, q, kv, mask):
        k, v = (array[layer] for array in kv)
        options: dict[str, Any] = dict(is_causal=causal, mask=mask if masked else None)
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **options)

    return of_jax(attend, problem, q, (tuple(k), tuple(v)), mask, unpad=partial(_unpad, problem))


def heads_major(problem: Problem, arrays: Arrays, *, transposed: bool) -> Implementation:
    """Two einsums by hand on a dense cache `[seqs, kv_heads, tokens, head_dim]`, K perhaps transposed."""
    if problem.kind == "prefill":
        raise Absent("it is for decode")
    q, k, v, mask = _dense(problem, arrays)
    q_heads, kv_heads, head_dim = problem.heads
    seqs, queries = q.shape[:2]
    q = q.reshape(seqs, queries, kv_heads, q_heads // kv_heads, head_dim)
    k = k.transpose((0, 1, 3, 4, 2) if transposed else (0, 1, 3, 2, 4))
    v = v.transpose(0, 1, 3, 2, 4)

    def attend(layer, q, kv, mask):
        k, v = (array[layer] for array in kv)
        scores = jnp.einsum("bqhgd,bhdt->bhqgt" if transposed else "bqhgd,bhtd->bhqgt", q, k) * head_dim**-0.5
        scores = jnp.where(mask[:, :, :, None], scores.astype(jnp.float32), -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqgt,bhtd->bqhgd", weights, v).astype(q.dtype)

    def unpad(out):
        return _unpad(problem, out.reshape(seqs, queries, q_heads, head_dim))

    return of_jax(attend, problem, q, (tuple(k), tuple(v)), mask, unpad=unpad)


def jax_own(problem: Problem, arrays: Arrays) -> Implementation:
    """JAX's paged attention for GPUs, on pools in the layout that it wants. It takes no scale."""
    if not HAS_GPU:
        raise Absent("it needs a GPU")
    if problem.kind == "prefill" or problem.stored != problem.dtype:
        raise Absent("it is for decode of floats")
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    pools = [tuple(pages.swapaxes(1, 2)) for pages in arrays[1:3]]
    table = jnp.clip(arrays.page_table, 0, arrays.k_pages.shape[1] - 1)
    # It visits pages by sixteens.
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % 16)))

    def attend(layer, q, pools, table, lengths):
        k, v = (pool[layer] for pool in pools)
        return paged_attention(q * problem.heads[2] ** -0.5, k, v, table, lengths)

    return of_jax(attend, problem, arrays.q, pools, table, arrays.kv_lengths)


def torch_sdpa(problem: Problem, arrays: Arrays) -> Implementation:
    """PyTorch's `scaled_dot_product_attention` on a dense cache, padded to the longest sequence."""
    if not importlib.util.find_spec("torch"):
        raise Absent("not installed")
    import torch  # pyright: ignore[reportMissingImports]
    import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

    device = "cuda" if HAS_GPU else "cpu"
    if HAS_GPU and not torch.cuda.is_available():
        raise Absent("PyTorch sees no GPU")
    q, k, v, mask = _dense(problem, arrays)
    causal, masked = _masking(problem)

    def to_torch(array):
        values = torch.from_numpy(np.array(array, np.float32))
        return values.to(device, torch.bfloat16 if problem.dtype == "bfloat16" else torch.float32)

    # [.., heads, tokens, head_dim]
    q, k, v = (to_torch(array).transpose(-2, -3).contiguous() for array in (q, k, v))
    mask = torch.from_numpy(np.array(mask)).to(device)

    def attend(layer):
        options = dict(is_causal=causal, attn_mask=mask if masked else None)
        return F.scaled_dot_product_attention(q, k[layer], v[layer], enable_gqa=True, **options)

    def unpad(out):
        return _unpad(problem, out.transpose(1, 2).float().cpu().numpy())

    return of_torch(attend, problem, unpad)


def of_torch(attend: Callable[[int], Any], problem: Problem, unpad: Callable[[Any], Any]) -> Implementation:
    """`attend(layer)` returns a tensor. On a GPU the calls are recorded once and replayed, as servers do:
    launching each from Python may take longer than it runs. What is checked is what is timed."""
    import torch  # pyright: ignore[reportMissingImports]

    def run(calls: int):
        for call in range(1, calls):
            attend(-call % problem.layers)
        return attend(0)

    @functools.cache
    def recorded(calls: int):
        return _recorded(partial(run, calls)) if HAS_GPU else partial(run, calls)

    # The longer of the two that are timed.
    longest = problem.layers * (LONGER if HAS_GPU else 1)

    @torch.inference_mode()
    def check():
        recorded(longest)().zero_()  # a recording without the kernels would leave it so
        return unpad(recorded(longest)())

    @torch.inference_mode()
    def seconds(calls: int) -> float:
        if HAS_GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        recorded(calls)()
        if HAS_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return Implementation(check, lambda: of_one_call(seconds, problem.layers))


def _recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, or as it is where it cannot be recorded."""
    import torch  # pyright: ignore[reportMissingImports]

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # Of this thread alone: JAX's own may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()
    except Exception as error:
        print(f"  launched from Python, for it cannot be recorded: {str(error)[:120]!r}")
        return run

    def replay():
        graph.replay()
        return out

    return replay


def _masking(problem: Problem) -> tuple[bool, bool]:
    """Whether dense attention is causal here, and whether it needs a mask; neither if every key is seen."""
    even = len(set(problem.lengths)) == 1
    causal = even and problem.lengths == problem.queries
    return causal, not (causal or (even and max(problem.queries) == 1))


def _dense(problem: Problem, arrays: Arrays):
    """Padded: q `[seqs, queries, q_heads, head_dim]`, K and V `[layers, seqs, tokens, kv_heads, head_dim]`,
    and which keys a query sees, `[seqs, 1, queries, tokens]`."""
    longest, asked_most = max(problem.lengths), max(problem.queries)
    seqs, kv_heads, head_dim = len(problem.lengths), *problem.heads[1:]
    gibibytes = 2 * problem.layers * seqs * longest * kv_heads * head_dim * 4 / 2**30
    if gibibytes > 4:
        raise Absent(f"its padded cache would take {gibibytes:.0f} GiB, more than 4")
    dense = jax.jit(_gathered, static_argnames=("longest", "asked_most", "dtype"))
    return dense(arrays, longest=longest, asked_most=asked_most, dtype=problem.dtype)


def _gathered(arrays: Arrays, *, longest: int, asked_most: int, dtype: str):
    """On the device: through a host's memory it would take longer than the benchmark."""

    def padded(pages, scales=None):
        # [layers, seqs, pages, kv_heads, page_size, head_dim]
        own = jnp.take(pages, arrays.page_table, axis=1, mode="clip")
        if scales is not None:
            scales = jnp.take(scales, arrays.page_table, axis=1, mode="clip")
            own = formats.of(own.dtype).decode(own, scales, dtype)
        tokens = own.swapaxes(3, 4).reshape(*own.shape[:2], -1, *own.shape[3:6:2])[:, :, :longest]
        real = jnp.arange(longest) < arrays.kv_lengths[:, None]
        return jnp.where(real[None, :, :, None, None], tokens, 0).astype(dtype)

    k, v = map(padded, arrays[1:3], *([arrays.scales] if arrays.scales else []))
    nth, asked = jnp.arange(asked_most), jnp.diff(arrays.query_starts)[:, None]
    q = jnp.take(arrays.q, arrays.query_starts[:-1, None] + nth, axis=0, mode="clip")
    q = jnp.where((nth < asked)[:, :, None, None], q, 0).astype(dtype)
    # Rows of padding see the first key: a softmax over nothing would be NaN.
    last = jnp.where(nth < asked, arrays.kv_lengths[:, None] - asked + nth, 0)
    return q, k, v, (jnp.arange(longest) <= last[:, :, None])[:, None]


def _unpad(problem: Problem, out) -> np.ndarray:
    rows = [np.asarray(out[seq, :asked], np.float32) for seq, asked in enumerate(problem.queries)]
    return np.concatenate(rows)
