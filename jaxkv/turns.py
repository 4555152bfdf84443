"""Assigns the prompts of a call to slots of a new cache, or of one that holds earlier turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
      cache: the given cache; None for a new one.
      slots: `[prompts, num_samples]`; a prompt is run in its first slot.
      pending: newest token of each other slot, not in the cache.
      held: tokens that slots in use hold, where they are known.
    """

    request: Request
    config: CacheConfig
    cache: KVCache | None
    slots: np.ndarray
    pending: Mapping[int, int]
    held: Mapping[int, list[int]] = field(default_factory=dict)

    @property
    def is_new(self) -> bool:
        """Whether no prompt has anything before it."""
        return self.cache is None or not np.asarray(self.cache.table.positions)[self.slots[:, 0]].any()

    def before(self, number: int) -> list[int] | None:
        """The tokens that a prompt's slot holds; None if they are not known."""
        slot = int(self.slots[number, 0])
        if self.cache is None or not int(self.cache.table.positions[slot]):
            return []
        return self.held.get(slot)


def new_turn(request: Request, config: CacheConfig) -> Turn:
    """A turn on a new cache.

    Raises:
      ValueError: if `config` has too few slots.
    """
    count = len(request.prompts) * request.num_samples
    if count > config.max_seqs:
        raise ValueError(
            f"{len(request.prompts)} prompts x {request.num_samples} samples need {count} slots; "
            f"the cache has max_seqs={config.max_seqs}; they take turns only without keep, keep_logits and "
            "on_tokens"
        )
    slots = np.arange(count, dtype=np.int32).reshape(-1, request.num_samples)
    return Turn(request, config, None, slots, MappingProxyType({}))


def next_turn(
    request: Request,
    cache: KVCache,
    config: CacheConfig | None,
    seqs: Sequence[int] | None,
    pending: Mapping[int, int],
    held: Mapping[int, list[int]] = MappingProxyType({}),
) -> Turn:
    """A turn on a given cache.

    Args:
      request: its prompts do not yet include the pending tokens.
      cache: the cache.
      config: None, or the cache's own.
      seqs: slot of each prompt. Default: 0, 1, 2 ...
      pending: newest token of slots whose newest token is not in the cache.
      held: tokens that slots in use hold, where they are known.

    Raises:
      ValueError: for slots out of range, named twice, or not as many as the prompts.
    """
    check_cache(cache, config)
    owned = _own_slots(seqs, len(request.prompts), cache.config.max_seqs)
    slots = np.array(owned, np.int32)[:, None]
    if request.num_samples > 1:
        slots = np.concatenate([slots, _empty_slots(cache, owned, request.num_samples - 1)], axis=1)
    prompts = [
        [pending[slot], *prompt] if slot in pending else prompt
        for slot, prompt in zip(owned, request.prompts, strict=True)
    ]
    others = {slot: token for slot, token in pending.items() if slot not in slots}
    return Turn(replace(request, prompts=prompts), cache.config, cache, slots, others, held)


def check_cache(cache: object, config: CacheConfig | None) -> None:
    """Raises `ValueError` for what is no cache, a traced or a donated one, or one of another config."""
    if not isinstance(cache, KVCache):
        raise ValueError(f"cache={cache!r:.200} must be a jaxkv.KVCache or what generate returned")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(cache)):
        raise ValueError("cache= is traced: generate runs compiled steps itself; call it outside of jit")
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
        raise ValueError("the cache was consumed by an earlier call: use the one that it returned")
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
    """The turn with the policy added to the given cache; without a given cache, the turn unchanged.

    Raises:
      ValueError: if the cache has another policy; if it has none but holds tokens, and this policy keeps a
        state for each token.
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
            f"{policy} must observe sequences from their first token on: give cache= what generate(..., "
            "keep=True, policy=...) returned"
        )
    return replace(turn, cache=replace(cache, policy=state))
