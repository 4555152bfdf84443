"""Adds the files of this folder to a copy of the source, and uses them.

python docs/examples/extending/check.py
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
# The file, where it goes, the registry, the line after which a new one goes, and that line.
ADDED = [
    (
        "int16.py",
        "pallas_kernels/formats",
        "pallas_kernels/formats/__init__.py",
        '"int4",',
        '    "int16",',
    ),
    (
        "gathering.py",
        "pallas_kernels/copy_pages",
        "pallas_kernels/dispatch.py",
        '_Registered("triton", needs_gpu=True),',
        '    _Registered("gathering", needs_gpu=False),',
    ),
    (
        "llama_with_biases.py",
        "jaxkv/models/families",
        "jaxkv/models/families/registry.py",
        '"llama",',
        '    "llama_with_biases",',
    ),
]
USE = '''
import jax, jax.numpy as jnp, jaxkv
from jaxkv.models import ModelConfig

sizes = dict(num_layers=2, num_kv_heads=2, head_dim=16, num_pages=16, page_size=4, max_seqs=4)
x = jax.random.normal(jax.random.key(0), (3, 2, 16))


def outputs(**options):
    """A fork writes into a shared page, which is copied first."""
    cache, batch = jaxkv.allocate(jaxkv.init(jaxkv.CacheConfig(**sizes, **options)), jnp.array([0]), jnp.array([3]), total_tokens=3)
    cache = jaxkv.append(cache, 0, batch, x, x)
    cache, _ = jaxkv.fork(cache, jnp.array([0]), jnp.array([1]))
    cache, batch = jaxkv.allocate(cache, jnp.array([1, 0]), jnp.array([1, 1]))
    cache = jaxkv.append(cache, 0, batch, x[:2], x[:2])
    return jaxkv.attend(cache, 0, batch, x[:2])


exact = outputs(dtype="float32")
print("int16:", float(jnp.abs(outputs(quantization="int16") - exact).max()))
assert jnp.allclose(outputs(quantization="int16"), exact, atol=1e-3)
import pallas_kernels
pages = jnp.arange(2 * 4 * 2 * 2 * 3.0).reshape(2, 4, 2, 2, 3)
ids = jnp.array([1, 9, 2]), jnp.array([3, 0, 0])
for one, other in zip(*(pallas_kernels.copy_pages(pages, pages, *ids, backend=name) for name in ("gathering", "xla"))):
    assert jnp.array_equal(one, other)
print("gathering: as xla")
config = ModelConfig.from_hf({
    "model_type": "llama_with_biases", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "logit_factor": 0.5,
})
assert config.qkv_bias and config.num_kv_heads == 2 and config.logit_multiplier == 0.5
print("llama_with_biases:", config.num_layers, "layers")
'''


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("jaxkv", "pallas_kernels", "configs"):
            shutil.copytree(ROOT / name, copy / name)
        for file, into, registry, after, line in ADDED:
            shutil.copy(HERE / file, copy / into)
            text = (copy / registry).read_text(encoding="utf-8")
            assert text.count(after) == 1, (registry, after)
            (copy / registry).write_text(
                text.replace(after, f"{after}\n{line}"), encoding="utf-8"
            )
        (copy / "use.py").write_text(USE, encoding="utf-8")
        subprocess.run([sys.executable, "use.py"], cwd=copy, check=True)


if __name__ == "__main__":
    main()
