"""Static sizes of a cache and what follows from them."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.arguments import real, whole
from jaxkv.units import format_bytes
from pallas_kernels.formats import FORMATS, Format

DTYPES = tuple(name for name, storage in FORMATS.items() if not storage.quantized)
QUANTIZATIONS = tuple(name for name, storage in FORMATS.items() if storage.quantized)

# Token slots are counted in int32; a length plus the tokens of one call must not overflow.
MAX_TOKENS = 2**30
_COUNTER_BYTES = 40  # of `AllocationStats`
_FINGERPRINT_BYTES = 8  # of `PageTable`


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes of a paged KV cache; hashable, so it can be a static argument.

    Attributes:
      num_layers: attention layers that share the page table.
      num_kv_heads: KV heads per layer (equal to the query heads for MHA, 1 for MQA).
      head_dim: elements per head.
      num_pages: pages in the pool, shared by all sequences.
      page_size: token slots per page.
      max_seqs: rows of the page table.
      max_pages_per_seq: pages per row of the page table. Default: `num_pages`.
      dtype: of K and V: "float32", "bfloat16" or "float16".
      quantization: None stores K and V as `dtype`. "int8" and "fp8" (E4M3FN) store one byte per element and
        a float32 scale per token and KV head. "int4" rotates each row and stores two elements per byte, with
        a step and zero point per group of about 32; `head_dim` must be a multiple of 8. With quantization
        `dtype` is what `gather` returns.
      compaction_threshold: `should_compact` is True when, of the pages up to the highest one in use, more
        than this share are free; 0 to 1.
      compact_automatically: `generate` compacts when `should_compact` is True.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Example:
      >>> config = CacheConfig(num_layers=2, num_kv_heads=4, head_dim=64, num_pages=128)
      >>> config.max_tokens_per_seq
      2048
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 16
    max_seqs: int = 64
    max_pages_per_seq: int = None  # type: ignore[assignment]  # filled in below
    dtype: str = "bfloat16"
    quantization: str | None = None
    compaction_threshold: float = 0.3
    compact_automatically: bool = False

    def __post_init__(self):
        if self.max_pages_per_seq is None:
            object.__setattr__(self, "max_pages_per_seq", self.num_pages)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        for field in fields(self):
            if field.type in (int, "int"):
                # As Python integers, so that equal configs have equal hashes and the same repr.
                object.__setattr__(self, field.name, _count(field.name, getattr(self, field.name)))
        if self.max_pages_per_seq > self.num_pages:
            raise ValueError(
                f"max_pages_per_seq={self.max_pages_per_seq} must not exceed num_pages={self.num_pages}"
            )
        for name in ("num_pages", "max_pages_per_seq"):
            slots = getattr(self, name) * self.page_size
            if slots >= MAX_TOKENS:
                raise ValueError(f"{name} * page_size = {slots} token slots; must be below {MAX_TOKENS}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is not supported; "
                f"allowed: None, {', '.join(map(repr, QUANTIZATIONS))}"
            )
        if allowed := self.storage.refuses(self.head_dim):
            raise ValueError(f"head_dim={self.head_dim} must be {allowed}, for {self.storage.name}")
        threshold = real(self.compaction_threshold)
        if threshold is None or not 0 <= threshold <= 1:
            raise ValueError(
                f"compaction_threshold={self.compaction_threshold!r} must be a number from 0 to 1"
            )
        object.__setattr__(self, "compaction_threshold", threshold)
        if not isinstance(self.compact_automatically, (bool, np.bool_)):
            raise ValueError(f"compact_automatically={self.compact_automatically!r} must be True or False")
        object.__setattr__(self, "compact_automatically", bool(self.compact_automatically))

    @classmethod
    def contiguous(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        max_seqs: int,
        max_tokens: int,
        dtype: str = "bfloat16",
        quantization: str | None = None,
    ) -> "CacheConfig":
        """A static cache: one buffer of `max_tokens` token slots for each sequence.

        It is the paged cache with one page per sequence, so every function works on it.
        `keys` and `values` give its dense views.
        """
        return cls(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_pages=max_seqs,
            page_size=max_tokens,
            max_seqs=max_seqs,
            max_pages_per_seq=1,
            dtype=dtype,
            quantization=quantization,
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether every sequence has one page of its own."""
        return self.max_pages_per_seq == 1 and self.num_pages == self.max_seqs

    @property
    def max_tokens_per_seq(self) -> int:
        """Token slots in a full row of the page table."""
        return self.max_pages_per_seq * self.page_size

    @property
    def pool_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of K and of V: `[layers, pages, kv_heads, page_size, row]`; the format gives the row size."""
        row = self.storage.row_size(self.head_dim)
        return (self.num_layers, self.num_pages, self.num_kv_heads, self.page_size, row)

    @property
    def scale_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of K's and V's scales; none for an unquantized pool."""
        return self.storage.scale_shapes(self.pool_shape)

    @property
    def scale_dtype(self) -> str:
        """Dtype of the scales."""
        return self.storage.scale_dtype

    @property
    def storage(self) -> Format:
        """The storage format of K and V."""
        return FORMATS[self.quantization or self.dtype]

    @property
    def storage_dtype(self) -> str:
        """Dtype of the pool's arrays: `dtype`, that of the codes, or before JAX 0.11 uint16 for bfloat16."""
        return self.storage.storage_dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers: K and V, and their scales."""
        token_bytes = self.storage.token_bytes(self.num_kv_heads, self.head_dim)
        return self.num_layers * self.page_size * token_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool: K, V and their scales."""
        return self.num_pages * self.page_bytes

    @property
    def page_table_bytes(self) -> int:
        """Bytes of the page table's rows, lengths, positions and fingerprint."""
        return 4 * self.max_seqs * (self.max_pages_per_seq + 2) + _FINGERPRINT_BYTES

    @property
    def allocator_bytes(self) -> int:
        """Bytes of the refcounts, the free stack and its size."""
        return 4 * (2 * self.num_pages + 1)

    def estimated_memory_bytes(self) -> int:
        """Bytes of all arrays that `init` makes: pool, page table, refcounts, free stack, counters."""
        return self.pool_bytes + self.page_table_bytes + self.allocator_bytes + _COUNTER_BYTES

    def estimated_memory(self) -> str:
        """`estimated_memory_bytes` with a unit: `4.00 GiB`."""
        return format_bytes(self.estimated_memory_bytes())

    def max_context_length(self, concurrency: int = 1) -> int:
        """Tokens that each of `concurrency` sequences can hold at once.

        Raises:
          ValueError: for more sequences than `max_seqs`.
        """
        concurrency = _count("concurrency", concurrency)
        if concurrency > self.max_seqs:
            raise ValueError(f"concurrency={concurrency} is more than max_seqs={self.max_seqs}")
        return min(self.max_pages_per_seq, self.num_pages // concurrency) * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Pages needed for `num_tokens` tokens, counting a partly filled last page."""
        return -(-num_tokens // self.page_size)


def _count(name: str, value: object) -> int:
    number = whole(value)
    if number is None or number < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    return number


def _dtype_name(dtype: object) -> str:
    try:
        name = jnp.dtype(dtype).name  # type: ignore[arg-type]
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    return name


jax.tree_util.register_static(CacheConfig)
