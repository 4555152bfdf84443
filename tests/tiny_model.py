"""The sizes of a model whose text is of no interest."""

from jaxkv.models import ModelConfig

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=1,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_context=128,
)
