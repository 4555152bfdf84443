"""Bytes moved and operations computed by each operation."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.formats import Format


def causal(kv_lengths: Sequence[int], num_queries: Sequence[int]) -> tuple[int, int]:
    """`(num_keys, num_pairs)` of attention with these lengths: tokens read, and pairs of query and key.

    Example:
      >>> causal([5, 3], [1, 2])
      (8, 10)
    """
    lengths = list(zip(kv_lengths, num_queries, strict=True))
    read = sum(keys for keys, queries in lengths if queries)
    return read, sum(queries * keys - queries * (queries - 1) // 2 for keys, queries in lengths)


def paged_attention(
    *,
    num_keys: int,
    num_pairs: int,
    tokens: int,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    q_dtype: DTypeLike,
    storage: Format,
) -> pl.CostEstimate:
    """Attention of `tokens` queries: every K and V read once, q read and the output written.

    Args:
      num_keys, num_pairs: as from `causal`.
      tokens, q_heads, kv_heads, head_dim, q_dtype: of the arguments.
      storage: format of the pool.
    """
    kv_bytes = num_keys * storage.token_bytes(kv_heads, head_dim)
    q_bytes = 2 * tokens * q_heads * head_dim * jnp.dtype(q_dtype).itemsize
    return pl.CostEstimate(
        flops=4 * num_pairs * q_heads * head_dim,
        transcendentals=num_pairs * q_heads,
        bytes_accessed=kv_bytes + q_bytes,
    )


def attention_mass(*, tokens: int, q_heads: int, kv_heads: int, max_tokens: int, **shape) -> pl.CostEstimate:
    """The mass of `tokens` queries: every K and q read once, the mass of `max_tokens` token slots written.

    Args:
      tokens, q_heads, kv_heads: of the arguments.
      max_tokens: of the result, in all sequences.
      shape: the other arguments of `paged_attention`.
    """
    whole = paged_attention(tokens=tokens, q_heads=q_heads, kv_heads=kv_heads, **shape)
    mass_bytes = 4 * (max_tokens * kv_heads + tokens * q_heads)
    return pl.CostEstimate(
        flops=whole.flops // 2,
        transcendentals=whole.transcendentals,
        bytes_accessed=whole.bytes_accessed // 2 + mass_bytes,
    )


def append_kv(
    *, tokens: int, kv_heads: int, head_dim: int, dtype: DTypeLike, storage: Format
) -> pl.CostEstimate:
    """K and V of `tokens`, read once and written once."""
    read = 2 * kv_heads * head_dim * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(
        flops=0,
        transcendentals=0,
        bytes_accessed=tokens * (read + storage.token_bytes(kv_heads, head_dim)),
    )


def copy_pages(*, copies: int, layers: int, page_numbers: int, dtype: DTypeLike) -> pl.CostEstimate:
    """K and V of `copies` pages of `page_numbers` elements in each layer, read once and written once."""
    return pl.CostEstimate(
        flops=0,
        transcendentals=0,
        bytes_accessed=4 * copies * layers * page_numbers * jnp.dtype(dtype).itemsize,
    )
