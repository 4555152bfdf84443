"""What policies share that go by the attention tokens received."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.config import CacheConfig
from jaxkv.fingerprint import is_current
from jaxkv.operation import as_given, operation
from jaxkv.pages import rows_of
from jaxkv.policies.base import check_counts
from jaxkv.policies.token_policy import TokenPolicy, Tokens
from jaxkv.state import Batch, KVCache, PolicyState, Status


class Step(NamedTuple):
    """One step of some sequences, as a policy sees it; arrays for token places have four axes.

    Attributes:
      slot: of each entry, `max_seqs` for padding and for refused ones.
      mass: `[entries, layers, kv_heads, max_tokens]`.
      is_new, is_old: `[entries, 1, 1, max_tokens]`, the step's own tokens and those before them.
      place: `[1, 1, 1, max_tokens]`.
    """

    slot: Int[Array, " entries"]
    mass: Float[Array, "entries layers kv_heads max_tokens"]
    is_new: Bool[Array, "entries 1 1 max_tokens"]
    is_old: Bool[Array, "entries 1 1 max_tokens"]
    place: Int[Array, "1 1 1 max_tokens"]


def zeros(config: CacheConfig, dtype=jnp.float32) -> Array:
    """A number for each token place, layer and KV head, `[seqs, layers, kv_heads, max_tokens]`."""
    shape = config.max_seqs, config.num_layers, config.num_kv_heads, config.max_tokens_per_seq
    return jnp.zeros(shape, dtype)


def observed(state: PolicyState, cache: KVCache, batch: Batch, mass: Array | None) -> PolicyState:
    """The state after a step, by its policy's `note`. Of a stale batch nothing is noted.

    Raises:
      ValueError: for the state of another cache; without a mass, or for one of another shape.
    """
    state.policy.check_state(state, cache.config)
    config, entries = cache.config, batch.seqs.shape[0]
    shape = config.num_layers, entries, config.num_kv_heads, config.max_tokens_per_seq
    if mass is None:
        raise ValueError(
            f"{type(state.policy).__name__} goes by the attention that tokens received; observe got no mass: "
            "ask jaxkv.attention_mass for it in each layer"
        )
    mass = jnp.asarray(mass)
    if mass.shape != shape:
        raise ValueError(
            f"mass must be [layers, entries, kv_heads, max_tokens] = {list(shape)}, not {list(mass.shape)}"
        )
    return _observed(state, cache, batch, mass)


@operation(results=lambda state, *_: as_given(state))
def _observed(state: PolicyState, cache: KVCache, batch: Batch, mass: Array) -> PolicyState:
    return replace(state, values=state.policy.note(state.values, _step_of(cache, batch, mass), batch))


def _step_of(cache: KVCache, batch: Batch, mass: Array) -> Step:
    config = cache.config
    ran = (batch.status == Status.OK) & (batch.num_tokens > 0) & is_current(cache.table, batch)
    place = jnp.arange(config.max_tokens_per_seq, dtype=jnp.int32)[None, None, None]
    ends = batch.kv_lengths[:, None, None, None]
    begins = ends - batch.num_tokens[:, None, None, None]
    return Step(
        slot=jnp.where(ran, batch.seqs, config.max_seqs),
        mass=jnp.swapaxes(mass, 0, 1).astype(jnp.float32),
        is_new=(place >= begins) & (place < ends),
        is_old=place < begins,
        place=place,
    )


@dataclass(frozen=True)
class MassPolicy(TokenPolicy):
    """Goes by the attention that tokens have received in all, and spares the last ones."""

    recent: int

    needs_mass: ClassVar[bool] = True

    def first_values(self, config: CacheConfig) -> dict[str, Array]:
        """`mass`: attention received so far."""
        return {"mass": zeros(config)}

    def observe(
        self, state: PolicyState, cache: KVCache, batch: Batch, mass: Array | None = None
    ) -> PolicyState:
        """Adds a step's attention; see `Policy.observe`."""
        self.check_state(state, cache.config)
        return observed(state, cache, batch, mass)

    def note(self, values: dict[str, Array], step: Step, batch: Batch) -> dict[str, Array]:
        """The values, with a step's attention added."""
        held = values["mass"]
        before = jnp.where(step.is_old, rows_of(held, step.slot), 0.0)
        return {"mass": held.at[step.slot].set(before + step.mass, mode="drop")}

    def spare_recent(self, rank: Array, tokens: Tokens) -> Array:
        """The rank, with the recent tokens above all."""
        return jnp.where(tokens.place >= tokens.lengths - self.recent, jnp.inf, rank)

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, least={"recent": 0}, budget="recent")
