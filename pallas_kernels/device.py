"""What a kernel must know of the GPU it is compiled for."""

from dataclasses import dataclass

import jax


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
