"""Static sizes of a cache and what follows from them."""

from bisect import bisect_right
from dataclasses import dataclass, fields
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import groups as grouping
from jaxkv.arguments import real, whole
from jaxkv.groups import Group, Home
from jaxkv.prefix_sizes import index_bytes
from jaxkv.units import format_bytes
from pallas_kernels.formats import FORMATS, Format

DTYPES = tuple(name for name, storage in FORMATS.items() if not storage.quantized)
QUANTIZATIONS = tuple(name for name, storage in FORMATS.items() if storage.quantized)

# Token slots are counted in int32; a length plus the tokens of one call must not overflow.
MAX_TOKENS = 2**30
_COUNTER_BYTES = 60  # of `AllocationStats`
_FINGERPRINT_BYTES = 8  # of `PageTable`


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes of a paged KV cache; hashable, so it can be a static argument.

    Attributes:
      num_layers: attention layers that share the page table.
      num_kv_heads: KV heads per layer (equal to the query heads for MHA, 1 for MQA). Where `layer_kv_heads`
        says otherwise this becomes that of the first kind of layers: one with full attention if there is any.
      head_dim: elements per head. With `layer_head_dims` likewise.
      num_pages: pages in the pool, shared by all sequences and groups of layers.
      page_size: token slots per page, in layers of the first kind. Kinds with smaller heads have more.
      max_seqs: sequence slots: how many sequences the cache holds at once, forks included.
      max_pages_per_seq: pages of the longest sequence, in a group with full attention; its tokens are at most
        `max_pages_per_seq * page_size`. Default: the whole pool, which makes the page table large.
      dtype: of K and V: "float32", "bfloat16" or "float16". Other dtypes are converted by `append`.
      quantization: None stores K and V as `dtype`. "int8" and "fp8" (E4M3FN) store one byte per element and
        a float32 scale per token and KV head. "int4" rotates each row and stores two elements per byte, with
        a step and zero point per group of about 32; `head_dim` must be a multiple of 8. With quantization
        `dtype` is what `gather` returns.
      layer_windows: for each layer the tokens that a token attends to, itself included; None for all of them.
        A layer with a window releases the pages that no token to come can see. Default: all are full.
      layer_kv_heads, layer_head_dims: of each layer, where layers differ.
      group_layers: layers that share a row of the page table and a page. Default: the number that takes the
        fewest bytes for one sequence of `max_tokens_per_seq` tokens, with at most 8 groups; see `groups`.
      rollback: tokens kept in each layer with a window beyond what it can see, so that `truncate` can take as
        many back, counted from before the last `allocate`.
      max_chunk: most tokens of one sequence in one `allocate`, where any layer has a window.
      compaction_threshold: `should_compact` is True when, of the pages up to the highest one in use, more
        than this share are free; 0 to 1.
      compact_automatically: `generate` compacts when `should_compact` is True.
      prefix_cache: whether the cache finds prompts that begin like earlier ones; see `match_prefix`.

    Raises:
      ValueError: naming the field, its value and what is allowed.

    Example:
      >>> config = CacheConfig(num_layers=2, num_kv_heads=4, head_dim=64, num_pages=128)
      >>> config.max_tokens_per_seq
      2048
    """

    num_layers: int
    num_kv_heads: int = None  # type: ignore[assignment]  # filled in below
    head_dim: int = None  # type: ignore[assignment]
    num_pages: int
    page_size: int = 16
    max_seqs: int = 64
    max_pages_per_seq: int = None  # type: ignore[assignment]  # filled in below
    dtype: str = "bfloat16"
    quantization: str | None = None
    layer_windows: tuple[int | None, ...] | None = None
    layer_kv_heads: tuple[int, ...] | None = None
    layer_head_dims: tuple[int, ...] | None = None
    group_layers: int | None = None
    rollback: int = 0
    max_chunk: int = 512
    compaction_threshold: float = 0.3
    compact_automatically: bool = False
    prefix_cache: bool = False

    def __post_init__(self):
        if self.max_pages_per_seq is None:
            object.__setattr__(self, "max_pages_per_seq", self.num_pages)
        object.__setattr__(self, "dtype", _dtype_name(self.dtype))
        object.__setattr__(self, "num_layers", _count("num_layers", self.num_layers))
        self._settle_layers()
        for field in fields(self):
            if field.type in (int, "int"):
                # As Python's own, so that configs of equal numbers have equal hashes and texts.
                least = 0 if field.name == "rollback" else 1
                object.__setattr__(self, field.name, _count(field.name, getattr(self, field.name), least))
        self._check_sizes()
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization={self.quantization!r} is not supported; "
                f"allowed: None, {', '.join(map(repr, QUANTIZATIONS))}"
            )
        dims = {f"layer_head_dims[{layer}]": dim for layer, dim in enumerate(self.layer_head_dims or ())}
        for name, head_dim in (dims or {"head_dim": self.head_dim}).items():
            if allowed := self.storage.refuses(head_dim):
                raise ValueError(f"{name}={head_dim} must be {allowed}, for {self.storage.name}")
        threshold = real(self.compaction_threshold)
        if threshold is None or not 0 <= threshold <= 1:
            raise ValueError(
                f"compaction_threshold={self.compaction_threshold!r} must be a number from 0 to 1"
            )
        object.__setattr__(self, "compaction_threshold", threshold)
        for name in ("compact_automatically", "prefix_cache"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
            object.__setattr__(self, name, bool(getattr(self, name)))
        self._check_groups()

    def _settle_layers(self):
        """What is said of each layer, as tuples of Python's own; None where all layers are alike."""
        for name, of_all in (("layer_kv_heads", "num_kv_heads"), ("layer_head_dims", "head_dim")):
            if getattr(self, of_all) is not None:
                object.__setattr__(self, of_all, _count(of_all, getattr(self, of_all)))
            values = _per_layer(name, getattr(self, name), self.num_layers, optional=False)
            if values is not None and len(set(values)) == 1:
                object.__setattr__(self, of_all, values[0])
                values = None
            object.__setattr__(self, name, values)
        windows = _per_layer("layer_windows", self.layer_windows, self.num_layers, optional=True)
        alike = windows is None or not any(windows)
        object.__setattr__(self, "layer_windows", None if alike else windows)
        first = next(iter(grouping.kinds_of(self)))
        object.__setattr__(self, "num_kv_heads", first.num_kv_heads)
        object.__setattr__(self, "head_dim", first.head_dim)

    def _check_sizes(self):
        full = self.layer_windows is None or None in self.layer_windows
        if full and self.max_pages_per_seq > self.num_pages:
            raise ValueError(
                f"max_pages_per_seq={self.max_pages_per_seq} must not exceed num_pages={self.num_pages}"
            )
        for window in filter(None, self.layer_windows or ()):
            if window + self.rollback + self.max_chunk >= MAX_TOKENS:
                raise ValueError(
                    f"a window of {window} in layer_windows, rollback={self.rollback} and "
                    f"max_chunk={self.max_chunk}: their sum must be below {MAX_TOKENS}"
                )
        for name in ("num_pages", "max_pages_per_seq"):
            slots = getattr(self, name) * self.page_size
            if slots >= MAX_TOKENS:
                raise ValueError(f"{name} * page_size = {slots} token slots; must be below {MAX_TOKENS}")

    def _check_groups(self):
        for shape in grouping.kinds_of(self):
            grouping.page_size(self, shape)  # raises where a kind does not fit
        if self.group_layers is not None:
            object.__setattr__(self, "group_layers", _count("group_layers", self.group_layers))
            if self.group_layers > self.num_layers:
                raise ValueError(
                    f"group_layers={self.group_layers} must not exceed num_layers={self.num_layers}"
                )

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
    def groups(self) -> tuple[Group, ...]:
        """The groups of layers, those with full attention first; group `g` has the rows
        `g * max_seqs` to `(g + 1) * max_seqs` of the page table."""
        return grouping.groups_of(self)

    @property
    def homes(self) -> tuple[Home, ...]:
        """Where each layer's K and V are: its group, and its number among the group's layers."""
        return grouping.homes_of(self)

    @property
    def uniform(self) -> bool:
        """Whether K and V have the same shape in all layers."""
        return self.layer_kv_heads is None and self.layer_head_dims is None

    @property
    def num_rows(self) -> int:
        """Rows of the page table: one for each group and sequence."""
        return len(self.groups) * self.max_seqs

    @property
    def num_columns(self) -> int:
        """Pages of the widest row of the page table."""
        return max(group.columns for group in self.groups)

    @property
    def pool_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of K and of V: `[layers, pages, kv_heads, page_size, row]`; a row is the format's.

        The layers are those of a group. Layers of another kind than the first view a page in their own shape.
        """
        row = self.storage.row_size(self.head_dim)
        return (grouping.group_layers(self), self.num_pages, self.num_kv_heads, self.page_size, row)

    @property
    def scale_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of K's and V's scales; none without quantization.

        Where layers differ in shape, `[layers, pages, elements]` for the kind that needs most.
        """
        if self.uniform:
            return self.storage.scale_shapes(self.pool_shape)
        return tuple(
            (grouping.group_layers(self), self.num_pages, slots) for slots in grouping.scale_slots(self)
        )

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
        """Bytes of one page in all layers of a group: K and V, and their scales."""
        elements = 2 * self.page_size * grouping.row_elements(self, self.groups[0].shape)
        scales = sum(prod(shape[2:]) for shape in self.scale_shapes)
        of_a_layer = elements * _itemsize(self.storage_dtype) + scales * _itemsize(self.scale_dtype)
        return grouping.group_layers(self) * of_a_layer

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool: K, V and their scales."""
        return self.num_pages * self.page_bytes

    @property
    def page_table_bytes(self) -> int:
        """Bytes of the page table's rows, lengths, positions and fingerprint."""
        return 4 * (self.num_rows * (self.num_columns + 1) + self.max_seqs) + _FINGERPRINT_BYTES

    @property
    def allocator_bytes(self) -> int:
        """Bytes of the refcounts, the free stack and its size, and the index of prefixes."""
        return 4 * (2 * self.num_pages + 1) + index_bytes(self)

    def estimated_memory_bytes(self) -> int:
        """Bytes of all arrays that `init` makes: pool, page table, refcounts, free stack, counters."""
        return self.pool_bytes + self.page_table_bytes + self.allocator_bytes + _COUNTER_BYTES

    def estimated_memory(self) -> str:
        """`estimated_memory_bytes` with a unit: `4.00 GiB`."""
        return format_bytes(self.estimated_memory_bytes())

    def max_context_length(self, concurrency: int = 1) -> int:
        """Tokens that each of `concurrency` sequences can hold at once, decoded one at a time.

        Raises:
          ValueError: for more sequences than `max_seqs`.
        """
        concurrency = _count("concurrency", concurrency)
        if concurrency > self.max_seqs:
            raise ValueError(f"concurrency={concurrency} is more than max_seqs={self.max_seqs}")
        if self.layer_windows is None and len(self.groups) == 1:
            return min(self.max_pages_per_seq, self.num_pages // concurrency) * self.page_size
        fits = range(self.max_tokens_per_seq + 1)
        return bisect_right(fits, self.num_pages // concurrency, key=self.pages_for_seq) - 1

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill in a group with full attention, the last perhaps in part."""
        return -(-num_tokens // self.page_size)

    def pages_for_seq(self, num_tokens: int) -> int:
        """Pages that a sequence of `num_tokens` tokens holds at most while it is decoded, in all groups."""
        return sum(grouping.decode_pages(self, group.shape, num_tokens) for group in self.groups)

    def pages_for_chunk(self, num_tokens: int) -> int:
        """Further pages that it holds while a chunk of its prompt is prefilled: none without windows."""
        most = sum(min(group.columns, -(-num_tokens // group.page_size)) for group in self.groups)
        return most - self.pages_for_seq(num_tokens)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers with full attention."""
        return tuple(sorted(layer for group in self.groups if group.window is None for layer in group.layers))


def _count(name: str, value: object, least: int = 1) -> int:
    if value is None and name in ("num_kv_heads", "head_dim"):
        each = "layer_kv_heads" if name == "num_kv_heads" else "layer_head_dims"
        raise ValueError(f"{name} is missing; where layers differ, {each} may be given instead")
    number = whole(value)
    if number is None or number < least:
        raise ValueError(
            f"{name}={value!r} must be a {'positive integer' if least else 'whole number of 0 or more'}"
        )
    return number


def _per_layer(name: str, values: object, num_layers: int, *, optional: bool) -> tuple | None:
    """One positive integer for each layer; with `optional`, None says that it has no window."""
    if values is None:
        return None
    if not isinstance(values, (tuple, list, np.ndarray)) or len(values) != num_layers:
        raise ValueError(f"{name}={values!r} must have an entry for each of num_layers={num_layers} layers")
    if not optional:
        return tuple(_count(f"{name}[{layer}]", value) for layer, value in enumerate(values))
    windows = tuple(None if value is None else whole(value) for value in values)
    for layer, (value, window) in enumerate(zip(values, windows, strict=True)):
        if value is not None and (window is None or window < 1):
            raise ValueError(f"{name}[{layer}]={value!r} must be a positive integer, or None for no window")
    return windows


def _itemsize(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


def _dtype_name(dtype: object) -> str:
    try:
        name = jnp.dtype(dtype).name  # type: ignore[arg-type]
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; allowed: {', '.join(DTYPES)}")
    return name


jax.tree_util.register_static(CacheConfig)
