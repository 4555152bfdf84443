"""One transformer block of `Decoder`, and the functions it is made of.

Weights are stored `[out, in]`, as in checkpoints, with Q, K, V in one matrix and gate, up in another: this
decoded fastest on a CPU, and loads without a transpose. Matrices have the model's dtype; vectors (norms,
biases), the residual stream and the logits are float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxkv.models.config import ModelConfig
from jaxkv.rope import rotate

ParameterSource = Callable[[str, tuple[int, ...]], jax.Array]
"""Returns the parameter of a name, such as `blocks.0.qkv`, in the given shape."""

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


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
    x: Float[Array, "*rows features"], weight: Float[Array, " features"], eps: float
) -> Float[Array, "*rows features"]:
    """Scales each row to a root mean square of one, then each feature by `weight`."""
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * scale * weight.reshape(*(1,) * (x.ndim - 1), -1)


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

        def kept(name: str, *shape: int, wanted: bool = True) -> nnx.Param | None:
            return nnx.Param(parameter(f"blocks.{layer}.{name}", shape)) if wanted else None

        self.config, self.rope = config, config.ropes[layer]
        self.attention_norm = kept("attention_norm", hidden, wanted=before)
        self.qkv_weight = nnx.Param(parameter(f"blocks.{layer}.qkv", (qkv, hidden)))
        self.qkv_bias = kept("qkv_bias", qkv, wanted=config.qkv_bias)
        self.q_norm = kept("q_norm", q_width, wanted=config.qk_norm is not None)
        self.k_norm = kept("k_norm", k_width, wanted=config.qk_norm is not None)
        self.out_weight = nnx.Param(parameter(f"blocks.{layer}.out", (hidden, config.q_features)))
        self.attention_post_norm = kept("attention_post_norm", hidden, wanted=after)
        self.mlp_norm = kept("mlp_norm", hidden, wanted=before)
        self.gate_up_weight = nnx.Param(parameter(f"blocks.{layer}.gate_up", (2 * ffn, hidden)))
        self.down_weight = nnx.Param(parameter(f"blocks.{layer}.down", (hidden, ffn)))
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
        fused = project(self._normed(x, self.attention_norm), self.qkv_weight[...])
        if self.qkv_bias is not None:
            fused = fused + self.qkv_bias[...][None, :]
        heads = fused.reshape(x.shape[0], -1, config.head_dim)
        q, k, v = jnp.split(heads, [config.num_q_heads, config.num_q_heads + config.num_kv_heads], axis=1)
        q, k = self._heads_normed(q, self.q_norm), self._heads_normed(k, self.k_norm)
        if self.rope is not None:
            rope, frequencies = self.rope, np.asarray(self.rope.frequencies, np.float32)
            q, k = (rotate(part, positions, frequencies, rope.pairing, rope.magnitude) for part in (q, k))
        return q.astype(dtype), k.astype(dtype), v.astype(dtype)

    def mix(
        self,
        x: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens q_heads head_dim"],
    ) -> Float[Array, "tokens hidden"]:
        """Adds the output of attention, then of the gated MLP, to the residual stream."""
        flat = attended.reshape(x.shape[0], -1).astype(jnp.float32)
        x = self._added(x, self._normed(project(flat, self.out_weight[...]), self.attention_post_norm))
        normed = self._normed(x, self.mlp_norm)
        gate, up = jnp.split(project(normed, self.gate_up_weight[...]), 2, axis=-1)
        activated = _ACTIVATIONS[self.config.activation](gate) * up
        return self._added(x, self._normed(project(activated, self.down_weight[...]), self.mlp_post_norm))

    def _added(self, x: Array, part: Array) -> Array:
        multiplier = self.config.residual_multiplier
        return x + (part if multiplier == 1.0 else part * multiplier)

    def _heads_normed(self, heads: Array, norm: nnx.Param | None) -> Array:
        if self.config.qk_norm != "all":
            return self._normed(heads, norm)
        return self._normed(heads.reshape(heads.shape[0], -1), norm).reshape(heads.shape)

    def _normed(self, x: Array, norm: nnx.Param | None) -> Array:
        return x if norm is None else rms_norm(x, norm[...], self.config.rms_norm_eps)
