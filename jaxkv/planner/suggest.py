"""Suggests changes that make a plan fit; each suggestion is a plan that fits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxkv.config import QUANTIZATIONS
from jaxkv.planner.kv_bytes import KV_BITS
from jaxkv.planner.memory_plan import Plan
from jaxkv.units import format_mebibytes

_MOST_DEVICES, _MOST_SUGGESTIONS = 16, 6


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A change that makes a plan fit.

    Attributes:
      text: for display, with its value.
      change: arguments of `plan` that differ.
      plan: the plan with the change.
    """

    text: str
    change: dict[str, Any]
    plan: Plan


def suggestions(refused: Plan) -> list[Suggestion]:
    """Single changes that make a plan fit; if none suffices, combinations of two or three.

    Args:
      refused: a plan that does not fit; for one that fits there are no suggestions.
    """
    if refused.fits:
        return []
    begun = [Suggestion("", {}, refused)]
    for _ in range(3):
        # The next round adds a change to those that do not fit yet.
        tried = [found for first in begun for found in _further(first)]
        if found := [suggestion for suggestion in tried if suggestion.plan.fits]:
            return _distinct(found)[:_MOST_SUGGESTIONS]
        begun = [suggestion for suggestion in tried if not suggestion.plan.fits]
    return []


def _further(first: Suggestion) -> Iterator[Suggestion]:
    for second in _single_changes(first.plan):
        if not set(first.change) & set(second.change):
            text = f"{first.text}; and {second.text}" if first.text else second.text
            yield Suggestion(text, first.change | second.change, second.plan)


def _distinct(found: list[Suggestion]) -> list[Suggestion]:
    """Keeps one of the suggestions with the same changes in another order."""
    return list(
        {tuple(sorted(suggestion.change.items())): suggestion for suggestion in reversed(found)}.values()
    )[::-1]


def _single_changes(plan: Plan) -> Iterator[Suggestion]:
    yield from _shorter(plan)
    yield from _fewer(plan)
    if plan.weights_dtype == plan.kv_dtype == "float32":
        change = dict(weights_dtype="bfloat16", kv_dtype="bfloat16")
        yield _suggestion(plan, "keep the weights, and K and V, in bfloat16", **change)
    yield from _narrower_kv(plan)
    yield from _narrower_weights(plan)
    yield from _more_devices(plan)


def _shorter(plan: Plan) -> Iterator[Suggestion]:
    longest = min(plan.max_context, plan.context)
    # Whole pages, unless not even one fits.
    longest = longest // plan.page_size * plan.page_size or longest
    if longest:
        yield _suggestion(plan, f"shorten the context to {longest:,} tokens", context=longest)


def _fewer(plan: Plan) -> Iterator[Suggestion]:
    if plan.max_concurrency:
        most = plan.max_concurrency
        text = f"serve {most:,} sequences" if most > 1 else "serve one sequence"
        yield _suggestion(plan, text, concurrency=most)


def _narrower_kv(plan: Plan) -> Iterator[Suggestion]:
    for dtype in ("bfloat16", *sorted(QUANTIZATIONS, key=KV_BITS.__getitem__)[::-1]):
        if KV_BITS[dtype] < KV_BITS[plan.kv_dtype]:
            saved = plan.kv.reserved - replace(plan, kv_dtype=dtype).kv.reserved
            # A format that refuses the model's head_dim has no layer groups, and may take more.
            if saved > 0:
                text = f"keep K and V in {dtype}, {format_mebibytes(saved)} less"
                yield _suggestion(plan, text, kv_dtype=dtype)


def _narrower_weights(plan: Plan) -> Iterator[Suggestion]:
    for dtype in ("bfloat16", "fp8", "int8", "int4"):
        saved = plan.weights - replace(plan, weights_dtype=dtype).weights
        if saved > 0:
            text = f"keep the weights in {dtype}, {format_mebibytes(saved)} less"
            yield _suggestion(plan, text, weights_dtype=dtype)


def _more_devices(plan: Plan) -> Iterator[Suggestion]:
    """The fewest devices that suffice, else the most."""
    shape = plan.shape
    even = [
        replace(plan, tensor_parallel=devices)
        for devices in range(plan.tensor_parallel + 1, min(shape.num_q_heads, _MOST_DEVICES) + 1)
        if shape.num_q_heads % devices == 0
        and (shape.is_latent or shape.num_kv_heads % devices == 0 or devices % shape.num_kv_heads == 0)
    ]
    for more in [made for made in even if made.fits][:1] or even[-1:]:
        text = f"share it among {more.tensor_parallel} devices, {format_mebibytes(more.needed)} on each"
        yield _suggestion(plan, text, tensor_parallel=more.tensor_parallel)


def _suggestion(plan: Plan, text: str, **change: Any) -> Suggestion:
    return Suggestion(text, change, replace(plan, **change))
