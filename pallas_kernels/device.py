"""The GPU that a kernel is compiled for."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Device:
    """Properties of a GPU that determine how kernels are launched.

    Attributes:
      arch: "sm_90", "gfx942" and so on.
      multiprocessors: number of multiprocessors or compute units.
      kind: its name, such as "NVIDIA H100 80GB HBM3"; empty for any.
    """

    arch: str
    multiprocessors: int
    kind: str = ""

    @property
    def platform(self) -> str:
        """JAX's name of the platform."""
        return "rocm" if self.arch.startswith("gfx") else "cuda"

    @classmethod
    def current(cls) -> "Device":
        """The default device; an H100 if that is not a GPU."""
        device = jax.devices()[0]
        if device.platform != "gpu":
            return cls("sm_90", 132)
        arch = str(device.compute_capability)
        arch = arch if arch.startswith("gfx") else "sm_" + arch.replace(".", "")
        return cls(arch, device.core_count, device.device_kind)
