"""Where the prompts of a call go: into a new cache, or behind what a given one holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import jax
import numpy as np
from jax.core import Tracer

from jaxkv.arguments import integer
from jaxkv.config import CacheConfig
from jaxkv.initial import first_state
from jaxkv.policies import Policy
from jaxkv.request import Request
from jaxkv.state import KVCache


@dataclass(frozen=True, slots=True)
class Turn:
    """A call of `generate` on a cache.

    Attributes:
      request: its prompts begin with the pending tokens of their slots.
      config: of the cache.
      cache: the one given; None for a new one.
      slots: `[prompts, num_samples]`; the first of each is the prompt's own.
      pending: newest token of other slots, not in the cache.
    """

    request: Request
    config: CacheConfig
    cache: KVCache | None
    slots: np.ndarray
    pending: Mapping[int, int]

    @property
    def is_new(self) -> bool:
        """Whether no prompt has anything before it."""
        return self.cache is None or not np.asarray(self.cache.table.positions)[self.slots[:, 0]].any()


def new_turn(request: Request, config: CacheConfig) -> Turn:
    """On a cache of its own.

    Raises:
      ValueError: where it has too few slots.
    """
    count = len(request.prompts) * request.num_samples
    if count > config.max_seqs:
        raise ValueError(
            f"{len(request.prompts)} prompts x {request.num_samples} samples need {count} slots; "
            f"the cache has max_seqs={config.max_seqs}"
        )
    slots = np.arange(count, dtype=np.int32).reshape(-1, request.num_samples)
    return Turn(request, config, None, slots, MappingProxyType({}))


def next_turn(
    request: Request,
    cache: KVCache,
    config: CacheConfig | None,
    seqs: Sequence[int] | None,
    pending: Mapping[int, int],
) -> Turn:
    """On a cache with earlier turns.

    Args:
      request: its prompts lack the pending tokens.
      cache: the cache.
      config: None, or the cache's own.
      seqs: slot of each prompt. Default: 0, 1, 2 ...
      pending: newest token of each slot that has one which is not in the cache.

    Raises:
      ValueError: for slots that are not there, or named twice, or of another number than the prompts.
    """
    _check_cache(cache, config)
    owned = _own_slots(seqs, len(request.prompts), cache.config.max_seqs)
    slots = np.array(owned, np.int32)[:, None]
    if request.num_samples > 1:
        slots = np.concatenate([slots, _empty_slots(cache, owned, request.num_samples - 1)], axis=1)
    prompts = [
        [pending[slot], *prompt] if slot in pending else prompt
        for slot, prompt in zip(owned, request.prompts, strict=True)
    ]
    others = {slot: token for slot, token in pending.items() if slot not in slots}
    return Turn(replace(request, prompts=prompts), cache.config, cache, slots, others)


def _check_cache(cache: object, config: CacheConfig | None) -> None:
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache={cache!r:.200} must be a jaxkv.KVCache or what generate returned")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(cache)):
        raise ValueError("cache= is traced: generate drives compiled steps itself, call it outside of jit")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise ValueError("the cache was consumed by an earlier call: go on with the one that it returned")
    if config is not None and config != cache.config:
        raise ValueError(f"config={config} is not that of the given cache, {cache.config}; leave it out")


def _own_slots(seqs: Sequence[int] | None, count: int, max_seqs: int) -> list[int]:
    given = range(count) if seqs is None else seqs
    slots = [integer(f"seqs[{nth}]", slot, least=0, below=2**31) for nth, slot in enumerate(given)]
    if len(slots) != count:
        raise ValueError(f"seqs names {len(slots)} slots for {count} prompts; there must be one for each")
    for nth, slot in enumerate(slots):
        if slot >= max_seqs or slot in slots[:nth]:
            why = "named twice" if slot in slots[:nth] else f"not one of the cache's {max_seqs}"
            raise ValueError(f"seqs[{nth}]={slot} is {why}")
    return slots


def _empty_slots(cache: KVCache, owned: list[int], more: int) -> np.ndarray:
    """For the samples of each prompt beside the first, `[prompts, more]`: the lowest that are empty."""
    empty = [slot for slot in np.flatnonzero(np.asarray(cache.table.positions) == 0) if slot not in owned]
    needed = len(owned) * more
    if needed > len(empty):
        raise ValueError(
            f"{len(owned)} prompts x {more + 1} samples need {needed} empty slots beside their own; "
            f"the cache has {len(empty)}"
        )
    return np.array(empty[:needed], np.int32).reshape(len(owned), more)


def with_policy(turn: Turn, policy: Policy | None) -> Turn:
    """The turn, with the policy in the cache that was given; on a new cache as it is.

    Raises:
      ValueError: for another policy than the cache has; for one that has seen nothing of the tokens that are
        in the cache, and would need it.
    """
    cache = turn.cache
    if policy is None or cache is None:
        return turn
    if cache.policy is not None:
        if policy != cache.policy.rule:
            raise ValueError(f"policy={policy} is not that of the cache, {cache.policy.rule}")
        return turn
    state = first_state(turn.config, policy)
    if state.values and not turn.is_new:
        raise ValueError(
            f"{policy} remembers its sequences from their first token on: give cache= what generate(..., "
            "keep=True, policy=...) returned"
        )
    return replace(turn, cache=replace(cache, policy=state))
