"""`paged_attention` in Pallas Triton, for CUDA from sm_80 and ROCm from gfx942.

kernels     what is launched, and the kernels
rows        the rows of a matrix product: which queries they are, how they are read and written
tiles       tiles of K and V as they are loaded; `ptx`: codes that become values in assembly
scores      products, scales and caps
tuning      how the work is cut up; `tables`: what a search on a GPU knows better
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.device import Device
from pallas_kernels.paged_attention.triton import tuning

if TYPE_CHECKING:
    from jaxtyping import Array

    from pallas_kernels.paged_attention.call import Call


def lacks(call: Call) -> str | None:
    """What the kernel lacks for these arrays on this device, if anything."""
    return tuning.lacks(Device.current(), call.q, call.pool.storage)


def run(call: Call, *, interpret: bool) -> tuple[Array, ...]:
    """See `api.paged_attention`. Returns `(out, lse)`, `out` as the format's tiles give it."""
    # Pallas' own Triton support is imported only where a kernel is launched.
    from pallas_kernels.paged_attention.triton import kernels

    return kernels.run(call, interpret=interpret)
