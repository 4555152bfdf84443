"""A hand-written static cache: what a JAX user writes by hand, and what the paged cache is compared with.

One buffer `[seqs, kv_heads, max_tokens, head_dim]` a layer (heads-major, the fastest layout on a CPU), a
length for each sequence, attention over the whole buffer with a mask. The model code is the same.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.models.config import ModelConfig
from jaxkv.models.decoder import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DenseCache:
    """K and V of every layer, and how many tokens each sequence has."""

    k: tuple[Float[Array, "seqs kv_heads max_tokens head_dim"], ...]
    v: tuple[Float[Array, "seqs kv_heads max_tokens head_dim"], ...]
    lengths: Int[Array, " seqs"]


def init(config: ModelConfig, num_seqs: int, max_tokens: int) -> DenseCache:
    """An empty cache, float32."""
    shape = (num_seqs, config.num_kv_heads, max_tokens, config.head_dim)
    k, v = (tuple(jnp.zeros(shape) for _ in range(config.num_layers)) for _ in range(2))
    return DenseCache(k, v, jnp.zeros(num_seqs, jnp.int32))


def decode_step(
    model: Llama, cache: DenseCache, tokens: Int[Array, " seqs"]
) -> tuple[Float[Array, "seqs vocab"], DenseCache]:
    """One token for each sequence: its logits, and the cache."""
    k_buffers, v_buffers = list(cache.k), list(cache.v)
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        q, k, v = block.qkv(x, cache.lengths)
        k_buffers[layer] = _write(k_buffers[layer], k, cache.lengths)
        v_buffers[layer] = _write(v_buffers[layer], v, cache.lengths)
        x = block.mix(x, _attend(q, k_buffers[layer], v_buffers[layer], cache.lengths))
    cache = replace(cache, k=tuple(k_buffers), v=tuple(v_buffers), lengths=cache.lengths + 1)
    return model.unembed(x), cache


def _write(buffer, new, lengths):
    seqs = jnp.arange(buffer.shape[0], dtype=jnp.int32)
    return buffer.at[seqs, :, lengths].set(new)


def _attend(q, k, v, lengths):
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    scores = jnp.einsum("shgd,shtd->shgt", grouped, k)
    seen = jnp.arange(k.shape[2])[None, :] <= lengths[:, None]
    p = jax.nn.softmax(jnp.where(seen[:, None, None, :], scores, -jnp.inf), axis=-1)
    return jnp.einsum("shgt,shtd->shgd", p, v).reshape(q.shape)
