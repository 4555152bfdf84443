"""The record of arguments of `attention_mass`."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.paged_attention import call as attention


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Call(attention.Call):
    """The arguments of `api.attention_mass`, checked: those of attention with K alone and a valid layer.

    Attributes:
      lse: log-sum-exp of attention.
    """

    lse: Float[Array, "tokens q_heads"]
    sinks: None = None
    prefixes: None = None
    shared_tuning: None = None
