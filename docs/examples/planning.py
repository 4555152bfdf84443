"""Memory, context and sequences from a model's config.json."""

import json
import tempfile
from pathlib import Path

from jaxkv import planner
from jaxkv.planner import ModelShape

# --8<-- [start:plan]
# The name of a known model, or the path of a config.json, a folder or a GGUF file.
shape = ModelShape.from_config("llama-3.1-8b")
plan = planner.plan(
    shape, "H100", context=32_768, concurrency=16, kv_dtype="int8"
)
print("fits:", plan.fits)
print(f"weights {plan.weights:,} bytes, K and V {plan.kv.reserved:,}")
print(
    "longest context:",
    plan.max_context,
    "tokens; most sequences:",
    plan.max_concurrency,
)
config = plan.cache_config  # ready for `jaxkv.init`
# --8<-- [end:plan]

# --8<-- [start:suggest]
tight = planner.plan(shape, "24GiB", context=32_768, concurrency=16)
print("fits:", tight.fits)
for change in planner.suggestions(tight):
    print("-", change.text)
# --8<-- [end:suggest]
assert plan.fits and not tight.fits

# --8<-- [start:file]
config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config))
    mine = ModelShape.from_config(path)
print(planner.kv_cache_bytes(mine, context=2048, concurrency=8))
# --8<-- [end:file]
