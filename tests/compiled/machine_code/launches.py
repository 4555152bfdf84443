"""The launches of a call, as Pallas hands them to Triton."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
from jax.sharding import AbstractMesh

import pallas_kernels
from pallas_kernels.device import Device
from pallas_kernels.sizes import next_power_of_two
from tests.compiled.machine_code.kernel import Kernel

# Device kinds that JAX may be told of, where it asks.
_DEVICE_KINDS = {"cuda": "NVIDIA H100", "rocm": "gfx942"}


@dataclass(frozen=True)
class Launch:
    """One launch of a call, as Pallas hands it to Triton, and what it must meet."""

    name: str
    ir: str
    warps: int
    stages: int
    kernel: str
    requirements: frozenset[str]
    least_wide_loads: int
    unpadded: float  # share of a row that is not padding
    quantized: bool


def launches(kernel: Kernel, device: Device) -> Iterator[Launch]:
    """The launches of a call that are looked at."""
    with pallas_kernels.use_backend("triton"), pretend(device.platform):
        lowered = jax.jit(partial(kernel.call, device)).trace(*kernel.shapes)
        module = lowered.lower(lowering_platforms=(device.platform,)).compiler_ir("stablehlo")
    assert module is not None
    for operation in _walk(module.operation):
        if operation.name != "stablehlo.custom_call":
            continue
        if "triton" not in operation.attributes["call_target_name"].value:
            continue
        config = operation.attributes["mhlo.backend_config"]
        if config["name"].value in kernel.of:
            yield Launch(
                config["name"].value,
                _as_text(config["ir"].value_bytes),
                config["num_warps"].value,
                config["num_stages"].value,
                kernel.name,
                kernel.requirements,
                kernel.wide_loads(device),
                kernel.head_dim / next_power_of_two(kernel.head_dim) if kernel.head_dim else 1.0,
                kernel.quantized,
            )


def pretend(platform: str):
    """JAX 0.11 and later ask what device they lower for."""
    try:
        from jax.sharding import AbstractDevice

        device = AbstractDevice(device_kind=_DEVICE_KINDS[platform], num_cores=None, platform="gpu")
    except (ImportError, TypeError):
        return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _walk(operation):
    yield operation
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _walk(inner.operation)


def _as_text(bytecode: bytes) -> str:
    from jax.interpreters.mlir import make_ir_context
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with make_ir_context() as context:
        dialect.register_dialect(context)
        return str(ir.Module.parse(bytecode))
