"""Chooses a page size from the waste and the table size of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxkv.planner.kv_bytes import check_count

CANDIDATES = (8, 16, 32, 64, 128, 256)
# Largest share of empty token slots.
_MOST_WASTE = 0.05


@dataclass(frozen=True, slots=True)
class PageCost:
    """Cost of one page size per sequence, averaged over the lengths.

    Attributes:
      page_size: tokens per page.
      pages: pages per sequence.
      wasted_tokens: empty token slots in the last page.
      waste: empty share of the sequence's token slots.
      table_bytes: a row of the page table, and 8 bytes per page for its refcount and the free stack.
    """

    page_size: int
    pages: float
    wasted_tokens: float
    waste: float
    table_bytes: float


@dataclass(frozen=True, slots=True)
class PageSizeChoice:
    """A page size, the reason for it, and the costs of all candidates."""

    page_size: int
    reason: str
    costs: tuple[PageCost, ...]


def choose_page_size(lengths: Sequence[int]) -> PageSizeChoice:
    """The page size for sequences of these lengths.

    It starts with 16 for mean lengths under 1K, 32 up to 4K, 64 up to 16K, 128 beyond, and halves the size
    while more than 5% of the token slots would be empty. Larger pages have fewer table entries and longer
    contiguous reads; smaller pages leave less of the last page empty.

    Args:
      lengths: tokens of a sample of the expected sequences.

    Raises:
      ValueError: for no lengths, or one that is not positive.

    Example:
      >>> choose_page_size([100, 200, 300]).page_size, choose_page_size([8192]).page_size
      (16, 64)
    """
    if not lengths:
        raise ValueError("lengths is empty; it must have at least one length")
    for length in lengths:
        length = check_count("length", length)
    mean = sum(lengths) / len(lengths)
    by_rule = 16 if mean < 1024 else 32 if mean <= 4096 else 64 if mean <= 16384 else 128
    costs = {size: _cost(lengths, size) for size in CANDIDATES}
    chosen = by_rule
    while chosen > CANDIDATES[0] and costs[chosen].waste > _MOST_WASTE:
        chosen //= 2
    empty = 100 * costs[by_rule].waste
    reason = f"lengths of {mean:,.0f} tokens on average: {by_rule} by rule, {empty:.1f}% empty"
    if chosen != by_rule:
        reason += f"; {chosen} leaves {100 * costs[chosen].waste:.1f}%"
    return PageSizeChoice(chosen, reason, tuple(costs.values()))


def expected_lengths(context: int) -> list[int]:
    """Lengths spread evenly up to a context, if no better sample is known.

    Example:
      >>> expected_lengths(8)
      [1, 2, 3, 4, 5, 6, 7, 8]
    """
    steps = min(context, 1000)
    return [max(1, round(context * (step + 1) / steps)) for step in range(steps)]


def _cost(lengths: Sequence[int], size: int) -> PageCost:
    pages = [-(-length // size) for length in lengths]
    slots, tokens, count = size * sum(pages), sum(lengths), len(lengths)
    row = 4 * max(pages)
    return PageCost(
        page_size=size,
        pages=sum(pages) / count,
        wasted_tokens=(slots - tokens) / count,
        waste=(slots - tokens) / slots,
        table_bytes=row + 8 * sum(pages) / count,
    )
