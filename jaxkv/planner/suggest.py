"""What would make a plan fit: each suggestion was planned itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxkv.planner.kv_bytes import KV_BITS
from jaxkv.planner.plan import WEIGHT_BITS, Plan
from jaxkv.units import format_bytes

_MOST_DEVICES = 1024


@dataclass(frozen=True, slots=True)
class Suggestion:
    """One way out.

    Attributes:
      text: for people, with its number.
      change: arguments of `plan` that differ.
      plan: the plan with them; it fits.
    """

    text: str
    change: dict[str, Any]
    plan: Plan


def suggestions(refused: Plan) -> list[Suggestion]:
    """Ways to make a plan fit, one change each; two changes where no single one is enough.

    Args:
      refused: a plan that does not fit. One that does needs none.
    """
    if refused.fits:
        return []
    singles = [found for found in _single_changes(refused) if found.plan.fits]
    return singles or [found for found in _pairs(refused) if found.plan.fits][:3]


def _single_changes(plan: Plan) -> Iterator[Suggestion]:
    yield from _shorter(plan)
    yield from _fewer(plan)
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
        yield _suggestion(plan, f"serve {plan.max_concurrency:,} sequences", concurrency=plan.max_concurrency)


def _narrower_kv(plan: Plan) -> Iterator[Suggestion]:
    for dtype in ("fp8", "int8"):
        if KV_BITS[dtype] < KV_BITS[plan.kv_dtype]:
            saved = plan.kv.paged - replace(plan, kv_dtype=dtype).kv.paged
            yield _suggestion(plan, f"keep K and V in {dtype}, {format_bytes(saved)} less", kv_dtype=dtype)


def _narrower_weights(plan: Plan) -> Iterator[Suggestion]:
    for dtype in ("fp8", "int8", "int4"):
        saved = plan.weights - replace(plan, weights_dtype=dtype).weights
        if saved > 0 and dtype in WEIGHT_BITS:
            yield _suggestion(
                plan, f"quantize the weights to {dtype}, {format_bytes(saved)} less", weights_dtype=dtype
            )


def _more_devices(plan: Plan) -> Iterator[Suggestion]:
    devices = plan.tensor_parallel + 1
    while devices <= min(plan.shape.num_q_heads, _MOST_DEVICES):
        if plan.shape.num_q_heads % devices == 0 and (more := replace(plan, tensor_parallel=devices)).fits:
            text = f"share it among {devices} devices, {format_bytes(more.needed)} on each"
            yield _suggestion(plan, text, tensor_parallel=devices)
            return
        devices += 1


def _pairs(plan: Plan) -> Iterator[Suggestion]:
    for first in (*_narrower_weights(plan), *_narrower_kv(plan)):
        for second in _single_changes(first.plan):
            if second.plan.fits and not set(first.change) & set(second.change):
                yield Suggestion(
                    f"{first.text}; and {second.text}", first.change | second.change, second.plan
                )


def _suggestion(plan: Plan, text: str, **change: Any) -> Suggestion:
    return Suggestion(text, change, replace(plan, **change))
