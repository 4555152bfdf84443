"""What a kernel must know of the GPU it is compiled for."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.quantization import WORD


@dataclass(frozen=True, slots=True)
class Device:
    """What of a GPU the choices depend on.

    Attributes:
      arch: "sm_90", "gfx942" and so on.
      multiprocessors: or compute units.
      kind: its name, "NVIDIA H100 80GB HBM3"; empty for any.
    """

    arch: str
    multiprocessors: int
    kind: str = ""

    @property
    def platform(self) -> str:
        """As JAX names it."""
        return "rocm" if self.arch.startswith("gfx") else "cuda"

    @classmethod
    def current(cls) -> "Device":
        """The default device; where that is no GPU, an H100."""
        device = jax.devices()[0]
        if device.platform != "gpu":
            return cls("sm_90", 132)
        arch = str(device.compute_capability)
        arch = arch if arch.startswith("gfx") else "sm_" + arch.replace(".", "")
        return cls(arch, device.core_count, device.device_kind)


def lacks_dtype(device: Device, *arrays: Array | jax.ShapeDtypeStruct, converts: bool = True) -> str | None:
    """What a GPU's kernels lack for these arrays, if anything.

    Args:
      device: the GPU.
      arrays: the arguments.
      converts: whether the kernel reads or writes codes as numbers, and does not only move them.
    """
    served = jnp.float32, jnp.bfloat16, jnp.uint16, jnp.float16, jnp.int8, jnp.uint8, jnp.int32
    for array in arrays:
        if array.dtype not in served:
            return str(array.dtype)
        if array.dtype.itemsize == 1 and array.shape[-1] % WORD:
            return f"rows of {array.shape[-1]} codes: it takes them by fours"
        old = device.platform == "cuda" and int(device.arch[3:]) < 89
        if converts and array.dtype == jnp.uint8 and old:
            return f"uint8 (E4M3FN) on {device.arch}: GPUs convert it from sm_89 on"
    return None
