"""Static sizes of a server."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from jaxkv.arguments import integer, whole
from jaxkv.config import CacheConfig
from jaxkv.policies import Policy
from jaxkv.serving.speculation import Drafter


@jax.tree_util.register_static
@dataclass(frozen=True, slots=True)
class ServingConfig:
    """Sizes of a server; hashable, so it can be a static argument.

    Attributes:
      cache: sizes of its cache. `max_seqs` is how many samples run at once.
      max_requests: samples that can run, wait, or be finished and not yet taken.
      max_tokens: most tokens of a sample, its prompt and its new tokens. Default: what a row of the page
        table holds.
      token_budget: most tokens of one step, prompts and new tokens together. Default: 256, or what a step
        without prompts needs if that is more.
      widths: the steps that are compiled, by their number of tokens, rising: a step takes the first that
        holds its tokens. Default: a step of new tokens alone, and `token_budget`. More of them waste less
        of a step that is not full, and take longer to compile.
      max_stop_tokens: most stop tokens of a request.
      log_probs: whether to keep the log-probability of every new token.
      speculate: proposes tokens that are verified together, several a step; `PromptLookup` or another
        `Drafter`. Default: one token a step.
      policy: bounds each sequence's memory; see `jaxkv.policies`. What is generated is then no longer
        independent of chunks and preemptions.

    Raises:
      ValueError: naming the field and what is allowed.

    Example:
      >>> import jaxkv
      >>> cache = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=64, max_seqs=8,
      ...                           max_pages_per_seq=16, prefix_cache=True)
      >>> jaxkv.serving.ServingConfig(cache, max_requests=32, token_budget=128).widths
      (8, 128)
    """

    cache: CacheConfig
    max_requests: int = 64
    max_tokens: int = None  # type: ignore[assignment]  # filled in below
    token_budget: int = None  # type: ignore[assignment]
    widths: tuple[int, ...] = None  # type: ignore[assignment]
    max_stop_tokens: int = 8
    log_probs: bool = False
    speculate: Drafter | None = None
    policy: Policy | None = None

    def __post_init__(self):
        if not isinstance(self.cache, CacheConfig):
            raise ValueError(f"cache={self.cache!r:.200} must be a jaxkv.CacheConfig")
        if self.speculate is not None and not isinstance(self.speculate, Drafter):
            raise ValueError(f"speculate={self.speculate!r:.200} must be a jaxkv.serving.Drafter")
        if self.policy is not None and not isinstance(self.policy, Policy):
            raise ValueError(f"policy={self.policy!r:.200} must be a jaxkv.Policy")
        if self.policy is not None and self.policy.last_step():
            raise ValueError(
                f"{self.policy} observes the last {self.policy.last_step()} tokens of a prompt alone; a "
                "server's steps hold several prompts"
            )
        if self.policy is not None and self.speculate is not None:
            raise ValueError(f"{self.policy} drops tokens; speculation must be able to take them back")
        self._settle("max_requests", 64)
        self._settle("max_tokens", self.cache.max_tokens_per_seq, least=2)
        decoding = self.cache.max_seqs * self.tokens_per_sample
        self._settle("token_budget", max(256, decoding), least=decoding)
        self._settle("max_stop_tokens", 8)
        object.__setattr__(self, "log_probs", bool(self.log_probs))
        object.__setattr__(self, "widths", self._settled_widths(decoding))

    def _settle(self, name: str, default: int, least: int = 1):
        value = getattr(self, name)
        number = integer(name, default if value is None else value, below=2**30)
        if number < least:
            raise ValueError(f"{name}={number} must be at least {least}")
        object.__setattr__(self, name, number)

    def _settled_widths(self, decoding: int) -> tuple[int, ...]:
        given: Any = (decoding, self.token_budget) if self.widths is None else self.widths
        given = tuple(given) if isinstance(given, Iterable) else (0,)
        widths = tuple(sorted({whole(width) or 0 for width in given}))
        if not widths or widths[0] < 1 or widths[-1] != self.token_budget:
            raise ValueError(
                f"widths={self.widths!r} must be positive numbers of tokens, the largest "
                f"token_budget={self.token_budget}"
            )
        return widths

    @property
    def tokens_per_sample(self) -> int:
        """Most tokens that a sample gets in a step after its prompt: 1, or those proposed and one more."""
        return 1 if self.speculate is None else 1 + self.speculate.num_tokens

    @property
    def most_at_once(self) -> int:
        """Most tokens of one prompt in a step."""
        most = self.token_budget
        if self.cache.layer_windows is not None:
            most = min(most, self.cache.max_chunk)
        return most if self.policy is None else self.policy.most_at_once(self.cache, most)
