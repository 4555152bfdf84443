"""Makes the plan that is asked for: names and amounts as users write them, checked."""

from jaxkv.arguments import real
from jaxkv.checkpoints.hf_folder import shown
from jaxkv.config import MAX_TOKENS
from jaxkv.planner.kv_bytes import (
    SHORT,
    check_count,
    resolve_dtype,
)
from jaxkv.planner.memory_plan import WEIGHT_BITS, Device, Plan
from jaxkv.planner.shape import ModelShape
from jaxkv.units import format_bytes, parse_bytes


def plan(
    shape: ModelShape,
    device: Device | str | int,
    *,
    context: int = 8192,
    concurrency: int = 1,
    kv_dtype: str = "auto",
    weights_dtype: str = "auto",
    tensor_parallel: int = 1,
    page_size: int = 16,
    memory_fraction: float = 0.9,
    prefill_chunk: int = 2048,
    fragmentation: float = 1.0,
) -> Plan:
    """Plans the memory of a model.

    Args:
      shape: the model.
      device: a `Device`, the name of one, or bytes of memory (an integer or like "24GiB").
      context: tokens per sequence.
      concurrency: sequences at once.
      kv_dtype: as for `kv_cache_bytes`.
      weights_dtype: "auto" is as stored or published; else one of `WEIGHT_BITS`, f32, bf16, f16.
      tensor_parallel: devices that share weights and KV heads; must divide the query heads.
      page_size: tokens per page.
      memory_fraction: share of the device's memory that may be used. JAX takes 0.75 unless
        `XLA_PYTHON_CLIENT_MEM_FRACTION` is set.
      prefill_chunk: most tokens per prefill step.
      fragmentation: as for `kv_cache_bytes`.

    Raises:
      ValueError: for a value out of range or an unknown name.

    Example:
      >>> plan(ModelShape.from_config("llama-3.1-8b"), "H100", concurrency=16).fits
      True
    """
    context, concurrency = check_count("context", context), check_count("concurrency", concurrency)
    tensor_parallel = check_count("tensor_parallel", tensor_parallel)
    page_size, prefill_chunk = (
        check_count("page_size", page_size),
        check_count("prefill_chunk", prefill_chunk),
    )
    _check_slots(-(-context // page_size) * page_size * concurrency)
    if shape.num_q_heads % tensor_parallel:
        raise ValueError(f"tensor_parallel={tensor_parallel} must divide the {shape.num_q_heads} query heads")
    share = real(memory_fraction)
    if share is None or not 0 < share <= 1:
        raise ValueError(f"memory_fraction={memory_fraction!r} must be above 0 and at most 1")
    made = Plan(
        shape=shape,
        device=_device(device),
        context=context,
        concurrency=concurrency,
        kv_dtype=resolve_dtype(shape, kv_dtype),
        weights_dtype=_weights_dtype(shape, weights_dtype),
        tensor_parallel=tensor_parallel,
        page_size=page_size,
        memory_fraction=share,
        prefill_chunk=prefill_chunk,
        fragmentation=fragmentation,
    )
    _check_slots(made.pages * page_size)
    return made


def _check_slots(slots: int) -> None:
    if slots >= MAX_TOKENS:
        raise ValueError(
            f"context x concurrency takes {slots:,} token slots; a pool has fewer than {MAX_TOKENS:,}"
        )


def _device(device: Device | str | int) -> Device:
    if isinstance(device, Device):
        return device
    if isinstance(device, str) and device.strip()[:1] not in tuple("0123456789."):
        return Device.named(device)
    return Device(str(device), parse_bytes(device))


def _weights_dtype(shape: ModelShape, name: str) -> str:
    if name != "auto":
        full = SHORT.get(str(name), str(name))
        if full not in WEIGHT_BITS:
            known = ", ".join(["auto", *SHORT, *WEIGHT_BITS])
            raise ValueError(f"weights_dtype={shown(name)} is not known; known: {known}")
        return full
    if shape.stored_bytes is not None:
        # Bytes per parameter, from under two bits to above float32; otherwise the files are another model's.
        if not 0.2 < shape.stored_bytes / shape.num_parameters < 5:
            raise ValueError(
                f"files of {format_bytes(shape.stored_bytes)} do not hold {shape.num_parameters:,} "
                f"parameters; say how they are stored with weights_dtype"
            )
        return "stored"
    known = shape.quantized_bits is not None
    known = known and (shape.quantized_parts != "experts" or shape.routed_parameters > 0)
    if shape.quantization is not None and not known:
        raise ValueError(
            f"the size of weights in {shown(shape.quantization)} is not known; say how with weights_dtype"
        )
    return "stored" if known else shape.dtype or "bfloat16"
