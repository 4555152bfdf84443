"""A Llama-family language model (Llama, Mistral, Qwen2) on the paged cache.

RMSNorm, rotary positions, grouped-query attention, SwiGLU. Every call takes and returns the cache; the model
is a pytree of weights, an argument of `jax.jit`.

Weights are stored `[out, in]`, as in checkpoints, with Q, K, V in one matrix and gate, up in another: this
decoded fastest on a CPU, and loads without a transpose. Matrices have the model's dtype; vectors (norms,
biases), the residual stream and the logits are float32.
"""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jaxkv.attention import attend, attention_mass
from jaxkv.config import CacheConfig
from jaxkv.models.config import ModelConfig
from jaxkv.pool import append
from jaxkv.rope import inverse_frequencies, rotate
from jaxkv.state import Batch, KVCache
from pallas_kernels.ordering import after

ParameterSource = Callable[[str, tuple[int, ...]], jax.Array]
"""Returns the parameter of a name, such as `blocks.0.qkv`, in the given shape."""


def project(
    x: Float[Array, "tokens in_features"], weight: Float[Array, "out_features in_features"]
) -> Float[Array, "tokens out_features"]:
    """`x` times the transpose of `weight`: multiplied in the weight's dtype, summed in float32."""
    x = x.astype(weight.dtype)
    if x.shape[0] == 1 and weight.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(x, weight, cpu=_project_twice, default=_project)
    return _project(x, weight)


def _project(x: Array, weight: Array) -> Array:
    contract_last = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract_last, preferred_element_type=jnp.float32)


def _project_twice(x: Array, weight: Array) -> Array:
    # On a CPU, XLA multiplies bfloat16 ten times faster for two rows than for one: 35 ms instead of 420 for
    # a whole SmolLM2-135M.
    return _project(jnp.concatenate([x, x]), weight)[:1]


def rms_norm(
    x: Float[Array, "tokens hidden"], weight: Float[Array, " hidden"], eps: float
) -> Float[Array, "tokens hidden"]:
    """Scales each token to a root mean square of one, then each feature by `weight`."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * weight[None, :]


class Block(nnx.Module):
    """One transformer block, split at the attention: `qkv` before it, `mix` after it."""

    def __init__(self, config: ModelConfig, parameter: ParameterSource, prefix: str):
        hidden, ffn = config.hidden_size, config.intermediate_size
        qkv = config.q_features + 2 * config.kv_features
        self.config = config
        self.attention_norm = nnx.Param(parameter(f"{prefix}.attention_norm", (hidden,)))
        self.qkv_weight = nnx.Param(parameter(f"{prefix}.qkv", (qkv, hidden)))
        self.qkv_bias = nnx.Param(parameter(f"{prefix}.qkv_bias", (qkv,))) if config.qkv_bias else None
        self.out_weight = nnx.Param(parameter(f"{prefix}.out", (hidden, config.q_features)))
        self.mlp_norm = nnx.Param(parameter(f"{prefix}.mlp_norm", (hidden,)))
        self.gate_up_weight = nnx.Param(parameter(f"{prefix}.gate_up", (2 * ffn, hidden)))
        self.down_weight = nnx.Param(parameter(f"{prefix}.down", (hidden, ffn)))

    def qkv(
        self, x: Float[Array, "tokens hidden"], positions: Int[Array, " tokens"]
    ) -> tuple[
        Float[Array, "tokens q_heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
    ]:
        """Normalizes and projects, and rotates queries and keys by their tokens' positions.

        Returns:
          q, k and v in the weights' dtype.
        """
        config, dtype = self.config, self.qkv_weight[...].dtype
        fused = project(rms_norm(x, self.attention_norm[...], config.rms_norm_eps), self.qkv_weight[...])
        if self.qkv_bias is not None:
            fused = fused + self.qkv_bias[...][None, :]
        heads = fused.reshape(x.shape[0], -1, config.head_dim)
        q, k, v = jnp.split(heads, [config.num_q_heads, config.num_q_heads + config.num_kv_heads], axis=1)
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        q, k = (rotate(part, positions, frequencies, config.rope_pairing) for part in (q, k))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    def mix(
        self,
        x: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens q_heads head_dim"],
    ) -> Float[Array, "tokens hidden"]:
        """Adds the output of attention, then of the SwiGLU MLP, to the residual stream."""
        flat = attended.reshape(x.shape[0], -1).astype(jnp.float32)
        x = x + project(flat, self.out_weight[...])
        normed = rms_norm(x, self.mlp_norm[...], self.config.rms_norm_eps)
        gate, up = jnp.split(project(normed, self.gate_up_weight[...]), 2, axis=-1)
        return x + project(jax.nn.silu(gate) * up, self.down_weight[...])


class Llama(nnx.Module):
    """Token ids in, next-token logits out, with every layer's K and V in a paged cache.

    Args:
      config: the model's sizes.
      parameter: returns each weight; see `random_model`, `abstract_model` and the loaders.
    """

    def __init__(self, config: ModelConfig, parameter: ParameterSource):
        table = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embedding = nnx.Param(parameter("embedding", table))
        self.blocks = nnx.List(
            [Block(config, parameter, f"blocks.{layer}") for layer in range(config.num_layers)]
        )
        self.final_norm = nnx.Param(parameter("final_norm", (config.hidden_size,)))
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
        for layer, (block, window) in enumerate(zip(self.blocks, self.config.windows, strict=True)):
            q, k, v = block.qkv(x, batch.positions)
            cache = append(cache, layer, batch, k, v)
            attended, lse = attend(cache, layer, batch, q, window=window, return_lse=True)
            if return_mass and layer in cache.config.full_layers:
                masses.append(attention_mass(cache, layer, batch, q, lse, window=window))
                attended = after(attended, masses[-1])
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
        return self.embedding[...].at[tokens].get(mode="clip").astype(jnp.float32)

    def unembed(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens vocab"]:
        """The final norm and the output projection: float32 logits."""
        table = self.embedding if self.unembedding is None else self.unembedding
        normed = rms_norm(x, self.final_norm[...], self.config.rms_norm_eps)
        return project(normed, table[...])


def parameter_dtype(shape: tuple[int, ...], dtype: DTypeLike) -> np.dtype:
    """The dtype of a parameter: matrices have the model's, vectors float32."""
    return np.dtype(jnp.float32) if len(shape) == 1 else np.dtype(dtype)


def random_model(config: ModelConfig, key: Key[Array, ""], dtype: DTypeLike = jnp.float32) -> Llama:
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
        scale = shape[-1] ** -0.5
        drawn = jax.random.normal(jax.random.fold_in(key, next(count)), shape, jnp.float32)
        return (drawn * scale).astype(kept)

    return Llama(config, parameter)


def abstract_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Llama:
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
        lambda: Llama(config, lambda _, shape: jnp.zeros(shape, parameter_dtype(shape, dtype)))
    )
