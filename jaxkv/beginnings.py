"""Which prompts of a call begin alike, and in which order to run them so that none computes it twice."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Beginning(NamedTuple):
    """What a prompt has in common with the ones before it.

    Attributes:
      shared: tokens that it begins with like an earlier prompt: whole blocks, and not all of its tokens.
      wave: the prompts of a wave are run together, after those of earlier waves.
    """

    shared: int
    wave: int


def beginnings(prompts: Mapping[int, list[int]], block: int) -> dict[int, Beginning]:
    """For each prompt the longest beginning that an earlier one has too.

    Args:
      prompts: token ids by number, in order.
      block: tokens that can be shared together.

    Example:
      >>> beginnings({0: [1, 2, 3, 4, 5], 1: [1, 2, 3, 4, 6], 2: [1, 2, 9]}, block=2)
      {0: Beginning(shared=0, wave=0), 1: Beginning(shared=4, wave=1), 2: Beginning(shared=2, wave=1)}
    """
    arrays = {number: np.asarray(prompt) for number, prompt in prompts.items()}
    found: dict[int, Beginning] = {}
    for number, prompt in arrays.items():
        best = Beginning(0, 0)
        for earlier, of in found.items():
            shared = _common(prompt[:-1], arrays[earlier]) // block * block
            wave = of.wave + 1
            if shared > best.shared or (shared == best.shared > 0 and wave < best.wave):
                best = Beginning(shared, wave)
        found[number] = best
    return found


def begin_in_pairs(prompts: Sequence[list[int]], block: int = 16) -> bool:
    """Whether some of the prompts begin alike for longer than all of them do.

    Example:
      >>> begin_in_pairs([[1, 2, 3], [1, 2, 4], [5, 6, 7]], block=2)
      True
      >>> begin_in_pairs([[1, 2, 3], [1, 2, 4]], block=2)
      False
    """
    shared = sum(one.shared for one in beginnings(dict(enumerate(prompts)), block).values())
    arrays = [np.asarray(prompt) for prompt in prompts]
    common = min((min(_common(arrays[0], one), len(one) - 1) for one in arrays), default=0)
    return shared > (len(prompts) - 1) * (common // block * block)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many of the first elements are equal."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(np.argmax(differ)) if differ.any() else length
