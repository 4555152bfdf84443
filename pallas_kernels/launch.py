"""One way to launch a Pallas Triton kernel, for every operation."""

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# JAX 0.11 and later announce the end of this backend whenever a kernel is lowered. It is the one that
# serves ROCm and older CUDA GPUs, so the announcement is for us, not for whoever calls.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def launch(
    kernel: Callable,
    *,
    grid: tuple[int, ...],
    out_shape: Any,
    name: str,
    num_warps: int,
    num_stages: int,
    interpret: bool,
    cost: pl.CostEstimate | None = None,
    aliases: dict[int, int] | None = None,
) -> Callable:
    """`pl.pallas_call` on the Triton backend, with whole arrays as references.

    Args:
      kernel: takes a reference for each argument and each result.
      grid: programs; the first axis is the fastest.
      out_shape: shapes and dtypes of the results.
      name: what a profile shows.
      num_warps, num_stages: as Triton means them.
      interpret: run it without a GPU.
      cost: flops and bytes, for the scheduler.
      aliases: argument number to number of the result that takes its buffer.
    """
    return pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )
