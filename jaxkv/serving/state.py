"""The state of a server: the cache, and a table with a row for each sample of each request."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxkv.decode import Finish
from jaxkv.initial import init as init_cache
from jaxkv.serving.config import ServingConfig
from jaxkv.state import Counters, KVCache, counter

# A sample that keeps every token has this as `top_k`.
ALL_TOKENS = 2**31 - 1


class Phase(IntEnum):
    """What a row of the request table holds.

    Attributes:
      EMPTY: no sample.
      WAITING: one that waits for a slot, new or preempted.
      RUNNING: one that has a slot.
      FINISHED: one that ended and is not yet taken.
    """

    EMPTY = 0
    WAITING = 1
    RUNNING = 2
    FINISHED = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class RequestTable:
    """Every sample that waits, runs, or is finished and not yet taken; all arrays `[rows]` unless stated.

    Attributes:
      phase: a `Phase`.
      finish: why it ended, a `Finish`.
      slots: its slot of the cache; `max_seqs` for a sample that is not running.
      leaders: slot where the prompt of its request is computed, until it is forked; then its own.
      ids: the request's, as the user gave it.
      samples: number of the sample among those of its request.
      arrivals: order of the requests; samples of one request have the same.
      priorities: larger goes first.
      tokens: of each its prompt, then its new tokens.
      prompt_lengths: tokens of its prompt.
      lengths: tokens so far. All but the newest are in the cache of a sample that decodes.
      limits: most tokens.
      taken: tokens, the prompt's among them, that `take` has returned.
      temperature, top_k, top_p, min_p: see `jaxkv.Sampling`; none is 0, the largest int32, 1 and 0.
      seeds: for sampling.
      stop_tokens: ids that end it, padded with -1.
      salts: what `match_prefix` and `record_prefix` take.
      log_probs: of each new token, at its index in `tokens`; None if they are not kept.
    """

    phase: Int[Array, " rows"]
    finish: Int[Array, " rows"]
    slots: Int[Array, " rows"]
    leaders: Int[Array, " rows"]
    ids: Int[Array, " rows"]
    samples: Int[Array, " rows"]
    arrivals: Int[Array, " rows"]
    priorities: Int[Array, " rows"]
    tokens: Int[Array, "rows max_tokens"]
    prompt_lengths: Int[Array, " rows"]
    lengths: Int[Array, " rows"]
    limits: Int[Array, " rows"]
    taken: Int[Array, " rows"]
    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    seeds: UInt32[Array, " rows"]
    stop_tokens: Int[Array, "rows max_stop_tokens"]
    salts: Int[Array, " rows"]
    log_probs: Float[Array, "rows max_tokens"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, repr=False)
class ServingStats(Counters):
    """Counters since `init`; they wrap around."""

    counters: Int[Array, " 9"]

    steps = counter(0, "Steps taken.")
    computed_tokens = counter(1, "Tokens that the model ran on, rejected proposals included.")
    new_tokens = counter(2, "Tokens generated.")
    admissions = counter(3, "Times that a sample was given a slot.")
    preemptions = counter(4, "Times that a sample lost its slot to one that ranks above it.")
    finished = counter(5, "Samples that ended.")
    matched_tokens = counter(6, "Tokens that were found in the prefix cache when a sample was admitted.")
    proposed_tokens = counter(7, "Tokens that speculation proposed.")
    accepted_tokens = counter(8, "Tokens of these that were what the model chose.")

    def plus(self, **amounts: Array) -> "ServingStats":
        """The counters with these amounts added."""
        more = [jnp.asarray(amounts.get(name, 0), jnp.int32) for name in self.names()]
        return ServingStats(self.counters + jnp.stack(more))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ServingState:
    """All of a server, one immutable pytree.

    Attributes:
      cache: the cache.
      requests: the request table.
      stats: counters.
      short: whether the last step found too few pages for a sample whose policy had to copy some.
      drafts: what `config.speculate` keeps; None if it keeps nothing.
      config: the sizes.
    """

    cache: KVCache
    requests: RequestTable
    stats: ServingStats
    short: Bool[Array, ""]
    drafts: Any
    config: ServingConfig = field(metadata={"static": True})


def init(config: ServingConfig) -> ServingState:
    """A server with an empty cache and no requests.

    Args:
      config: the sizes.

    Example:
      >>> import jaxkv
      >>> cache = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2)
      >>> state = jaxkv.serving.init(jaxkv.serving.ServingConfig(cache))
      >>> state.requests.tokens.shape
      (64, 64)
    """
    if not isinstance(config, ServingConfig):
        raise ValueError(f"init takes a ServingConfig, not {type(config).__name__}")
    return ServingState(
        cache=init_cache(config.cache, config.policy),
        requests=_no_requests(config),
        stats=ServingStats(jnp.zeros(len(ServingStats.names()), jnp.int32)),
        short=jnp.zeros((), bool),
        drafts=None if config.speculate is None else config.speculate.init(config.cache),
        config=config,
    )


def _no_requests(config: ServingConfig) -> RequestTable:
    rows = config.max_requests

    def zeros(*shape: int, dtype=jnp.int32) -> Array:
        return jnp.zeros((rows, *shape), dtype)

    return RequestTable(
        phase=zeros(),
        finish=zeros() + Finish.RUNNING,
        slots=jnp.full(rows, config.cache.max_seqs, jnp.int32),
        leaders=zeros(),
        ids=zeros(),
        samples=zeros(),
        arrivals=zeros(),
        priorities=zeros(),
        tokens=zeros(config.max_tokens),
        prompt_lengths=zeros(),
        lengths=zeros(),
        limits=zeros(),
        taken=zeros(),
        temperature=zeros(dtype=jnp.float32),
        top_k=jnp.full(rows, ALL_TOKENS, jnp.int32),
        top_p=jnp.ones(rows, jnp.float32),
        min_p=zeros(dtype=jnp.float32),
        seeds=zeros(dtype=jnp.uint32),
        stop_tokens=jnp.full((rows, config.max_stop_tokens), -1, jnp.int32),
        salts=zeros(),
        log_probs=zeros(config.max_tokens, dtype=jnp.float32) if config.log_probs else None,
    )
