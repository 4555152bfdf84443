"""Launches Pallas Triton kernels, for every operation."""

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

# JAX 0.11 and later warn of deprecation whenever a kernel is lowered. Only this backend supports ROCm and
# older CUDA GPUs, so users can do nothing about it.
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

    Equal launches share one compiled function, so the layers of a model trace and lower it once.

    Args:
      kernel: a function, or a `partial` of one with hashable arguments. It takes a reference for each
        argument and each result.
      grid: number of programs per axis; the first axis varies fastest.
      out_shape: shapes and dtypes of the results.
      name: the kernel's name in profiles.
      num_warps, num_stages: Triton's options.
      interpret: run it without a GPU.
      cost: flops and bytes, for the scheduler.
      aliases: maps an argument's index to that of the result that reuses its buffer.
    """
    single = isinstance(out_shape, jax.ShapeDtypeStruct)
    return _launch(
        _Kernel(kernel),
        grid,
        out_shape if single else tuple(out_shape),
        name,
        num_warps,
        num_stages,
        interpret,
        cost,
        tuple((aliases or {}).items()),
    )


@lru_cache(maxsize=1024)
def _launch(kernel, grid, out_shape, name, num_warps, num_stages, interpret, cost, aliases) -> Callable:
    call = pl.pallas_call(
        kernel.function,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=dict(aliases),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        cost_estimate=cost,
        interpret=interpret,
        name=name,
    )
    return jax.jit(call)


class _Kernel:
    """A function, equal to another partial of the same function with the same arguments."""

    def __init__(self, function: Callable):
        self.function, self._key = function, _key(function)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kernel) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _key(value: Any) -> Hashable:
    if isinstance(value, partial):
        return (
            _key(value.func),
            tuple(map(_key, value.args)),
            tuple((name, _key(one)) for name, one in sorted(value.keywords.items())),
        )
    return value
