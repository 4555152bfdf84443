"""Does it fit, how many sequences, how long?"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from jaxkv import catalog
from jaxkv.config import CacheConfig
from jaxkv.planner.kv_bytes import KVBytes, cache_configs, check_count, kv_cache_bytes, resolve_dtype
from jaxkv.planner.shape import ModelShape
from jaxkv.units import parse_bytes

# int4 as the common formats keep it: a 16-bit scale for each group of 64.
WEIGHT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4.25}
_SHORT = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_ACTIVATION_BYTES, _LOGIT_BYTES = 2, 4
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan needs to know of one accelerator.

    Attributes:
      name: for people.
      memory: bytes.
      bandwidth: bytes a second that it reads from them, None where it is not known.
    """

    name: str
    memory: int
    bandwidth: float | None = None

    @classmethod
    def named(cls, name: str) -> "Device":
        """One of `configs/devices`.

        Raises:
          ValueError: for an unknown name; it says which are known.

        Example:
          >>> Device.named("h100").bandwidth
          3352000000000.0
        """
        known = catalog.read("devices", name)
        return cls(known["name"], parse_bytes(known["memory"]), float(known["bandwidth"]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model on devices, and what memory it takes. All bytes are of one device.

    Attributes:
      shape: the model.
      device: each of the devices.
      context: tokens a sequence.
      concurrency: sequences at once.
      kv_dtype, weights_dtype: full names; `weights_dtype` "stored" is as the files are.
      tensor_parallel: devices that share weights and KV heads.
      page_size: tokens a page.
      memory_fraction: of the device's memory that may be used.
      prefill_chunk: most tokens a prefill step.
      fragmentation: factor on what K and V take in pages.
    """

    shape: ModelShape
    device: Device
    context: int
    concurrency: int
    kv_dtype: str
    weights_dtype: str
    tensor_parallel: int
    page_size: int
    memory_fraction: float
    prefill_chunk: int
    fragmentation: float

    @cached_property
    def weights(self) -> int:
        """All parameters; where heads do not divide evenly, a little more than this."""
        return -(-self._all_weights // self.tensor_parallel)

    @property
    def _all_weights(self) -> int:
        shape = self.shape
        if self.weights_dtype == "stored" and shape.stored_bytes is not None:
            return shape.stored_bytes
        if self.weights_dtype == "stored":
            # Experts in four bits, the rest as it is.
            bits = {"mxfp4": WEIGHT_BITS["int4"], "fp8": 8.0}[shape.quantization or "fp8"]
            few = shape.routed_parameters if shape.quantization == "mxfp4" else shape.num_parameters
            return int(few * bits + (shape.num_parameters - few) * 16) // 8
        return int(shape.num_parameters * WEIGHT_BITS[self.weights_dtype]) // 8

    @cached_property
    def kv(self) -> KVBytes:
        """K and V of all sequences."""
        return kv_cache_bytes(
            self._sharded,
            self.context,
            self.concurrency,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            fragmentation=self.fragmentation,
        )

    @property
    def _sharded(self) -> ModelShape:
        # With more devices than KV heads some keep the same head.
        return replace(self.shape, num_kv_heads=-(-self.shape.num_kv_heads // self.tensor_parallel))

    @property
    def activations(self) -> int:
        """Of one prefill step: residual stream, attention and MLP in 16 bits, logits in float32."""
        shape, shared = self.shape, self.tensor_parallel
        tokens = min(self.prefill_chunk, self.context * self.concurrency)
        attention = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        a_token = 4 * shape.hidden_size + (attention + 2 * shape.mlp_width) // shared
        return tokens * a_token * _ACTIVATION_BYTES + self.concurrency * shape.vocab_size * _LOGIT_BYTES

    @property
    def overhead(self) -> int:
        """The driver's context, compiled programs and libraries; half a GiB, another for collectives."""
        return _GIB // 2 * (1 if self.tensor_parallel == 1 else 2)

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.kv.paged + self.activations + self.overhead

    @property
    def usable(self) -> int:
        """What may be used."""
        return int(self.device.memory * self.memory_fraction)

    @property
    def headroom(self) -> int:
        """What is left; negative where it does not fit."""
        return self.usable - self.needed

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.headroom >= 0

    @property
    def risk(self) -> str:
        """`does not fit`, or how little is left: `high` under 5%, `medium` under 15%, else `low`."""
        left = self.headroom / self.usable
        return "does not fit" if left < 0 else "high" if left < 0.05 else "medium" if left < 0.15 else "low"

    @property
    def kv_memory(self) -> int:
        """What is left for K and V, used or not."""
        return max(0, self.headroom + self.kv.paged)

    @property
    def max_concurrency_ratio(self) -> float:
        """How many times a whole sequence of `context` tokens fits."""
        return self.kv_memory / (self.kv.paged / self.concurrency)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit, in sequences of `context`."""
        return int(self.max_concurrency_ratio * self.context)

    @cached_property
    def max_context(self) -> int:
        """The longest context at this concurrency, as far as the model was trained; 0 for none."""
        return _largest(lambda context: replace(self, context=context).fits, self.shape.max_context)

    @cached_property
    def max_concurrency(self) -> int:
        """The most sequences of this context; 0 for none."""
        return _largest(lambda concurrency: replace(self, concurrency=concurrency).fits, 2**20)

    @cached_property
    def caches(self) -> tuple[CacheConfig, ...]:
        """The caches to make on each device, one for all layers that keep the same tokens."""
        return cache_configs(
            self.shape,
            self.context,
            self.concurrency,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            tensor_parallel=self.tensor_parallel,
        )

    @property
    def pages(self) -> int:
        """Of all caches together; a page holds `page_size` tokens of the layers of its cache."""
        return sum(config.num_pages for config in self.caches)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """A ceiling: every weight that a step meets and every kept token is read once a step."""
        if self.device.bandwidth is None:
            return None
        met = min(self.shape.num_parameters, self.shape.active_parameters * self.concurrency)
        read = self.weights * met / self.shape.num_parameters + self.kv.exact + self.kv.scales
        return self.concurrency * self.device.bandwidth / read

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was asked and what follows."""
        asked = ("context", "concurrency", "kv_dtype", "weights_dtype", "tensor_parallel", "page_size")
        follows = (
            "weights",
            "activations",
            "overhead",
            "needed",
            "usable",
            "headroom",
            "fits",
            "risk",
            "pages",
        )
        follows += ("kv_capacity_tokens", "max_concurrency_ratio", "max_context", "max_concurrency")
        return {
            "model": self.shape.name,
            "architecture": self.shape.architecture,
            "parameters": self.shape.num_parameters,
            "device": self.device.name,
            "memory": self.device.memory,
            **{name: getattr(self, name) for name in (*asked, *follows)},
            "kv": {name: getattr(self.kv, name) for name in ("exact", "scales", "paged", "reserved")},
            "decode_tokens_per_second_ceiling": self.decode_tokens_per_second,
            "notes": list(self.shape.notes),
        }


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
      device: a `Device`, the name of one, or bytes of memory (as a number or like "24GiB").
      context: tokens a sequence.
      concurrency: sequences at once.
      kv_dtype: as for `kv_cache_bytes`.
      weights_dtype: "auto" is as they are stored, or published; else one of `WEIGHT_BITS`, f32, bf16, f16.
      tensor_parallel: devices that share weights and KV heads; must divide the query heads.
      page_size: tokens a page.
      memory_fraction: of the device's memory that may be used. JAX takes 0.75 unless
        `XLA_PYTHON_CLIENT_MEM_FRACTION` says otherwise.
      prefill_chunk: most tokens a prefill step.
      fragmentation: as for `kv_cache_bytes`.

    Raises:
      ValueError: for a number out of range or an unknown name.

    Example:
      >>> plan(ModelShape.from_config("llama-3.1-8b"), "H100", concurrency=16).fits
      True
    """
    counts = dict(context=context, concurrency=concurrency, tensor_parallel=tensor_parallel)
    for name, value in (counts | dict(page_size=page_size, prefill_chunk=prefill_chunk)).items():
        check_count(name, value)
    if shape.num_q_heads % tensor_parallel:
        raise ValueError(f"tensor_parallel={tensor_parallel} must divide the {shape.num_q_heads} query heads")
    if not isinstance(memory_fraction, (int, float)) or not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction={memory_fraction!r} must be above 0 and at most 1")
    return Plan(
        shape=shape,
        device=_device(device),
        context=context,
        concurrency=concurrency,
        kv_dtype=resolve_dtype(shape, kv_dtype),
        weights_dtype=_weights_dtype(shape, weights_dtype),
        tensor_parallel=tensor_parallel,
        page_size=page_size,
        memory_fraction=memory_fraction,
        prefill_chunk=prefill_chunk,
        fragmentation=fragmentation,
    )


def _device(device: Device | str | int) -> Device:
    if isinstance(device, Device):
        return device
    if isinstance(device, str) and not device.strip()[:1].isdigit():
        return Device.named(device)
    memory = parse_bytes(device)
    return Device(str(device), memory)


def _weights_dtype(shape: ModelShape, name: str) -> str:
    if name == "auto":
        if shape.stored_bytes is not None or shape.quantization in ("mxfp4", "fp8"):
            return "stored"
        if shape.quantization is not None:
            raise ValueError(
                f"weights as {shape.quantization!r} keeps them are not known; say how with weights_dtype"
            )
        return shape.dtype or "bfloat16"
    full = _SHORT.get(name, name)
    if full not in WEIGHT_BITS:
        known = ", ".join(["auto", *_SHORT, *WEIGHT_BITS])
        raise ValueError(f"weights_dtype={name!r} is not known; known: {known}")
    return full


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
