"""Keeps the tokens that received the most attention (H2O, arXiv:2306.14048)."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Array

from jaxkv.policies.attention_mass import MassPolicy
from jaxkv.policies.token_policy import Tokens


@dataclass(frozen=True)
class HeavyHitter(MassPolicy):
    """Keeps the `recent` last tokens, and of the others those with the greatest accumulated attention.

    Each layer and KV head chooses separately, since heads attend to different tokens.

    Attributes:
      budget: tokens that a sequence keeps, including the recent ones.
      recent: last tokens, always kept.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a `recent` beyond the budget.
    """

    name: ClassVar[str] = "heavy-hitter"

    def rank(self, tokens: Tokens) -> Array:
        """Attention received; infinity for the recent tokens."""
        return self.spare_recent(tokens.values["mass"], tokens)
