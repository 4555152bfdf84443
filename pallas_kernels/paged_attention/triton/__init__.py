"""`paged_attention` in Pallas Triton, for CUDA from sm_80 and ROCm from gfx942.

kernels     the launches, and the kernels
rows        the rows of a matrix product: their queries, and how they are loaded and stored
tiles       loads tiles of K and V; `ptx`: converts codes to values in assembly
scores      products, scales and caps
tuning      how the work is divided; `tables`: results of a search on a GPU
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tuning

if TYPE_CHECKING:
    from jaxtyping import Array

    from pallas_kernels.paged_attention.call import Call


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these arrays on this device, or None."""
    return tuning.lacks(Device.current(), call.q, call.pool.storage)


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.paged_attention`. Returns `(out, lse)`, `out` before `Format.outputs`."""
    # Pallas' Triton support is imported only if a kernel is launched.
    from pallas_kernels.paged_attention.triton import kernels

    return kernels.run(call, interpret=interpret)
