"""Layers of several kinds in one pool: which layers share a row of the page table, and what their pages hold.

    layer        0   1   2   3   4   5            windows 8 8 None 8 8 None, two layers a group
    kind         w   w   f   w   w   f            f: full attention, w: a window of 8 tokens
    group        1   1   0   2   2   0            group 0 is full; groups 1 and 2 release their old pages

Layers with the same window and shape are of one kind. A kind is divided into groups of `group_layers` layers.
A group has a row of the page table for each sequence, and a page belongs to one group at a time. All pages
have equally many elements, so a kind with smaller heads has more tokens a page.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxkv.config import CacheConfig

# Each group costs a row of the page table for each sequence, and work in every operation.
MOST_GROUPS = 8


class Shape(NamedTuple):
    """What tells kinds of layers apart.

    Attributes:
      window: tokens that a token attends to, itself included; None for all of them.
      num_kv_heads: KV heads.
      head_dim: elements a head.
    """

    window: int | None
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a row of the page table.

    Attributes:
      layers: their numbers, in the order in which a page holds them.
      window: tokens that a token attends to, itself included; None for all of them.
      num_kv_heads: KV heads.
      head_dim: elements a head.
      page_size: token slots a page.
      columns: pages that a row holds at most.
    """

    layers: tuple[int, ...]
    window: int | None
    num_kv_heads: int
    head_dim: int
    page_size: int
    columns: int

    @property
    def shape(self) -> Shape:
        """What its kind is told apart by."""
        return Shape(self.window, self.num_kv_heads, self.head_dim)


class Home(NamedTuple):
    """Where a layer's K and V are: its group, and its number among the group's layers."""

    group: int
    nth: int


def kinds_of(config: "CacheConfig") -> dict[Shape, tuple[int, ...]]:
    """The layers of each kind; kinds with full attention first, else in the order of their first layers."""
    every = range(config.num_layers)
    if config.layer_windows is None and config.uniform:
        return {Shape(None, config.num_kv_heads, config.head_dim): tuple(every)}
    windows = config.layer_windows or [None for _ in every]
    heads = config.layer_kv_heads or [config.num_kv_heads for _ in every]
    dims = config.layer_head_dims or [config.head_dim for _ in every]
    kinds: dict[tuple[int | None, int, int], list[int]] = {}
    for layer, shape in enumerate(zip(windows, heads, dims, strict=True)):
        kinds.setdefault(shape, []).append(layer)
    full_first = sorted(kinds.items(), key=lambda kind: kind[0][0] is not None)
    return {Shape(*shape): tuple(layers) for shape, layers in full_first}


@lru_cache(maxsize=256)
def groups_of(config: "CacheConfig") -> tuple[Group, ...]:
    """The groups, those with full attention first."""
    size = group_layers(config)
    return tuple(
        Group(layers[first : first + size], *shape, page_size(config, shape), columns(config, shape))
        for shape, layers in kinds_of(config).items()
        for first in range(0, len(layers), size)
    )


@lru_cache(maxsize=256)
def homes_of(config: "CacheConfig") -> tuple[Home, ...]:
    """Where each layer's K and V are."""
    homes = {
        layer: Home(number, nth)
        for number, group in enumerate(groups_of(config))
        for nth, layer in enumerate(group.layers)
    }
    return tuple(homes[layer] for layer in range(config.num_layers))


def page_size(config: "CacheConfig", shape: Shape) -> int:
    """Token slots a page of this kind: as many elements as `config.page_size` tokens of the first kind.

    Raises:
      ValueError: where that is no whole number.
    """
    kinds, own = kinds_of(config), row_elements(config, shape)
    first = row_elements(config, next(iter(kinds)))
    elements = config.page_size * first
    if elements % own:
        step = lcm(first, *(row_elements(config, kind) for kind in kinds)) // first  # fits every kind
        raise ValueError(
            f"page_size={config.page_size}: a page would hold {elements / own:.2f} tokens of layers with "
            f"{shape.num_kv_heads} KV heads of {shape.head_dim}; take a multiple of {step}"
        )
    return elements // own


def row_elements(config: "CacheConfig", shape: Shape) -> int:
    """Elements of K of one token in one layer, as they are stored."""
    return shape.num_kv_heads * config.storage.row_size(shape.head_dim)


def columns(config: "CacheConfig", shape: Shape) -> int:
    """Pages of a row: all of a sequence's, or those that hold its window, `rollback` and one chunk."""
    size = page_size(config, shape)
    if shape.window is None:
        return -(-config.max_tokens_per_seq // size)
    # The window of the chunk's first token, from anywhere in a page on, and the chunk.
    return -(-(size + shape.window + config.rollback + config.max_chunk - 2) // size)


def decode_pages(config: "CacheConfig", shape: Shape, num_tokens: int) -> int:
    """Pages that a sequence of `num_tokens` tokens holds at most while it is decoded, in one group."""
    size = page_size(config, shape)
    if shape.window is None:
        return -(-num_tokens // size)
    return -(-min(num_tokens, size + shape.window + config.rollback - 1) // size)


@lru_cache(maxsize=256)
def group_layers(config: "CacheConfig") -> int:
    """Layers a group: as configured, or those that take the fewest bytes.

    The bytes are those of one sequence of `max_tokens_per_seq` tokens, padding included. At most
    `MOST_GROUPS` groups, unless there are more kinds than that; of equals the fewest groups.
    """
    if config.group_layers is not None:
        return config.group_layers
    most = config.max_tokens_per_seq
    kinds = [(len(of), decode_pages(config, shape, most)) for shape, of in kinds_of(config).items()]

    def num_groups(size: int) -> int:
        return sum(-(-layers // size) for layers, _ in kinds)

    def cost(size: int) -> tuple[int, int]:
        return size * sum(-(-layers // size) * pages for layers, pages in kinds), num_groups(size)

    largest = max(layers for layers, _ in kinds)
    allowed = [size for size in range(1, largest + 1) if num_groups(size) <= MOST_GROUPS]
    return min(allowed or [largest], key=cost)


def scale_slots(config: "CacheConfig") -> tuple[int, ...]:
    """Elements of K's and of V's scales of one page in one layer, enough for the kind that needs most.

    Each kind views them as `[kv_heads, slots, ...]`, with at least `page_size` slots.
    """
    needs = [_scale_shapes(config, shape) for shape in kinds_of(config)]
    return tuple(_fits_all(side) for side in zip(*needs, strict=True))


def _scale_shapes(config: "CacheConfig", shape: Shape) -> tuple[tuple[int, ...], ...]:
    """Of a page in one layer: K's and V's `[kv_heads, page_size, ...]`."""
    row = config.storage.row_size(shape.head_dim)
    return config.storage.scale_shapes((shape.num_kv_heads, page_size(config, shape), row))


def _fits_all(shapes: tuple[tuple[int, ...], ...]) -> int:
    step = lcm(*(prod((heads, *words)) for heads, _, *words in shapes))
    return -(-max(map(prod, shapes)) // step) * step
