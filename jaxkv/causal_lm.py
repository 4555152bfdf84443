"""The interface of a language model for generation, and checks of what it returns."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxkv.entries import rows_of
from jaxkv.eviction import observe
from jaxkv.layers import view, whole
from jaxkv.state import Batch, KVCache


class CausalLM(Protocol):
    """A model that takes and returns the cache, and is a pytree, such as an NNX or Equinox module.

    It may also have a method `cache_config(**sizes) -> jaxkv.CacheConfig`, which adds its layers, KV heads,
    `head_dim` and dtype to `num_pages`, `page_size`, `max_seqs` and `max_pages_per_seq`. Then `generate`
    needs no config.

    Example:
      >>> import jax, jax.numpy as jnp, jaxkv
      >>> @jax.tree_util.register_static
      ... class NextToken:
      ...     "One layer, without attention: after token t comes t + 1, modulo 8."
      ...     def __call__(self, tokens, cache, batch, *, rows=None):
      ...         zeros = jnp.zeros((tokens.shape[0], 1, 8))
      ...         cache = jaxkv.append(cache, 0, batch, zeros, zeros)
      ...         last = tokens if rows is None else tokens[rows]
      ...         return jax.nn.one_hot((last + 1) % 8, 8), cache
      ...     def cache_config(self, **sizes):
      ...         return jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, **sizes)
      >>> jaxkv.generate(NextToken(), [[3, 4]], max_new_tokens=3).tokens
      [[[5, 6, 7]]]
    """

    def __call__(
        self, tokens: Int[Array, " tokens"], cache: KVCache, batch: Batch, *, rows: Array | None = None
    ) -> tuple[Float[Array, "rows_or_tokens vocab"], KVCache]:
        """Returns logits of the tokens at `rows` (None: all), and the cache after an append in each layer.

        For policies that need the attention mass a model also accepts `return_mass=True`. It then also
        returns the results of `attention_mass`, stacked over layers.
        """
        ...


def takes_mass(model: CausalLM) -> bool:
    """Whether the model can be called with `return_mass=True`."""
    return accepts(model, "return_mass")


def accepts(model: CausalLM, keyword: str) -> bool:
    """Whether the model can be called with a keyword."""
    parameters = inspect.signature(model).parameters.values()
    return any(p.name == keyword or p.kind is p.VAR_KEYWORD for p in parameters)


def run_model(
    model: CausalLM,
    tokens: Int[Array, " tokens"],
    cache: KVCache,
    batch: Batch,
    rows: Int[Array, " rows"] | None = None,
    *,
    observed: bool = True,
) -> tuple[Float[Array, "rows_or_tokens vocab"], KVCache]:
    """Runs the model; gives the attention mass to the cache's policy, if `observed` and the policy needs it.

    Raises:
      ValueError: at trace time, for results that do not match `CausalLM`.
    """
    needs_mass = observed and cache.policy is not None and cache.policy.rule.needs_mass
    options = {"return_mass": True} if needs_mass else {}
    results = cast(Any, model)(tokens, cache, batch, rows=rows, **options)
    logits, cache, *mass = _checked(model, results, tokens, cache, batch, rows, needs_mass)
    return logits, observe(cache, batch, *mass) if needs_mass else cache


def _checked(model, results: Any, tokens, cache: KVCache, batch: Batch, rows, needs_mass: bool):
    """The model's results; raises `ValueError` naming the result that is wrong and what it should be."""
    name, parts = type(model).__name__, ["logits", "cache"] + ["mass"] * needs_mass
    if not isinstance(results, (tuple, list)) or len(results) != len(parts):
        count = f" of {len(results)}" if isinstance(results, (tuple, list)) else ""
        raise ValueError(
            f"{name} must return a tuple ({', '.join(parts)}), not a {type(results).__name__}{count}"
        )
    logits, returned, *mass = results
    count, asked = (len(tokens), "") if rows is None else (len(rows), f" with rows [{len(rows)}]")
    shape, dtype = getattr(logits, "shape", ()), getattr(logits, "dtype", "")
    if len(shape) != 2 or shape[0] != count or not jnp.issubdtype(dtype, jnp.floating):
        found = f"{dtype}{list(shape)}" if dtype else type(logits).__name__
        raise ValueError(
            f"{name} must return float logits [{count}, vocab] for tokens [{len(tokens)}]{asked}, not {found}"
        )
    if not isinstance(returned, KVCache) or returned.config != cache.config:
        raise ValueError(f"{name} must return the cache that append returned, not {returned!r:.200}")
    config = cache.config
    shape = (len(config.full_layers), len(batch.seqs), config.num_kv_heads, config.max_tokens_per_seq)
    if needs_mass and getattr(mass[0], "shape", None) != shape:
        found = list(getattr(mass[0], "shape", [type(mass[0]).__name__]))
        raise ValueError(f"{name} must return mass {list(shape)}, not {found}")
    return logits, returned, *mass


def mark_layers(cache: KVCache, batch: Batch) -> KVCache:
    """Fills one new token slot of each layer with a mark, to find layers that the model does not write.

    The mark is the lowest float in all elements and scales, and the largest integer in codes. `append` never
    writes it: K and V are not that low in every element, and a scale is never negative.

    Args:
      cache: as `allocate` returned it.
      batch: of the same call. Without tokens nothing is marked.
    """
    config, pool = cache.config, cache.pool
    for number, group in enumerate(config.groups):
        fill = partial(_fill_slot, *_first_slot(batch, number))
        pool = whole(jax.tree.map(fill, view(pool, config, group)), config)
    return replace(cache, pool=pool)


def _fill_slot(page: Array, offset: Array, leaf: Array) -> Array:
    return leaf.at[:, page, :, offset].set(_mark(leaf), mode="drop")


def unwritten_layers(cache: KVCache, batch: Batch) -> Bool[Array, " layers"]:
    """Which layers still hold the mark of `mark_layers`."""
    config, of_groups = cache.config, []
    for number, group in enumerate(config.groups):
        page, offset = _first_slot(batch, number)
        leaves = jax.tree.leaves(view(cache.pool, config, group))
        slots = [leaf.at[:, page, :, offset].get(mode="fill", fill_value=0) for leaf in leaves]
        marked = [jnp.all(slot.reshape(slot.shape[0], -1) == _mark(slot), axis=1) for slot in slots]
        of_groups.append(jnp.all(jnp.stack(marked), axis=0) & (page < config.num_pages))
    groups, indices = (np.array(numbers) for numbers in zip(*config.homes, strict=True))
    return jnp.stack(of_groups)[groups, indices]


def _mark(leaf: Array) -> Array:
    # Not NaN: a compiler may change its bits when it converts bfloat16, and `jax_debug_nans` would raise.
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.asarray(jnp.finfo(leaf.dtype).min if floating else jnp.iinfo(leaf.dtype).max, leaf.dtype)


def _first_slot(batch: Batch, group: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Page and offset of the batch's first token in a group; page `num_pages` if it has none."""
    num_pages = batch.config.num_pages
    first = jnp.argmax(batch.page_ids[group] < num_pages)
    return rows_of(batch.page_ids[group], first, num_pages), rows_of(batch.offsets[group], first)
