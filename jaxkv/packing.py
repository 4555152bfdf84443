"""How prompts are packed into prefill steps: what they share, in what order, so many tokens at a time."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxkv.config import CacheConfig
from jaxkv.policies import Policy, SlidingWindow
from jaxkv.state import PolicyState


class Stage(NamedTuple):
    """A part of each prompt, prefilled in chunks of `size` tokens.

    Attributes:
      prompts: the parts.
      size: tokens a chunk.
      most: tokens of one prompt in a chunk: where it keeps as much as it may, they must fit its row.
      observed: whether the policy takes note and evicts.
      whole: whether every `most` tokens of a part stay together, wherever the chunk before them ended.
      forked: whether it is the first prompt's alone, and the others take it from there.
    """

    prompts: list[list[int]]
    size: int
    most: int
    observed: bool = True
    whole: bool = False
    forked: bool = False


def stages(prompts: list[list[int]], shared: int, largest: int, policy: PolicyState | None) -> list[Stage]:
    """What all prompts share, then the rest; last, on its own, the end that a policy asks for."""
    last = policy.policy.observe_last if policy is not None else None
    most = largest if policy is None else most_at_once(policy.policy, policy.config, largest)
    rest = [prompt[shared:] for prompt in prompts]
    longest = max(shared, sum(len(prompt) for prompt in rest))
    size = min(largest, 1 << (longest - 1).bit_length())
    parts = []
    if shared:
        first = [prompts[0][:shared]] + [[]] * (len(prompts) - 1)
        parts.append(Stage(first, size, most, observed=last is None, forked=True))
    if last is None:
        return [*parts, Stage(rest, size, most, whole=policy is not None)]
    if any(len(prompt) > last for prompt in rest):
        parts.append(Stage([prompt[:-last] for prompt in rest], size, most, observed=False))
    size = max(size, last)
    return [*parts, Stage([prompt[-last:] for prompt in rest], size, size, whole=True)]


def chunks(prompts: list[list[int]], size: int, most: int, whole: bool):
    """Packs prompts into chunks of `size` tokens: `(num_tokens, tokens, which prompts end here)`."""
    done = [0] * len(prompts)
    while any(at < len(prompt) for at, prompt in zip(done, prompts, strict=True)):
        num_tokens, tokens = np.zeros(len(prompts), np.int32), []
        for entry, prompt in enumerate(prompts):
            room = size - len(tokens)
            part = prompt[done[entry] : done[entry] + (most if whole else min(most, room))]
            if len(part) > room:
                continue
            num_tokens[entry] = len(part)
            done[entry] += len(part)
            tokens += part
        lengths = np.array([len(prompt) for prompt in prompts])
        ends = (num_tokens > 0) & (np.array(done) == lengths)
        padded = np.zeros(size, np.int32)
        padded[: len(tokens)] = tokens
        yield jnp.asarray(num_tokens), jnp.asarray(padded), ends


def most_at_once(policy: Policy, config: CacheConfig, largest: int) -> int:
    """Tokens of a prompt after which a policy evicts, if it is one that does."""
    if policy.observe_last is not None:
        return largest
    return min(largest, config.max_tokens_per_seq - policy.most_kept(config))


def common_pages(
    prompts: list[list[int]], own: int, config: CacheConfig, policy: Policy | None, largest: int
) -> int:
    """Whole pages that all prompts begin with; each keeps `own` tokens or more to itself.

    Where it matters when a policy evicts, only as far as each of them alone would be evicted from too.
    """
    common = max(min((len(prompt) for prompt in prompts), default=own) - own, 0)
    for prompt in prompts[1:]:
        pairs = zip(prompt[:common], prompts[0], strict=False)
        common = next((i for i, (mine, first) in enumerate(pairs) if mine != first), min(common, len(prompt)))
    unit = config.page_size
    # A window hides the same tokens whenever it gives back their pages.
    exact = isinstance(policy, SlidingWindow) and policy.positions == "original"
    if policy is not None and policy.observe_last is None and not exact:
        unit = math.lcm(unit, most_at_once(policy, config, largest))
    return max(common, 0) // unit * unit // config.page_size
