"""A plan: the memory of a model on devices, and what follows from it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from jaxkv import catalog
from jaxkv.config import MAX_TOKENS, CacheConfig
from jaxkv.groups import Group
from jaxkv.planner.kv_bytes import (
    KVBytes,
    cache_config,
    kv_cache_bytes,
    pool_pages,
)
from jaxkv.planner.shape import ModelShape
from jaxkv.units import parse_bytes

# int4 as in common formats: a 16-bit scale per group of 64. Embeddings stay in 16 bits or more.
WEIGHT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4.25}
_ACTIVATION_BYTES, _LOGIT_BYTES, _STATE_BYTES = 2, 4, 4
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator.

    Attributes:
      name: for display.
      memory: bytes.
      bandwidth: bytes per second read from memory; None if unknown.
    """

    name: str
    memory: int
    bandwidth: float | None = None

    @classmethod
    def named(cls, name: str) -> "Device":
        """One of `configs/devices`.

        Raises:
          ValueError: for an unknown name, listing the known ones.

        Example:
          >>> Device.named("h100").bandwidth
          3352000000000.0
        """
        known = catalog.read("devices", name)
        return cls(known["name"], parse_bytes(known["memory"]), float(known["bandwidth"]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of a model on devices. All bytes are per device.

    Attributes:
      shape: the model.
      device: each of the devices.
      context: tokens per sequence.
      concurrency: sequences at once.
      kv_dtype, weights_dtype: full names; `weights_dtype` "stored" is that of the files.
      tensor_parallel: devices that share weights and KV heads.
      page_size: tokens per page.
      memory_fraction: share of the device's memory that may be used.
      prefill_chunk: most tokens per prefill step.
      fragmentation: factor on the bytes of pages.
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
        """Bytes of the parameters; slightly too low if heads do not divide evenly among devices."""
        shape, (embedding, routed, rest) = self.shape, self.weight_bits
        bits = shape.embedding_parameters * embedding + shape.routed_parameters * routed
        bits += shape.other_parameters * rest
        return -(-round(bits / 8) // self.tensor_parallel)

    @property
    def weight_bits(self) -> tuple[float, float, float]:
        """Bits per weight of the embeddings (at least 16), of the experts, and of the rest."""
        if self.weights_dtype != "stored":
            bits = WEIGHT_BITS[self.weights_dtype]
            return max(bits, 16.0), bits, bits
        if self.shape.stored_bytes is not None:
            bits = 8 * self.shape.stored_bytes / self.shape.num_parameters
            return bits, bits, bits
        bits = self.shape.quantized_bits or 16.0
        parts = {"all": (bits, bits, bits), "linear": (16.0, bits, bits), "experts": (16.0, bits, 16.0)}
        return parts[self.shape.quantized_parts]

    @cached_property
    def kv(self) -> KVBytes:
        """Bytes of K and V of all sequences."""
        return kv_cache_bytes(
            self._sharded,
            self.context,
            self.concurrency,
            kv_dtype=self.kv_dtype,
            page_size=self.page_size,
            fragmentation=self.fragmentation,
        )

    @property
    def kv_heads_per_device(self) -> int:
        """Most KV heads that the query heads of one device read; every device has MLA's latent vector."""
        return 1 if self.shape.is_latent else self._most_heads(self.shape.num_kv_heads)

    def _most_heads(self, kv_heads: int) -> int:
        own = self.shape.num_q_heads // self.tensor_parallel
        group = self.shape.num_q_heads // kv_heads
        firsts = range(0, self.shape.num_q_heads, own)
        return max((first + own - 1) // group - first // group + 1 for first in firsts)

    @property
    def _sharded(self) -> ModelShape:
        each = self.shape.layer_sizes
        if each is not None:
            each = tuple((self._most_heads(heads), head_dim) for heads, head_dim in each)
        return replace(self.shape, num_kv_heads=self.kv_heads_per_device, layer_sizes=each)

    @cached_property
    def cache_config(self) -> CacheConfig | None:
        """The config of each device's cache; None if jaxkv cannot store it (MLA)."""
        options = dict(kv_dtype=self.kv_dtype, page_size=self.page_size)
        return cache_config(self._sharded, self.context, self.concurrency, **options)  # type: ignore[arg-type]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The cache's groups of layers; none if jaxkv cannot store it."""
        return () if self.cache_config is None else self.cache_config.groups

    @property
    def layers_per_page(self) -> int:
        """Layers whose K and V a page holds: those of a group."""
        return self.shape.num_layers if self.cache_config is None else self.cache_config.pool_shape[0]

    @cached_property
    def pages(self) -> int:
        """Pages of the pool; with layer groups those of all groups, each of the layers of one group."""
        options = dict(kv_dtype=self.kv_dtype, page_size=self.page_size)
        return pool_pages(self._sharded, self.context, self.concurrency, **options)  # type: ignore[arg-type]

    @property
    def pages_per_seq(self) -> int:
        """Pages of one sequence of `context` tokens, in all groups."""
        row = self.cache_config
        return -(-self.context // self.page_size) if row is None else row.pages_for_seq(self.context)

    @property
    def tables(self) -> int:
        """Bytes of the page table, refcounts and the free stack."""
        config = self.cache_config
        return 0 if config is None else config.estimated_memory_bytes() - config.pool_bytes

    @property
    def states(self) -> int:
        """Bytes of states of fixed size, of layers without K and V, in float32."""
        return -(-self.shape.state_elements * _STATE_BYTES * self.concurrency // self.tensor_parallel)

    @property
    def activations(self) -> int:
        """Bytes of one prefill step: residual stream, attention and MLP in 16 bits, logits in float32."""
        shape, shared = self.shape, self.tensor_parallel
        tokens = min(self.prefill_chunk, self.context * self.concurrency)
        attention = (shape.num_q_heads + 2 * shape.num_kv_heads) * shape.head_dim
        features = 4 * shape.hidden_size + (attention + 2 * shape.mlp_width) // shared
        return tokens * features * _ACTIVATION_BYTES + self.concurrency * shape.vocab_size * _LOGIT_BYTES

    @property
    def overhead(self) -> int:
        """Assumed for the driver, compiled programs and libraries: 0.5 GiB, and as much for collectives."""
        return _GIB // 2 * (1 if self.tensor_parallel == 1 else 2)

    @property
    def needed(self) -> int:
        """All bytes needed."""
        return self.weights + self.kv.reserved + self.states + self.tables + self.activations + self.overhead

    @property
    def usable(self) -> int:
        """Bytes that may be used."""
        return int(self.device.memory * self.memory_fraction)

    @property
    def headroom(self) -> int:
        """Bytes left; negative if the plan does not fit."""
        return self.usable - self.needed

    @property
    def fits(self) -> bool:
        """Whether the plan fits."""
        return self.headroom >= 0

    @property
    def risk(self) -> str:
        """`does not fit`; or `high` with under 5% left, `medium` under 15%, else `low`."""
        left = self.headroom / max(self.usable, 1)
        return "does not fit" if left < 0 else "high" if left < 0.05 else "medium" if left < 0.15 else "low"

    @cached_property
    def max_concurrency_ratio(self) -> float:
        """Number of sequences of `context` tokens that fit, with a fraction for the remaining memory."""
        most = replace(self, concurrency=max(self.max_concurrency, 1))
        one = most.kv.reserved * most.pages_per_seq / most.pages + self.shape.vocab_size * _LOGIT_BYTES
        one += self.shape.state_elements * _STATE_BYTES / self.tensor_parallel
        spare = most.headroom / one
        return self.max_concurrency + min(spare, 0.999) if self.max_concurrency else max(0.0, 1 + spare)

    @property
    def kv_capacity_tokens(self) -> int:
        """Tokens that fit, in sequences of `context`."""
        return int(self.max_concurrency_ratio * self.context)

    @cached_property
    def max_context(self) -> int:
        """The longest context at this concurrency, up to the model's; 0 for none."""
        most = min(
            self.shape.max_context, (MAX_TOKENS // self.concurrency - 1) // self.page_size * self.page_size
        )
        return _largest(lambda context: replace(self, context=context)._may_run, most)

    @cached_property
    def max_concurrency(self) -> int:
        """The most sequences of this context; 0 for none."""
        most = (MAX_TOKENS - 1) // (self.page_size * -(-self.context // self.page_size))
        return _largest(lambda concurrency: replace(self, concurrency=concurrency)._may_run, most)

    @property
    def _may_run(self) -> bool:
        """Whether a pool can have as many pages, and the plan fits."""
        return self.pages * self.page_size < MAX_TOKENS and self.fits

    @property
    def decode_tokens_per_second(self) -> float | None:
        """An upper bound: each step reads the weights that it uses and every kept token once."""
        if self.device.bandwidth is None:
            return None
        shape, (embedding, routed, rest) = self.shape, self.weight_bits
        # The output projection is read in full; of the embedding table only a row per token.
        table = shape.vocab_size * shape.hidden_size
        chosen = shape.active_parameters - table - shape.other_parameters
        used = min(shape.routed_parameters, chosen * self.concurrency)
        bits = table * embedding + used * routed + shape.other_parameters * rest
        read = bits / 8 / self.tensor_parallel + self.kv.exact + self.kv.scales + self.states
        return self.concurrency * self.device.bandwidth / read

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for a reader of the plan."""
        notes = self.shape.notes
        if self.context > self.shape.max_context:
            reach = "its rotary scaling reaches" if self.shape.is_extended else "it was trained on"
            notes += (f"{reach} {self.shape.max_context:,} tokens",)
        config = self.cache_config
        if config is not None and config.pages_for_chunk(self.context):
            notes += (
                "layers with a window release their pages; the pool suffices to prefill one sequence at a "
                f"time, {config.max_chunk:,} tokens at a time",
            )
        return notes

    def as_dict(self) -> dict[str, object]:
        """Arguments and results, for JSON."""
        asked = ("context", "concurrency", "kv_dtype", "weights_dtype", "tensor_parallel", "page_size")
        follows = (
            "weights",
            "states",
            "tables",
            "activations",
            "overhead",
            "needed",
            "usable",
            "headroom",
            "fits",
            "risk",
        )
        follows += ("pages", "kv_capacity_tokens", "max_concurrency_ratio", "max_context", "max_concurrency")
        return {
            "model": self.shape.name,
            "architecture": self.shape.architecture,
            "parameters": self.shape.num_parameters,
            "device": self.device.name,
            "memory": self.device.memory,
            **{name: getattr(self, name) for name in (*asked, *follows)},
            "kv": {name: getattr(self.kv, name) for name in ("exact", "scales", "paged", "reserved")},
            "decode_tokens_per_second_ceiling": self.decode_tokens_per_second,
            "cache_config": None if self.cache_config is None else asdict(self.cache_config),
            "groups": [asdict(group) for group in self.groups],
            "notes": list(self.notes),
        }


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest value up to `most` that fits, 0 for none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
