"""A program that computes a problem's attention: how it is checked, and how one layer of it is timed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

import pallas_kernels
from jaxkv.tune.problems import Arrays, Problem
from jaxkv.tune.timing import of_one_more, stopwatch
from pallas_kernels.paged_attention.triton.tuning import Tuning

HAS_GPU = jax.default_backend() == "gpu"
# Times over the layers, of the longer program on a GPU; the shorter goes over them once.
LONGER = 11


@dataclass(frozen=True)
class Implementation:
    """One way to compute a problem's attention, prepared outside the clock.

    Attributes:
      check: the result for layer 0, `[tokens, q_heads, head_dim]`.
      seconds: does the work and says how long one layer took.
    """

    check: Callable[[], Any]
    seconds: Callable[[], float]


def paged_attention(
    problem: Problem,
    arrays: Arrays,
    *,
    backend: str,
    shared_prefix: bool | None = None,
    tuning: Tuning | None = None,
) -> Implementation:
    """`pallas_kernels.paged_attention`."""
    scales = dict(zip(("k_scales", "v_scales"), arrays.scales, strict=False))
    options: dict[str, Any] = dict(backend=backend, shared_prefix=shared_prefix, tuning=tuning)

    def attend(layer, q, pages, rows, scales):
        return pallas_kernels.paged_attention(q, *pages, *rows, layer=layer, **options, **scales)

    return of_jax(attend, problem, arrays.q, arrays[1:3], arrays[3:6], scales)


def of_jax(attend, problem: Problem, q, *arguments, unpad=lambda out: out) -> Implementation:
    """`attend(layer, q, *arguments)`: several calls in one program, each waiting for the one before."""
    # Traced once for all calls.
    attend = jax.jit(attend, static_argnums=0)

    @partial(jax.jit, static_argnums=0)
    def run(calls, q, *arguments):
        for call in range(calls):
            q = (q + attend(call % problem.layers, q, *arguments)).astype(q.dtype)
        return q

    def seconds(calls: int) -> float:
        return stopwatch(run, calls, q, *arguments)[0]

    return Implementation(
        check=lambda: unpad(attend(0, q, *arguments)), seconds=lambda: of_one_call(seconds, problem.layers)
    )


def of_one_call(seconds: Callable[[int], float], layers: int = 1) -> float:
    """Seconds of one call, from `seconds` of a program of so many, all layers in turn."""
    if not HAS_GPU:
        return seconds(layers) / layers
    return of_one_more(seconds, few=layers, many=LONGER * layers)
