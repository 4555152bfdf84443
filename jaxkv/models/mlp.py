"""What follows attention in a block: one MLP, or a mixture of experts."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxkv.models.config import ModelConfig
from jaxkv.models.experts import Experts
from jaxkv.models.projection import project, project_by_group, project_each

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def activate(
    config: ModelConfig, features: Float[Array, "rows gate_and_up"]
) -> Float[Array, "rows intermediate"]:
    """The activation of an MLP's first projection: of all features, or of a gate for the others."""
    if not config.gated:
        return _ACTIVATIONS[config.activation](features)
    gate, up = jnp.split(features, 2, axis=-1)
    if config.activation != "clipped_swiglu":
        return _ACTIVATIONS[config.activation](gate) * up
    limit = config.swiglu_limit
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(config.swiglu_alpha * gate) * (up + 1.0)


def value(parameter: nnx.Param | None) -> Array | None:
    """The array of a parameter that a model may lack."""
    return None if parameter is None else parameter[...]


class Mixture(nnx.Module):
    """A router, its experts, and the expert that every token uses besides."""

    def __init__(self, config: ModelConfig, experts: Experts, kept):
        hidden, width, count = config.hidden_size, experts.intermediate_size, experts.count
        parts, biased = 2 if config.gated else 1, config.mlp_bias
        first, shared = parts * width, experts.shared_size or 0
        self.config, self.experts = config, experts
        self.router = kept("router", count, hidden)
        self.router_bias = kept("router_bias", count, wanted=experts.router_bias)
        # In the order of `jax.lax.ragged_dot`, other than matrices elsewhere: the out features are last.
        self.gate_up = kept("expert_gate_up", count, hidden, first)
        self.gate_up_bias = kept("expert_gate_up_bias", count, first, wanted=biased)
        self.down = kept("expert_down", count, width, hidden)
        self.down_bias = kept("expert_down_bias", count, hidden, wanted=biased)
        self.shared_gate_up = kept("shared_gate_up", parts * shared, hidden, wanted=bool(shared))
        self.shared_down = kept("shared_down", hidden, shared, wanted=bool(shared))
        self.shared_gate = kept("shared_gate", 1, hidden, wanted=experts.shared_gate)

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens hidden"]:
        """The weighted sum of each token's experts; no token is dropped, whatever the others choose."""
        experts, tokens = self.experts, x.shape[0]
        scores = jax.nn.softmax(project(x, self.router[...], value(self.router_bias)), axis=-1)
        weights, chosen = jax.lax.top_k(scores, experts.per_token)
        if experts.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        expert, rows = chosen.reshape(-1), jnp.repeat(x, experts.per_token, axis=0)
        # `ragged_dot` reads the weights of every expert; few rows read less by a copy each.
        run = self._each if rows.shape[0] <= experts.count else self._sorted
        out = run(rows, expert).reshape(tokens, experts.per_token, -1)
        return jnp.sum(out * weights[..., None], axis=1) + self._shared(x)

    def _each(self, rows: Array, expert: Array) -> Array:
        first = project_each(rows, self.gate_up[...], expert)
        second = activate(self.config, _biased(first, self.gate_up_bias, expert))
        return _biased(project_each(second, self.down[...], expert), self.down_bias, expert)

    def _sorted(self, rows: Array, expert: Array) -> Array:
        order = jnp.argsort(expert)
        rows, expert = rows[order], expert[order]
        sizes = jnp.bincount(expert, length=self.experts.count).astype(jnp.int32)
        first = project_by_group(rows, self.gate_up[...], sizes)
        second = activate(self.config, _biased(first, self.gate_up_bias, expert))
        out = _biased(project_by_group(second, self.down[...], sizes), self.down_bias, expert)
        return jnp.zeros_like(out).at[order].set(out, unique_indices=True)

    def _shared(self, x: Array) -> Array | float:
        if self.shared_gate_up is None or self.shared_down is None:
            return 0.0
        out = project(activate(self.config, project(x, self.shared_gate_up[...])), self.shared_down[...])
        return out if self.shared_gate is None else out * jax.nn.sigmoid(project(x, self.shared_gate[...]))


def _biased(rows: Array, biases: nnx.Param | None, expert: Array) -> Array:
    return rows if biases is None else rows + biases[...][expert].astype(jnp.float32)
