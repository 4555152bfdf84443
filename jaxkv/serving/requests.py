"""What users ask for: a request on the host, and many of them as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxkv.arguments import integer
from jaxkv.request import token_ids
from jaxkv.sampling import GREEDY, Sampling, plain
from jaxkv.serving.config import ServingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt and how to continue it, on the host.

    Attributes:
      tokens: token ids of the prompt, at least one.
      id: what events and `cancel` name it by, from 0 up. None: `serve` numbers requests from 0;
        `Requests.of` takes 0 for it, so give ids there.
      priority: larger goes first, equal ones in order of arrival; a smaller one may be preempted.
      max_new_tokens: most new tokens of each sample.
      sampling: how tokens are chosen. Default: greedy.
      seed: for sampling, from 0 up to 2**32 - 1. Equal requests of equal seeds have equal results.
      num_samples: continuations of the prompt, which share its pages.
      stop_tokens: ids that end a sample; the one that does is its last token.
      stop: texts that end a sample, which `serve` looks for with a tokenizer; its text ends before them.
        Without one the request is refused.
      salt: only what was computed with the same salt is shared. Each LoRA adapter and each set of images
        needs its own, since equal ids then have other K and V; so does each user whose prompts others must
        not learn of from timing.

    Raises:
      ValueError: naming the field and what is allowed.

    Example:
      >>> Request(tokens=[1, 2, 3], max_new_tokens=8).stop_tokens
      ()
    """

    tokens: Sequence[int]
    id: int | None = None
    priority: int = 0
    max_new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    num_samples: int = 1
    stop_tokens: Sequence[int] = field(default=())
    stop: Sequence[str] = field(default=())
    salt: int = 0

    def __post_init__(self):
        settled = object.__setattr__
        settled(self, "tokens", tuple(token_ids(self.tokens, "tokens")))
        settled(self, "stop_tokens", tuple(sorted(set(token_ids(self.stop_tokens, "stop_tokens")))))
        if not self.tokens:
            raise ValueError("tokens is empty; a prompt has at least one")
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={self.sampling!r} must be a jaxkv.Sampling")
        for name in ("max_new_tokens", "num_samples"):
            settled(self, name, integer(name, getattr(self, name), below=2**30))
        settled(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop={self.stop!r}: a stop string must be a text that is not empty")
        settled(self, "seed", integer("seed", self.seed, least=0, below=2**32))
        if self.id is not None:
            settled(self, "id", integer("id", self.id, least=0, below=2**31))
        for name in ("priority", "salt"):
            settled(self, name, integer(name, getattr(self, name), least=-(2**31), below=2**31))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Requests:
    """Requests as arrays, for `submit`. An entry of 0 `num_samples` is padding.

    Attributes:
      tokens: of each prompt, padded at the end.
      lengths: tokens of each prompt.
      ids, priorities, max_new_tokens, seeds, num_samples, salts: as in `Request`.
      temperature, top_k, top_p, min_p: as in `Sampling`; none is 0, the largest int32, 1 and 0.
      stop_tokens: padded with -1.
    """

    tokens: Int[Array, "entries width"]
    lengths: Int[Array, " entries"]
    ids: Int[Array, " entries"]
    priorities: Int[Array, " entries"]
    max_new_tokens: Int[Array, " entries"]
    temperature: Float[Array, " entries"]
    top_k: Int[Array, " entries"]
    top_p: Float[Array, " entries"]
    min_p: Float[Array, " entries"]
    seeds: UInt32[Array, " entries"]
    num_samples: Int[Array, " entries"]
    salts: Int[Array, " entries"]
    stop_tokens: Int[Array, "entries max_stop_tokens"]

    @classmethod
    def of(
        cls, requests: Sequence[Request], config: ServingConfig, *, entries: int | None = None
    ) -> "Requests":
        """From requests on the host.

        Args:
          requests: in order of arrival.
          config: of the server.
          entries: entries of the arrays, the rest padding, so that every call has one shape. Default: as many
            as there are requests.

        Raises:
          ValueError: for more requests than `entries`, or more stop tokens than the server takes.
        """
        count = max(1, len(requests)) if entries is None else integer("entries", entries)
        if len(requests) > count:
            raise ValueError(f"{len(requests)} requests are more than entries={count}")
        tokens = np.zeros((count, config.max_tokens), np.int32)
        stops = np.full((count, config.max_stop_tokens), -1, np.int32)
        for row, one in enumerate(requests):
            if not isinstance(one, Request):
                raise ValueError(
                    f"requests[{row}] must be a jaxkv.serving.Request, not a {type(one).__name__}"
                )
            if len(one.stop_tokens) > config.max_stop_tokens:
                raise ValueError(
                    f"request {one.id} has {len(one.stop_tokens)} stop tokens, more than "
                    f"max_stop_tokens={config.max_stop_tokens}"
                )
            # A prompt beyond the width is refused by its length.
            fits = one.tokens[: config.max_tokens]
            tokens[row, : len(fits)] = fits
            stops[row, : len(one.stop_tokens)] = one.stop_tokens

        def column(values: list, fill: float, dtype: str = "int32") -> Array:
            return jnp.asarray(np.array(values + [fill] * (count - len(values)), dtype))

        settings = [plain(one.sampling) for one in requests]
        return cls(
            tokens=jnp.asarray(tokens),
            lengths=column([len(one.tokens) for one in requests], 0),
            ids=column([one.id or 0 for one in requests], 0),
            priorities=column([one.priority for one in requests], 0),
            max_new_tokens=column([one.max_new_tokens for one in requests], 0),
            temperature=column([one.temperature for one in settings], 0, "float32"),
            top_k=column([one.top_k for one in settings], 1),
            top_p=column([one.top_p for one in settings], 1, "float32"),
            min_p=column([one.min_p for one in settings], 0, "float32"),
            seeds=column([one.seed for one in requests], 0, "uint32"),
            num_samples=column([one.num_samples for one in requests], 0),
            salts=column([one.salt for one in requests], 0),
            stop_tokens=jnp.asarray(stops),
        )
