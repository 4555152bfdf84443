"""A made-up family: Llama with biases of Q, K and V, and a factor of its logits."""

from jaxkv.models.families.family import Family


def options(fields):
    """The arguments of `ModelConfig` that the family sets."""
    return {
        "qkv_bias": fields.flag("attention_bias", True),
        "logit_multiplier": fields.number("logit_factor", 1.0),
    }


FAMILY = Family(
    model_types=("llama_with_biases",),
    options=options,
    allowed={"attention_bias": (False, True)},
    absent={"num_key_value_heads": 2},
)
