"""Packs prompts into prefill steps: what all share first, then the rest, in chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv.arguments import integer
from jaxkv.config import CacheConfig
from jaxkv.policies import Policy


def pack(
    token_lists: Sequence[Sequence[int] | np.ndarray], *, total_tokens: int | None = None
) -> tuple[Int[Array, " tokens"], Int[Array, " seqs"]]:
    """Joins the token ids of several sequences on one axis, followed by zeros. Runs on the host.

    Args:
      token_lists: token ids of each entry, from 0 up to the largest int32; an entry may be empty.
      total_tokens: length of the token axis; `allocate` needs it too. A step compiles once if all calls use
        one length. Default: the number of tokens.

    Returns:
      `tokens`, int32 `[total_tokens]`, for the model; and `num_tokens`, int32 `[entries]`, for `allocate`.

    Raises:
      ValueError: for more tokens than `total_tokens`, no entries, no tokens without a `total_tokens`, or an
        invalid token id; the message names the entry.

    Example:
      >>> import jaxkv
      >>> tokens, num_tokens = jaxkv.pack([[5, 6, 7], [], [8]], total_tokens=6)
      >>> tokens.tolist(), num_tokens.tolist()
      ([5, 6, 7, 8, 0, 0], [3, 0, 1])
    """
    rows = [_token_ids(entry, ids) for entry, ids in enumerate(token_lists)]
    if not rows:
        raise ValueError("token_lists is empty; it must have at least one entry")
    count = sum(len(row) for row in rows)
    if total_tokens is None and not count:
        raise ValueError("token_lists has no tokens; give the length of the token axis as total_tokens")
    total = count if total_tokens is None else integer("total_tokens", total_tokens)
    if count > total:
        raise ValueError(f"token_lists has {count} tokens in all, more than total_tokens={total}")
    tokens = np.concatenate([*rows, np.zeros(total - count, np.int32)])
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def _token_ids(entry: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except ValueError:  # lists in a list
        raise ValueError(f"token_lists[{entry}] must be a list of integers, not {ids!r:.100}") from None
    if array.shape == (0,):
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"token_lists[{entry}] must be a list of integers, not {array.dtype}{list(array.shape)}"
        )
    wrong = array[(array < 0) | (array > np.iinfo(np.int32).max)]
    if wrong.size:
        raise ValueError(
            f"token_lists[{entry}] has {wrong[0]}; a token id is from 0 to {np.iinfo(np.int32).max}"
        )
    return array.astype(np.int32)


class Stage(NamedTuple):
    """A part of each prompt, prefilled in chunks of `size` tokens.

    Attributes:
      prompts: the parts.
      size: tokens per chunk.
      most: most tokens of one prompt in a chunk, so that they fit its row beside what the policy keeps.
      observed: whether the policy observes the chunks and evicts.
      whole: whether a part is cut only after multiples of `most` tokens.
      forked: whether only the first prompt has a part, and the others are forked from it.
    """

    prompts: list[list[int]]
    size: int
    most: int
    observed: bool = True
    whole: bool = False
    forked: bool = False


def stages(
    prompts: list[list[int]], shared: int, largest: int, config: CacheConfig, policy: Policy | None
) -> list[Stage]:
    """What all prompts share, then the rest, then the last tokens if a policy observes only those."""
    last = 0 if policy is None else policy.last_step()
    most = most_at_once(policy, config, largest)
    rest = [prompt[shared:] for prompt in prompts]
    longest = max(shared, sum(len(prompt) for prompt in rest))
    size = min(largest, 1 << (longest - 1).bit_length())
    parts = []
    if shared:
        first = [prompts[0][:shared]] + [[]] * (len(prompts) - 1)
        parts.append(Stage(first, size, most, observed=not last, forked=True))
    if not last:
        return [*parts, Stage(rest, size, most, whole=policy is not None)]
    if any(len(prompt) > last for prompt in rest):
        parts.append(Stage([prompt[:-last] for prompt in rest], size, most, observed=False))
    size = max(size, last)
    return [*parts, Stage([prompt[-last:] for prompt in rest], size, size, whole=True)]


def chunks(prompts: list[list[int]], size: int, most: int, whole: bool):
    """Yields chunks of `size` tokens: `(num_tokens, tokens, which prompts end in it)`."""
    done = [0] * len(prompts)
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        parts, room = [], size
        for entry, prompt in enumerate(prompts):
            part = prompt[done[entry] : done[entry] + (most if whole else min(most, room))]
            parts.append(part if len(part) <= room else [])
            done[entry] += len(parts[-1])
            room -= len(parts[-1])
        tokens, num_tokens = pack(parts, total_tokens=size)
        ends = np.array(
            [bool(part) and at == len(prompt) for part, at, prompt in zip(parts, done, prompts, strict=True)]
        )
        yield num_tokens, tokens, ends


def most_at_once(policy: Policy | None, config: CacheConfig, largest: int) -> int:
    """Tokens of one prompt in a prefill step of `largest` tokens."""
    if config.layer_windows is not None:
        largest = min(largest, config.max_chunk)
    return largest if policy is None else policy.most_at_once(config, largest)


def common_pages(prompts: list[list[int]], config: CacheConfig, policy: Policy | None, largest: int) -> int:
    """Number of whole pages that all prompts begin with.

    Each prompt keeps at least one token of its own, or the policy's last step. The shared tokens end at a
    multiple of the policy's `shared_unit`, so that sharing does not change what it evicts.
    """
    own = 1 if policy is None else max(1, policy.last_step())
    common = max(min((len(prompt) for prompt in prompts), default=own) - own, 0)
    for prompt in prompts[1:]:
        pairs = zip(prompt[:common], prompts[0], strict=False)
        common = next((i for i, (mine, first) in enumerate(pairs) if mine != first), min(common, len(prompt)))
    unit = config.page_size if policy is None else policy.shared_unit(config, largest)
    return max(common, 0) // unit * unit // config.page_size
