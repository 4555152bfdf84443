"""ERNIE 4.5, dense: Llama that rotates neighbouring features as a pair."""

from typing import Any

from jaxkv.checkpoints.fields import Fields
from jaxkv.models.families.family import Family
from jaxkv.models.families.layers import FULL, layer_kinds


def options(fields: Fields) -> dict[str, Any]:
    """Nothing beyond the common fields."""
    layer_kinds(fields, allowed=(FULL,))
    return {}


FAMILY = Family(
    model_types=("ernie4_5",),
    options=options,
    allowed={"use_bias": (False,)},
    absent={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    hf_pairing="interleaved",
    architecture="ernie4_5",
    gguf_pairing="interleaved",
)
