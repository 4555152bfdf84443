"""What is compiled: a function of a cache, at the sizes of an 8-billion-parameter model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache as once

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

    def cache(self, pool_bytes: int) -> jaxkv.KVCache:
        """Shapes of its cache with a pool of about so many bytes, and no smaller than one row."""
        sizes = LLAMA_8B.cache_config(
            num_pages=ROW_PAGES, max_seqs=MAX_SEQS, dtype="bfloat16", quantization=self.quantization
        )
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


@once
def model(layers: int):
    """All layers, or the first few: the cache has them all, and compiling takes a fraction of the time."""
    return abstract_model(replace(LLAMA_8B, num_layers=layers), jnp.bfloat16)
