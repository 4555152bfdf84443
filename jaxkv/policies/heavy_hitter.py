"""The tokens that received the most attention (H2O, arXiv:2306.14048)."""

from dataclasses import dataclass

from jaxtyping import Array

from jaxkv.policies.attention_mass import MassPolicy
from jaxkv.policies.token_policy import Tokens


@dataclass(frozen=True)
class HeavyHitter(MassPolicy):
    """Keeps the `recent` last tokens, and of the others those with the greatest accumulated attention.

    In each layer and KV head on its own: the heads of a model look at different tokens.

    Attributes:
      budget: token places a sequence keeps, the recent ones among them.
      recent: last tokens that stay whatever they received.
      positions, rope: see `TokenPolicy`.

    Raises:
      ValueError: for a `recent` beyond the budget.
    """

    def rank(self, tokens: Tokens) -> Array:
        """Attention received; the recent ones above all."""
        return self.spare_recent(tokens.values["mass"], tokens)
