"""One transformer block of `Decoder`, and the functions it is made of.

Weights are stored `[out, in]`, as in checkpoints, with Q, K, V in one matrix and gate, up in another: this
decoded fastest on a CPU, and loads without a transpose. Matrices have the model's dtype; vectors (norms,
biases), the residual stream and the logits are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.models.config import ModelConfig
from jaxkv.models.mlp import Mixture, activate, value
from jaxkv.models.norms import layer_norm, rms_norm
from jaxkv.models.projection import project

ParameterSource = Callable[[str, tuple[int, ...]], jax.Array]
"""Returns the parameter of a name, such as `blocks.0.qkv`, in the given shape."""


def normed(config: ModelConfig, x: Array, weight: nnx.Param | None, bias: nnx.Param | None = None) -> Array:
    """`x` under the model's kind of norm; without a weight as it is."""
    if weight is None:
        return x
    if config.norm == "rms":
        return rms_norm(x, weight[...], config.rms_norm_eps)
    return layer_norm(x, weight[...], config.rms_norm_eps, value(bias))


def softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """`cap * tanh(x / cap)`: values smoothly limited to `-cap .. cap`; None limits nothing."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Block(nnx.Module):
    """One transformer block, split at the attention: `qkv` before it, `mix` after it."""

    def __init__(self, config: ModelConfig, parameter: ParameterSource, layer: int):
        hidden, ffn = config.hidden_size, config.intermediate_size
        qkv = config.q_features + 2 * config.kv_features
        together = config.qk_norm == "all"
        q_width, k_width = (
            (config.q_features, config.kv_features) if together else (config.head_dim, config.head_dim)
        )
        before, after = config.norms != "after", config.norms != "before"
        separate = before and not config.parallel
        experts = None if layer in config.dense_layers else config.experts
        dense = experts is None

        def kept(name: str, *shape: int, wanted: bool = True) -> Any:
            return nnx.Param(parameter(f"blocks.{layer}.{name}", shape)) if wanted else None

        self.config, self.rope = config, config.ropes[layer]
        self.attention_norm = kept("attention_norm", hidden, wanted=before)
        self.attention_norm_bias = kept("attention_norm_bias", hidden, wanted=before and config.norm_bias)
        self.qkv_weight = nnx.Param(parameter(f"blocks.{layer}.qkv", (qkv, hidden)))
        self.qkv_bias = kept("qkv_bias", qkv, wanted=config.qkv_bias)
        self.q_norm = kept("q_norm", q_width, wanted=config.qk_norm is not None)
        self.k_norm = kept("k_norm", k_width, wanted=config.qk_norm is not None)
        self.out_weight = nnx.Param(parameter(f"blocks.{layer}.out", (hidden, config.q_features)))
        self.out_bias = kept("out_bias", hidden, wanted=config.out_bias)
        self.sinks = kept("sinks", config.num_q_heads, wanted=config.sinks)
        self.attention_post_norm = kept("attention_post_norm", hidden, wanted=after)
        self.mlp_norm = kept("mlp_norm", hidden, wanted=separate)
        self.mlp_norm_bias = kept("mlp_norm_bias", hidden, wanted=separate and config.norm_bias)
        first = 2 * ffn if config.gated else ffn
        self.gate_up_weight = kept("gate_up", first, hidden, wanted=dense)
        self.gate_up_bias = kept("gate_up_bias", first, wanted=dense and config.mlp_bias)
        self.down_weight = kept("down", hidden, ffn, wanted=dense)
        self.down_bias = kept("down_bias", hidden, wanted=dense and config.mlp_bias)
        self.mixture = None if experts is None else Mixture(config, experts, kept)
        self.mlp_post_norm = kept("mlp_post_norm", hidden, wanted=after)

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
        fused = project(self._attention_input(x), self.qkv_weight[...], value(self.qkv_bias))
        heads = fused.reshape(x.shape[0], -1, config.head_dim)
        q, k, v = jnp.split(heads, [config.num_q_heads, config.num_q_heads + config.num_kv_heads], axis=1)
        q, k = self._heads_normed(q, self.q_norm), self._heads_normed(k, self.k_norm)
        if self.rope is not None:
            q, k = (self.rope.rotate(part, positions) for part in (q, k))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    def mix(
        self,
        x: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens q_heads head_dim"],
    ) -> Float[Array, "tokens hidden"]:
        """Adds the outputs of attention and of the MLP to the residual stream."""
        flat = attended.reshape(x.shape[0], -1).astype(jnp.float32)
        out = project(flat, self.out_weight[...], value(self.out_bias))
        before, x = x, self._added(x, normed(self.config, out, self.attention_post_norm))
        if self.config.parallel:
            inputs = self._attention_input(before)
        else:
            inputs = normed(self.config, x, self.mlp_norm, self.mlp_norm_bias)
        return self._added(x, normed(self.config, self._mlp(inputs), self.mlp_post_norm))

    def _mlp(self, x: Array) -> Array:
        if self.mixture is not None:
            return self.mixture(x)
        activated = activate(self.config, project(x, self.gate_up_weight[...], value(self.gate_up_bias)))
        return project(activated, self.down_weight[...], value(self.down_bias))

    def _attention_input(self, x: Array) -> Array:
        return normed(self.config, x, self.attention_norm, self.attention_norm_bias)

    def _added(self, x: Array, part: Array) -> Array:
        multiplier = self.config.residual_multiplier
        return x + (part if multiplier == 1.0 else part * multiplier)

    def _heads_normed(self, heads: Array, norm: nnx.Param | None) -> Array:
        if self.config.qk_norm != "all":
            return normed(self.config, heads, norm)
        return normed(self.config, heads.reshape(heads.shape[0], -1), norm).reshape(heads.shape)
