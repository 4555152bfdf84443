"""A decoder-only language model on the paged cache, described by its config.

Grouped-query attention with rotary positions, and an MLP or a mixture of them; `ModelConfig` says what else a
family has.
Every call takes and returns the cache; the model is a pytree of weights, an argument of `jax.jit`.
"""

from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxkv.attention import attend, attention_mass
from jaxkv.config import CacheConfig
from jaxkv.models.block import Block, ParameterSource, normed, softcapped
from jaxkv.models.config import ModelConfig
from jaxkv.models.mlp import value
from jaxkv.models.projection import project
from jaxkv.pool import append
from jaxkv.state import Batch, KVCache
from pallas_kernels.ordering import after


class Decoder(nnx.Module):
    """Token ids in, next-token logits out, with every layer's K and V in a paged cache.

    Args:
      config: the model's sizes.
      parameter: returns each weight; see `random_model`, `abstract_model` and the loaders.
    """

    def __init__(self, config: ModelConfig, parameter: ParameterSource):
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(parameter("embedding", table))
        self.blocks = nnx.List([Block(config, parameter, layer) for layer in range(config.num_layers)])
        self.final_norm = nnx.Param(parameter("final_norm", (config.hidden_size,)))
        bias = parameter("final_norm_bias", (config.hidden_size,)) if config.norm_bias else None
        self.final_norm_bias = None if bias is None else nnx.Param(bias)
        self.unembedding = None if config.tied_embeddings else nnx.Param(parameter("unembedding", table))

    @overload
    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        cache: KVCache,
        batch: Batch,
        *,
        rows: Int[Array, " rows"] | None = ...,
        return_mass: Literal[False] = ...,
    ) -> tuple[Float[Array, "rows_or_tokens vocab"], KVCache]: ...

    @overload
    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        cache: KVCache,
        batch: Batch,
        *,
        rows: Int[Array, " rows"] | None = ...,
        return_mass: Literal[True],
    ) -> tuple[
        Float[Array, "rows_or_tokens vocab"], KVCache, Float[Array, "layers _ kv_heads max_tokens"]
    ]: ...

    def __call__(
        self,
        tokens: Int[Array, " tokens"],
        cache: KVCache,
        batch: Batch,
        *,
        rows: Int[Array, " rows"] | None = None,
        return_mass: bool = False,
    ) -> (
        tuple[Float[Array, "rows_or_tokens vocab"], KVCache]
        | tuple[Float[Array, "rows_or_tokens vocab"], KVCache, Float[Array, "layers _ kv_heads max_tokens"]]
    ):
        """Runs the tokens of a batch, and writes their K and V to the cache.

        Args:
          tokens: int32 `[tokens]`, ids in the order of `batch`; an id beyond the vocabulary is
            clipped to the last.
          cache: the cache that `allocate` returned, of this model's sizes.
          batch: the batch that `allocate` returned.
          rows: int32 `[rows]`, indices in `tokens` to compute logits for, or None for all. A
            prefill needs only each sequence's last.
          return_mass: also return the attention that each token slot received; see `attention_mass`.

        Returns:
          float32 logits `[rows or tokens, vocab]`, and the cache; with `return_mass` also float32
          `[layers, entries, kv_heads, max_tokens]`.
        """
        x, masses = self.embed(tokens), []
        scale, softcap = self.config.query_scale, self.config.attention_softcap
        for layer, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            q, k, v = block.qkv(x, batch.positions)
            cache = append(cache, layer, batch, k, v)
            attended, lse = attend(
                cache,
                layer,
                batch,
                q,
                scale=scale,
                window=window,
                softcap=softcap,
                sink_logits=value(block.sinks),
                return_lse=True,
            )
            if return_mass and layer in cache.config.full_layers:
                mass = attention_mass(
                    cache, layer, batch, q, lse, scale=scale, window=window, softcap=softcap
                )
                masses.append(mass)
                attended = after(attended, mass)
            x = block.mix(x, attended)
        logits = self.unembed(x if rows is None else x.at[rows].get(mode="clip"))
        return (logits, cache, jnp.stack(masses)) if return_mass else (logits, cache)

    def cache_config(self, **options: Any) -> CacheConfig:
        """A `jaxkv.CacheConfig` for this model, in the weights' dtype; `options` are its other arguments.

        Raises:
          ValueError: as `CacheConfig` does.
        """
        return self.config.cache_config(**{"dtype": self.embedding[...].dtype, **options})

    def embed(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens hidden"]:
        """The initial residual stream: float32, one row per token."""
        rows = self.embedding[...].at[tokens].get(mode="clip").astype(jnp.float32)
        multiplier = self.config.embedding_multiplier
        return rows if multiplier == 1.0 else rows * multiplier

    def unembed(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """The final norm, the output projection and the logits' softcap: float32 logits."""
        table = self.embedding if self.unembedding is None else self.unembedding
        inputs = normed(self.config, x, self.final_norm, self.final_norm_bias)
        logits, multiplier = project(inputs, table[...]), self.config.logit_multiplier
        return softcapped(logits if multiplier == 1.0 else logits * multiplier, self.config.logit_softcap)


Llama = Decoder
"""The decoder of every family, under the name it had when it knew one."""


def parameter_dtype(shape: tuple[int, ...], dtype: DTypeLike) -> np.dtype:
    """The dtype of a parameter: matrices have the model's, vectors float32."""
    return np.dtype(jnp.float32) if len(shape) == 1 else np.dtype(dtype)


def random_model(config: ModelConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Decoder:
    """A model of random weights, each matrix scaled by `1 / sqrt(in_features)`.

    Example:
      >>> import jax
      >>> from jaxkv.models import ModelConfig, random_model
      >>> config = ModelConfig(vocab_size=64, hidden_size=32, num_layers=2, num_q_heads=4,
      ...                      num_kv_heads=2, head_dim=8, intermediate_size=64, max_context=128)
      >>> len(random_model(config, jax.random.key(0)).blocks)
      2
    """
    count = iter(range(2**31 - 1))

    def parameter(name: str, shape: tuple[int, ...]) -> jax.Array:
        kept = parameter_dtype(shape, dtype)
        if name.endswith("norm"):
            return jnp.ones(shape, kept)
        # Experts have their in features before their out features.
        scale = shape[-2 if len(shape) == 3 else -1] ** -0.5
        drawn = jax.random.normal(jax.random.fold_in(key, next(count)), shape, jnp.float32)
        return (drawn * scale).astype(kept)

    return Decoder(config, parameter)


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Decoder:
    """A model of shapes without memory, for lowering and compiling programs.

    Example:
      >>> from jaxkv.models import ModelConfig, abstract_model
      >>> config = ModelConfig(vocab_size=128256, hidden_size=4096, num_layers=32, num_q_heads=32,
      ...                      num_kv_heads=8, head_dim=128, intermediate_size=14336,
      ...                      max_context=131072)
      >>> abstract_model(config).blocks[0].down_weight.shape
      (4096, 14336)
    """
    return jax.eval_shape(
        lambda: Decoder(config, lambda _, shape: jnp.zeros(shape, parameter_dtype(shape, dtype)))
    )
