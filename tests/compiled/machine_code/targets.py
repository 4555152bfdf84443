"""The GPUs that the kernels are compiled for."""

from dataclasses import dataclass

from pallas_kernels.device import Device

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU, as Triton names it, and what limits the programs resident on one multiprocessor."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    device: Device
    shared: int = 0
    registers: int = 65536
    warps: int = 64
    shared_of_a_program: int = 64 * KIB


TARGETS = (
    Target("sm_80", "cuda", 80, 32, Device("sm_80", 108), shared=164 * KIB, shared_of_a_program=163 * KIB),
    Target("sm_90", "cuda", 90, 32, Device("sm_90", 132), shared=228 * KIB, shared_of_a_program=227 * KIB),
    Target("sm_100", "cuda", 100, 32, Device("sm_100", 148), shared=228 * KIB, shared_of_a_program=227 * KIB),
    Target("gfx942", "hip", "gfx942", 64, Device("gfx942", 304)),
    Target("gfx950", "hip", "gfx950", 64, Device("gfx950", 256)),
    Target("gfx1100", "hip", "gfx1100", 32, Device("gfx1100", 96)),
)
