"""What is compiled: a function of a cache, at the sizes of a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once
from typing import Any

import jax
import jax.numpy as jnp

import jaxkv
from jaxkv import policies
from jaxkv.models import ModelConfig, abstract_model

LLAMA_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_q_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    max_context=131072,
)
POOL_BYTES = 4 * 2**30
MAX_SEQS, ROW_PAGES = 64, 128
_ROWS: dict[str, Any] = dict(
    num_pages=ROW_PAGES, max_seqs=MAX_SEQS, max_pages_per_seq=ROW_PAGES, dtype="bfloat16"
)
LLAMA = LLAMA_8B.cache_config(num_pages=ROW_PAGES, max_seqs=MAX_SEQS, dtype="bfloat16")
# Five layers with a window, then one with full attention: all of one shape, and of two.
GEMMA_3_27B = jaxkv.CacheConfig(
    num_layers=62,
    num_kv_heads=16,
    head_dim=128,
    layer_windows=tuple(None if layer % 6 == 5 else 1024 for layer in range(62)),
    **_ROWS,
)
GEMMA_4_26B = jaxkv.CacheConfig(
    num_layers=30,
    layer_windows=tuple(None if layer % 6 == 5 else 1024 for layer in range(30)),
    layer_kv_heads=tuple(2 if layer % 6 == 5 else 8 for layer in range(30)),
    layer_head_dims=tuple(512 if layer % 6 == 5 else 256 for layer in range(30)),
    page_size=32,
    **_ROWS,
)


@dataclass(frozen=True)
class Program:
    """A function of a cache and other arguments, which takes the cache first and returns it first."""

    name: str
    run: Callable
    arguments: Callable[[], tuple]
    donated: bool = True
    backend: str = "xla"
    quantization: str | None = None
    policy: policies.Policy | None = None
    sizes: jaxkv.CacheConfig = LLAMA

    def cache(self, pool_bytes: int) -> jaxkv.KVCache:
        """Shapes of its cache with a pool of about so many bytes, and no smaller than one row."""
        sizes = replace(self.sizes, quantization=self.quantization)
        pages = max(ROW_PAGES, pool_bytes // sizes.page_bytes)
        return jax.eval_shape(lambda: jaxkv.init(replace(sizes, num_pages=pages), self.policy))


def int32(size: int) -> jax.ShapeDtypeStruct:
    """A vector of integers."""
    return jax.ShapeDtypeStruct((size,), jnp.int32)


def one_token() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """K (or V) and q of one token of each sequence."""
    q_heads, kv_heads, head_dim = LLAMA_8B.num_q_heads, LLAMA_8B.num_kv_heads, LLAMA_8B.head_dim
    return (
        jax.ShapeDtypeStruct((MAX_SEQS, kv_heads, head_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((MAX_SEQS, q_heads, head_dim), jnp.bfloat16),
    )


def hidden(sizes: jaxkv.CacheConfig, tokens: int) -> jax.ShapeDtypeStruct:
    """Of each token, the elements of two query heads for each KV head of the widest layers."""
    elements = 2 * max(group.num_kv_heads * group.head_dim for group in sizes.groups)
    return jax.ShapeDtypeStruct((tokens, elements), jnp.bfloat16)


@once
def model(layers: int):
    """All layers, or the first few: the cache has them all, and compiling takes a fraction of the time."""
    return abstract_model(replace(LLAMA_8B, num_layers=layers), jnp.bfloat16)
