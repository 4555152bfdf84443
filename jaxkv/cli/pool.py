"""Sizes the cache of a command, within the context that its model was trained on."""

import argparse
from typing import TYPE_CHECKING

from jaxkv import sizing
from jaxkv.beginnings import begin_in_pairs
from jaxkv.cli.options import KV_DTYPES
from jaxkv.config import CacheConfig
from jaxkv.errors import SequenceTooLongError
from jaxkv.generating import PREFILL_CHUNK
from jaxkv.policies import Policy

if TYPE_CHECKING:
    from jaxkv.models import LoadedModel  # which needs an extra


def fitting_config(
    loaded: "LoadedModel",
    ids: list[list[int]],
    options: argparse.Namespace,
    num_samples: int,
    num_pages: int | None,
    policy: Policy | None = None,
    *,
    prefix_cache: bool = False,
) -> CacheConfig:
    """A pool that holds every sequence at its longest, unless `num_pages` is given.

    Prompts that begin alike find each other's pages with `prefix_cache`, or where not all begin alike.

    Raises:
      SequenceTooLongError: for a prompt beyond the trained context.
    """
    lengths = [len(tokens) for tokens in ids]
    for number, length in enumerate(lengths):
        check_context(loaded, f"prompt {number}", length, options, policy)
    dtype, quantization = KV_DTYPES.get(options.kv_dtype, (None, None))
    return sizing.fitting_config(
        loaded.model,
        lengths,
        [options.max_new_tokens] * len(lengths),
        num_samples,
        policy,
        PREFILL_CHUNK,
        num_pages=num_pages,
        max_context=loaded.config.max_context,
        page_size=options.page_size,
        quantization=quantization,
        prefix_cache=prefix_cache or (policy is None and begin_in_pairs(ids, options.page_size or 16)),
        **({} if dtype is None else {"dtype": dtype}),
    )


def check_context(
    loaded: "LoadedModel", name: str, num_tokens: int, options: argparse.Namespace, policy: Policy | None
) -> None:
    """Refuses a prompt that exceeds the context that the model was trained on.

    Args:
      loaded: the model.
      name: of the prompt, for the error.
      num_tokens: of the prompt.
      options: those of the command.
      policy: the eviction policy, or None.

    Raises:
      SequenceTooLongError: naming the prompt, the position it reaches and the trained context.
    """
    context, new = loaded.config.max_context, options.max_new_tokens
    bounded = policy is not None and not policy.once
    if num_tokens > context and not bounded:
        raise SequenceTooLongError(f"{name} has {num_tokens} tokens; {loaded.name} was trained on {context}")
    if policy is None:
        return
    config = loaded.config.cache_config(num_pages=1, page_size=options.page_size)
    reached = policy.last_position(config, num_tokens, new, PREFILL_CHUNK)
    if reached <= context:
        return
    start = f"{name} and {new} new tokens reach position {reached} with --policy {options.policy}"
    trained = f"{loaded.name} was trained on {context}"
    if policy.once:
        raise SequenceTooLongError(f"{start}, which keeps all new tokens; {trained}")
    advice = "positions=cache has no limit" if policy.most_positions(config) is None else "keep fewer tokens"
    raise SequenceTooLongError(f"{start}; {trained}: {advice}")
