"""Configs as people might publish them: those of the small checkpoints, with fields changed or left out."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

FAMILIES = Path(__file__).parents[1] / "tests/fixtures/families"
# Its weights come in another format, which `random_checkpoint` does not write.
LEFT_OUT = {"gpt_oss_mxfp4"}
# Left out of a config, these take a default of the family's class that is a hundred times as large.
SIZES = {
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
    "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts", "num_local_experts",
    "model_type", "text_config", "vision_config", "pad_token_id",
}  # fmt: skip
SCALINGS = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.0},
    {"factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 4.0},
    {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "original_max_position_embeddings": 16},
    {
        "rope_type": "longrope", "short_factor": [1.0, 1.25, 1.5, 2.0], "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 16,
    },
]  # fmt: skip
BASES = [{}, {"rope_theta": 1000.0}, {"rope_theta": 50000.0, "partial_rotary_factor": 0.5}]
SETTINGS = [{**scaling, **base} for scaling in SCALINGS for base in BASES]
KINDS = "full_attention", "sliding_attention"
FLAGS = [True, False]
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu", None]
# What a field may be changed to. Sizes have few values, so that a run compiles few shapes.
VALUES = {
    "hidden_size": [24, 32], "intermediate_size": [32, 20], "num_hidden_layers": [1, 2, 3, 4],
    "num_attention_heads": [4, 2], "num_key_value_heads": [1, 2, 4, None], "head_dim": [8, None],
    "max_position_embeddings": [24, 128, 16], "original_max_position_embeddings": [16, 64, None],
    "tie_word_embeddings": FLAGS, "attention_bias": FLAGS, "mlp_bias": FLAGS, "use_bias": FLAGS,
    "attention_out_bias": FLAGS, "qkv_bias": FLAGS, "use_qk_norm": FLAGS, "use_sliding_window": FLAGS,
    "norm_topk_prob": FLAGS, "use_bidirectional_attention": [False], "embedding_bias": [False],
    "sliding_window": [None, 1, 3, 7, 100], "max_window_layers": [0, 1, 2, 28],
    "sliding_window_pattern": [1, 2, 3, 6], "no_rope_layer_interval": [1, 2, 4], "no_rope_layers": [None, []],
    "rope_theta": [100.0, 1e6], "rope_local_base_freq": [100.0, 5000.0],
    "partial_rotary_factor": [0.5, 0.75, 1.0],
    "rope_scaling": [None, *SETTINGS], "rope_parameters": [None, *SETTINGS],
    "rms_norm_eps": [1e-6, 0.1], "layer_norm_eps": [1e-6, 0.1], "norm_epsilon": [1e-5, 0.1],
    "norm_eps": [0.1],
    "attn_logit_softcapping": [None, 5.0], "final_logit_softcapping": [None, 4.0],
    "query_pre_attn_scalar": [8, 64], "logit_scale": [0.25, 1.0], "embedding_multiplier": [1.0, 3.0],
    "residual_multiplier": [1.0, 0.5], "attention_multiplier": [0.25, 1.0], "logits_scaling": [1.0, 2.0],
    "hidden_act": ACTIVATIONS, "hidden_activation": ACTIVATIONS, "num_experts_per_tok": [1, 2, 4],
    "decoder_sparse_step": [1, 2], "mlp_only_layers": [[], [0], [1]], "swiglu_limit": [1.5, 7.0],
    "clip_qkv": [None, 1.0], "attention_dropout": [0.0], "pretraining_tp": [1, 2],
    "use_cache": FLAGS, "torch_dtype": ["float32", "bfloat16"], "attention_multiplier_scale": [2.0],
}  # fmt: skip


def changed_configs(seed: int) -> Iterator[tuple[str, dict]]:
    """Pairs of a family's name and a config with one to four changes, without end and without repetition."""
    bases = {
        folder.name: json.loads((folder / "config.json").read_text())
        for folder in sorted(FAMILIES.iterdir())
        if folder.name not in LEFT_OUT
    }
    draw, seen = random.Random(seed), set()
    while True:
        name = draw.choice(list(bases))
        config = json.loads(json.dumps(bases[name]))
        for _ in range(draw.randint(1, 4)):
            change(config.get("text_config", config), list(bases.values()), draw)
        key = json.dumps([name, config], sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield name, config


def change(config: dict, others: list[dict], draw: random.Random) -> None:
    """Changes one field of a config in place."""
    kind = draw.random()
    layers = config["num_hidden_layers"]
    if kind < 0.15:
        removable = sorted(config.keys() - SIZES)
        del config[draw.choice(removable)]
    elif kind < 0.3:
        other = draw.choice(others)
        other = other.get("text_config", other)
        field = draw.choice(sorted(other.keys() - SIZES))
        config[field] = other[field]
    elif kind < 0.4:
        config["layer_types"] = draw.choice([None, [draw.choice(KINDS) for _ in range(layers)]])
    elif kind < 0.45:
        config["rope_parameters"] = {kind: draw.choice(SETTINGS) for kind in KINDS}
    elif kind < 0.75:
        field = draw.choice(sorted(config.keys() & VALUES.keys()))
        config[field] = draw.choice(VALUES[field])
    else:
        field = draw.choice(sorted(VALUES))
        config[field] = draw.choice(VALUES[field])
    listed = config.get("layer_types")
    if isinstance(listed, list) and len(listed) != config["num_hidden_layers"] and draw.random() < 0.9:
        config["layer_types"] = [listed[at % len(listed)] for at in range(config["num_hidden_layers"])]
