"""What a backend of `attention_mass` is asked for."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.paged_attention import call as attention


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Call(attention.Call):
    """The arguments of `api.attention_mass`, checked: those of attention, of K alone, on a layer there is.

    Attributes:
      lse: as there.
    """

    lse: Float[Array, "tokens q_heads"]
    sinks: None = None
    prefixes: None = None
    shared_tuning: None = None
