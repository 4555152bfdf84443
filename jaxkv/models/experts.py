"""Mixtures of experts: MLPs of which a router chooses a few for each token."""

import dataclasses

from jaxkv.arguments import whole
from jaxkv.checkpoints.fields import most


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The sizes of a mixture of experts; hashable.

    Attributes:
      count: experts that the router chooses from.
      per_token: experts that it chooses for each token.
      intermediate_size: width of each expert, in features.
      normalized: whether the weights of a token's experts are divided by their sum.
      router_bias: whether the router adds a bias (gpt-oss).
      shared_size: width of the expert that every token uses besides; None without one.
      shared_gate: whether a token weighs that expert by a sigmoid (Qwen2-MoE).

    Raises:
      ValueError: for a field out of range, naming it.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool = True
    router_bias: bool = False
    shared_size: int | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        limits = {
            "count": most("num_experts"),
            "per_token": self.count,
            "intermediate_size": most("intermediate_size"),
            "shared_size": most("intermediate_size"),
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if name == "shared_size" and value is None:
                continue
            number = whole(value)
            if number is None or not 1 <= number <= limit:
                raise ValueError(f"experts' {name} must be an integer from 1 to {limit}, not {value!r}")
            object.__setattr__(self, name, number)
