"""Sizes a cache by an amount of memory, a context length, or prompts and new tokens."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxkv import catalog
from jaxkv.arguments import whole
from jaxkv.config import MAX_TOKENS, CacheConfig
from jaxkv.groups import decode_pages
from jaxkv.policies import Policy
from jaxkv.units import format_bytes, parse_bytes


def for_context_length(context: int, *, memory: str | int | None = None, **options: Any) -> CacheConfig:
    """A config whose sequences hold `context` tokens each.

    Layers with a window need more pages for a sequence while a chunk of its prompt is prefilled, until its
    next token. The pool has these for one sequence at a time.

    Args:
      context: tokens of the longest sequence.
      memory: most memory for the cache, in bytes or like "12GiB"; the pool gets as many pages as fit.
        Default: enough for `max_seqs` sequences of `context`.
      options: the other arguments of `CacheConfig`, without `num_pages` and `max_pages_per_seq`.

    Raises:
      ValueError: if not even one sequence fits the memory.

    Example:
      >>> sizes = dict(num_layers=32, num_kv_heads=8, head_dim=128)
      >>> for_context_length(8192, memory="4GiB", **sizes).max_context_length()
      8192
    """
    tokens = whole(context)
    if tokens is None or tokens < 1:
        raise ValueError(f"context={context!r} must be a positive integer")
    row = row_config(tokens, **options)
    if memory is None:
        return replace(row, num_pages=pages_for_seqs(row, tokens, row.max_seqs))
    allowed = parse_bytes(memory)
    least = replace(row, num_pages=pages_for_seqs(row, tokens, 1))
    spare = allowed - least.estimated_memory_bytes()
    if spare < 0:
        raise ValueError(
            f"memory={format_bytes(allowed)} does not hold one sequence of {tokens} tokens, "
            f"which takes {least.estimated_memory()}"
        )
    # Each further page takes its bytes, a refcount and an entry of the free stack.
    more = spare // (row.page_bytes + 8)
    return replace(least, num_pages=min(least.num_pages + more, (MAX_TOKENS - 1) // row.page_size))


def row_config(context: int, **options: Any) -> CacheConfig:
    """A config whose sequences may have `context` tokens; the pool has the pages of one full row only.

    Args:
      context: tokens of the longest sequence.
      options: the other arguments of `CacheConfig`, without `num_pages` and `max_pages_per_seq`.
    """
    one = CacheConfig(**options, num_pages=1, max_pages_per_seq=1)
    pages = one.pages_for(context)
    return replace(one, num_pages=pages, max_pages_per_seq=pages)


def pages_for_seqs(config: CacheConfig, num_tokens: int, num_seqs: int) -> int:
    """Pages of `num_seqs` sequences of `num_tokens` tokens, while one of them prefills a chunk."""
    return config.pages_for_seq(num_tokens) * num_seqs + config.pages_for_chunk(num_tokens)


def from_preset(name: str, *, memory: str | int | None = None, **options: Any) -> CacheConfig:
    """A config from `configs/presets`: "small", "medium", "large", or "custom", which sets no sizes.

    Args:
      name: of the preset.
      memory: most memory for the cache, in bytes or like "12GiB". Default: the preset's.
      options: arguments of `for_context_length`, which override the preset's.

    Raises:
      ValueError: for an unknown preset, or sizes that neither it nor the options give.

    Example:
      >>> from_preset("small", memory="1GiB", max_seqs=8).num_pages
      585
    """
    preset = catalog.read("presets", name)
    sizes = {field: value for field, value in preset.items() if field not in ("description", "memory")}
    sizes |= options
    memory = memory if memory is not None else preset.get("memory")
    needed = ("max_context", "num_layers", "num_kv_heads", "head_dim")
    missing = [field for field in needed if field not in sizes] + ["memory"] * (memory is None)
    if missing:
        raise ValueError(f"preset {name!r} does not set {', '.join(missing)}; give them")
    return for_context_length(sizes.pop("max_context"), memory=memory, **sizes)


def token_slots(
    config: Callable[..., CacheConfig],
    page_size: int,
    num_tokens: int,
    new_tokens: int,
    policy: Policy | None,
    prefill_chunk: int,
) -> int:
    """Most token slots that a prompt and its continuation use.

    Args:
      config: makes a `CacheConfig` from `num_pages`, `page_size` and other sizes.
      page_size: token slots per page.
      num_tokens: of the prompt.
      new_tokens: most tokens to generate.
      policy: the eviction policy, or None.
      prefill_chunk: most tokens per prefill step.
    """
    if policy is None:
        return num_tokens + new_tokens
    # With a row that holds all tokens: a policy's capacity may be a share of it.
    whole = config(num_pages=-(-(num_tokens + new_tokens) // page_size), page_size=page_size)
    return policy.token_slots(whole, num_tokens, new_tokens, prefill_chunk)


def pool_sizes(
    make: Callable[..., CacheConfig],
    lengths: Sequence[int],
    totals: Sequence[int],
    slots: Sequence[int],
    num_samples: int,
    policy: Policy | None,
    prefill_chunk: int,
) -> dict[str, int]:
    """Arguments of `make` for a pool that holds every sequence at its longest.

    Args:
      make: makes the `CacheConfig` of `num_pages` and other sizes.
      lengths: tokens of each prompt.
      totals: tokens of each prompt and its continuation, dropped ones included; layers with a window need
        pages for the last of these.
      slots: most token slots of each prompt and its continuation.
      num_samples: continuations of each prompt.
      policy: the eviction policy, or None.
      prefill_chunk: most tokens per prefill step.
    """
    row = make(num_pages=1).pages_for(max(slots))
    config = make(num_pages=row, max_pages_per_seq=row)
    pages = [
        sum(decode_pages(config, of.shape, most if of.window is None else total) for of in config.groups)
        for most, total in zip(slots, totals, strict=True)
    ]
    # Samples of a prompt copy its partly filled last pages before the ones they share are given back.
    spare = len(lengths) * len(config.groups) if num_samples > 1 else 0
    step = prefill_chunk if policy is None else max(prefill_chunk, policy.last_step())
    spare += _pages_for_step(config, lengths, step)
    if policy is not None and (num_samples > 1 or len(lengths) > 1):
        # And what a policy keeps of shared pages goes to pages of each sequence's own, in each full group.
        copied = sum(-(-policy.copied_tokens(length) // config.page_size) for length in lengths)
        spare += copied * sum(group.window is None for group in config.groups)
    return dict(
        num_pages=sum(pages) * num_samples + spare,
        page_size=config.page_size,
        max_seqs=len(lengths) * num_samples,
        max_pages_per_seq=row,
    )


def _pages_for_step(config: CacheConfig, lengths: Sequence[int], num_tokens: int) -> int:
    """Pages more than while they are decoded that prompts hold, all together, in a step of their prefill.

    Args:
      config: of the cache.
      lengths: tokens of each prompt.
      num_tokens: of the step.
    """
    pages = 0
    for group in config.groups:
        all_stored = [min(group.columns, -(-length // group.page_size)) for length in lengths]
        more = sum(
            most - min(most, decode_pages(config, group.shape, length))
            for most, length in zip(all_stored, lengths, strict=True)
        )
        # Each part of the step goes to whole pages and one more.
        pages += min(more, num_tokens // group.page_size + len(lengths))
    return pages


def fitting_config(
    model: Any,
    lengths: Sequence[int],
    new_tokens: Sequence[int],
    num_samples: int,
    policy: Policy | None,
    prefill_chunk: int,
    *,
    num_pages: int | None = None,
    max_context: int | None = None,
    **options: Any,
) -> CacheConfig:
    """A config from the model's `cache_config`, for a pool that holds every sequence at its longest.

    Args:
      model: has the method `cache_config(**sizes)`.
      lengths: tokens of each prompt.
      new_tokens: most tokens of each prompt's continuations.
      num_samples: continuations of each prompt.
      policy: the eviction policy, or None.
      prefill_chunk: most tokens per prefill step.
      num_pages: pages of the pool, instead of enough for all.
      max_context: most tokens of a sequence without a policy. Default: no limit.
      options: other arguments of `cache_config`.

    Raises:
      ValueError: for a model without such a method.
    """
    if not callable(getattr(model, "cache_config", None)):
        raise ValueError(
            f"{type(model).__name__} has no method cache_config(**sizes) to size a cache with; give "
            "generate(model, prompts, config) a CacheConfig, or cache="
        )
    make = partial(model.cache_config, **options)
    page_size = make(num_pages=1).page_size
    slots = [
        max(1, token_slots(make, page_size, length, new, policy, prefill_chunk))
        for length, new in zip(lengths, new_tokens, strict=True)
    ]
    totals = [max(1, length + new) for length, new in zip(lengths, new_tokens, strict=True)]
    if policy is None and max_context is not None:
        slots = [min(count, max_context) for count in slots]
    sizes = pool_sizes(make, lengths, totals, slots, num_samples, policy, prefill_chunk)
    if num_pages is not None:
        sizes |= dict(num_pages=num_pages, max_pages_per_seq=min(sizes["max_pages_per_seq"], num_pages))
    return make(**sizes)
