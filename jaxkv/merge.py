"""Merges attention over parts of the keys into one softmax."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.checks import check_floating


def merge_attention(
    outs: Float[Array, "parts tokens heads head_dim"] | Sequence[Float[Array, "tokens heads head_dim"]],
    lses: Float[Array, "parts tokens heads"] | Sequence[Float[Array, "tokens heads"]],
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Merges attention over disjoint parts of the keys, such as a shared prefix and the rest.

        lse = log(sum over parts of exp(lses))        out = sum over parts of exp(lses - lse) * outs

    Where a token attends to no key of a part, the part's `lse` is `-inf`. Its `out` may then be NaN: it is
    ignored.

    Args:
      outs: normalized results of each part, stacked or a list; all of one floating-point dtype.
      lses: log-sum-exp of each part's scores, base e, as `attend(..., return_lse=True)` returns it.

    Returns:
      `out` in the dtype of `outs`, and `lse` in float32 (float64 from float64); zeros and `-inf` for a token
      without a key in any part.

    Raises:
      ValueError: for no parts, or shapes and dtypes that do not match, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> outs, lses = jnp.array([[[[1.0]]], [[[4.0]]]]), jnp.log(jnp.array([[[2.0]], [[1.0]]]))
      >>> out, lse = jaxkv.merge_attention(outs, lses)
      >>> float(out[0, 0, 0].round(4)), float(jnp.exp(lse[0, 0]).round(4))
      (2.0, 3.0)
    """
    out, lse = _stacked("outs", outs, 4), _stacked("lses", lses, 3)
    if out.shape[:3] != lse.shape:
        raise ValueError(
            f"lses {list(lse.shape)} must be [parts, tokens, heads] of outs {list(out.shape)}: "
            f"{list(out.shape[:3])}"
        )
    dtype = jnp.float64 if jnp.float64 in (out.dtype, lse.dtype) else jnp.float32
    lse = lse.astype(dtype)
    empty = jnp.isneginf(lse)
    largest = jnp.max(lse, axis=0, keepdims=True)
    # Without any key there is no largest score; any finite value works.
    largest = jnp.where(jnp.isneginf(largest), jnp.zeros_like(largest), largest)
    weights = jnp.exp(lse - largest)
    total = jnp.sum(weights, axis=0, keepdims=True)
    none = total == 0
    weights = weights / jnp.where(none, jnp.ones_like(total), total)
    read = jnp.where(empty[..., None], jnp.zeros((), dtype), out.astype(dtype))
    merged = jnp.sum(weights[..., None] * read, axis=0).astype(out.dtype)
    # Where the total is 0, its logarithm is the -inf to return.
    return merged, (largest + jnp.log(total))[0]


def _stacked(name: str, parts: Array | Sequence[Array], ndim: int) -> Array:
    axes = "[parts, tokens, heads, head_dim]" if ndim == 4 else "[parts, tokens, heads]"
    if isinstance(parts, (list, tuple)):
        arrays = [jnp.asarray(part) for part in parts]
        kinds = {(str(array.dtype), array.shape) for array in arrays}
        if len(kinds) != 1:
            found = ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays) or "none"
            raise ValueError(f"{name} must be parts of one shape and dtype, not {found}")
        parts = jnp.stack(arrays)
    array = jnp.asarray(parts)
    if array.ndim != ndim or array.shape[0] == 0:
        raise ValueError(f"{name} must be {axes} with at least one part, not {list(array.shape)}")
    check_floating(name, array)
    return array
