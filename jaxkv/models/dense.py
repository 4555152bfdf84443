"""The model with dense attention and no cache: the reference for the paged path."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxkv.models.block import softcapped
from jaxkv.models.decoder import Decoder
from jaxkv.models.mlp import value


def dense_logits(
    model: Decoder, tokens: Int[Array, "seqs length"], lengths: Int[Array, " seqs"]
) -> Float[Array, "seqs length vocab"]:
    """The logits after every token of whole sequences, in one forward pass.

    A reference, not for generation: memory grows with `seqs × length²` and with `seqs × length × vocab`.

    Args:
      model: the weights.
      tokens: int32 ids, each sequence from column 0.
      lengths: int32, tokens of each row.

    Returns:
      float32 logits, zero past each length.
    """
    seqs, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), seqs)
    config = model.config
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    masks = {window: _causal(length, window) for window in set(config.windows)}
    x = model.embed(tokens.reshape(-1))
    for block, window in zip(model.blocks, config.windows, strict=True):
        q, k, v = (part.reshape(seqs, length, -1, config.head_dim) for part in block.qkv(x, positions))
        attended = _attention(q, k, v, masks[window], scale, config.attention_softcap, value(block.sinks))
        x = block.mix(x, attended.reshape(seqs * length, -1, q.shape[-1]))
    logits = model.unembed(x).reshape(seqs, length, -1)
    counts = jnp.arange(length)[None, :] < lengths[:, None]
    return jnp.where(counts[..., None], logits, jnp.zeros_like(logits))


def _causal(length: int, window: int | None) -> Bool[Array, "queries keys"]:
    behind = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _attention(
    q: Float[Array, "seqs length q_heads head_dim"],
    k: Float[Array, "seqs length kv_heads head_dim"],
    v: Float[Array, "seqs length kv_heads head_dim"],
    mask: Bool[Array, "length length"],
    scale: float,
    softcap: float | None,
    sinks: Float[Array, " q_heads"] | None,
) -> Float[Array, "seqs length q_heads head_dim"]:
    seqs, length, _, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(seqs, length, kv_heads, -1, head_dim).astype(jnp.float32)
    scores = jnp.einsum("sqhgd,skhd->shgqk", grouped, k.astype(jnp.float32)) * scale
    scores = softcapped(scores, softcap)
    scores = jnp.where(mask, scores, -jnp.inf)
    if sinks is not None:
        column = jnp.broadcast_to(sinks.reshape(1, kv_heads, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, column], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :length]
    return jnp.einsum("shgqk,skhd->sqhgd", weights, v.astype(jnp.float32)).reshape(q.shape)
