"""Proposes the next tokens of a text, to be verified together: speculative decoding.

A proposal never changes what is generated: each token is drawn from the model's own distribution, and
proposed tokens count as long as they are the ones drawn (arXiv:2211.17192, with equality instead of a ratio,
since the draws of a sample are fixed by its seed).
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxkv.arguments import integer
from jaxkv.config import CacheConfig
from jaxkv.entries import rows_of


@runtime_checkable
class Drafter(Protocol):
    """What proposes tokens; hashable, for it is a static argument. A draft model keeps its cache in a state.

    Attributes:
      num_tokens: most tokens proposed for a sample in a step.
    """

    num_tokens: int

    def init(self, config: CacheConfig) -> Any:
        """What is kept from step to step, a pytree of arrays; None for nothing.

        Args:
          config: of the server's cache; `max_seqs` is the number of slots.
        """
        ...

    def propose(
        self,
        state: Any,
        tokens: Int[Array, "slots max_tokens"],
        lengths: Int[Array, " slots"],
    ) -> tuple[Any, Int[Array, "slots num_tokens"], Int[Array, " slots"]]:
        """The state, proposed tokens, and how many there are for each slot.

        Args:
          state: what `init` or the last call returned.
          tokens: text of the sample in each slot, its newest token included, padded at the end.
          lengths: its tokens; 0 for a slot that does not decode. A slot's text may be another sample's
            than at the last call, and differ in any token.
        """
        ...


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Proposes what followed the last tokens the last time they occurred in the same text.

        text      the cat sat on the mat. the cat
        ngram 2   the cat [sat on the]          num_tokens 3

    For summaries, edits of code and whatever repeats itself (Saxena, "Prompt Lookup Decoding", 2023). Costs
    `slots * max_tokens` comparisons a step for each token of the n-gram.

    Attributes:
      ngram: tokens that must agree.
      num_tokens: most tokens proposed.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxkv.serving import PromptLookup
      >>> text = jnp.array([[5, 6, 7, 8, 5, 6, 0, 0]])
      >>> _, proposed, count = PromptLookup(ngram=2, num_tokens=3).propose(None, text, jnp.array([6]))
      >>> proposed[0, :count[0]].tolist()
      [7, 8, 5]
    """

    ngram: int = 3
    num_tokens: int = 4

    def __post_init__(self):
        for name in ("ngram", "num_tokens"):
            object.__setattr__(self, name, integer(name, getattr(self, name), below=2**16))

    def init(self, config: CacheConfig) -> None:
        """Nothing is kept."""

    def propose(
        self, state: None, tokens: Int[Array, "slots max_tokens"], lengths: Int[Array, " slots"]
    ) -> tuple[None, Int[Array, "slots num_tokens"], Int[Array, " slots"]]:
        """See `Drafter.propose`."""
        slots, width = tokens.shape
        column = jnp.arange(width, dtype=jnp.int32)[None]
        slot = jnp.arange(slots, dtype=jnp.int32)[:, None]
        # Whether the n-gram that ends before each column is the last one of the text.
        agrees = (column >= self.ngram) & (column < lengths[:, None])
        for back in range(1, self.ngram + 1):
            newest = rows_of(tokens, (slot, jnp.maximum(lengths[:, None] - back, 0)))
            agrees &= jnp.roll(tokens, back, axis=1) == newest
        begin = jnp.max(jnp.where(agrees, column, 0), axis=1)
        at = begin[:, None] + jnp.arange(self.num_tokens, dtype=jnp.int32)[None]
        count = jnp.where(begin > 0, jnp.minimum(lengths - begin, self.num_tokens), 0)
        return None, rows_of(tokens, (slot, at)), count
