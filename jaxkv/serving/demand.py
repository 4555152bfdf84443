"""How many pages samples need."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxkv.entries import pages_for
from jaxkv.granting import page_needs
from jaxkv.serving.config import ServingConfig
from jaxkv.state import KVCache


def pages_of(lengths: Int[Array, "..."], config: ServingConfig) -> Int[Array, "..."]:
    """Most pages that a sequence of so many tokens holds, in all groups."""
    total = jnp.zeros_like(lengths)
    most = None
    if config.policy is not None:
        most = config.policy.most_kept(config.cache) + config.most_at_once
    for group in config.cache.groups:
        stored = lengths if most is None or group.window is not None else jnp.minimum(lengths, most)
        total += jnp.minimum(pages_for(stored, group.page_size), group.columns)
    return total


def shared_pages(prompt_lengths: Int[Array, "..."], config: ServingConfig) -> Int[Array, "..."]:
    """Pages that all samples of a prompt surely share while they run: whole ones, where none are dropped."""
    if config.policy is not None:
        return jnp.zeros_like(prompt_lengths)
    full = [group.page_size for group in config.cache.groups if group.window is None]
    return sum((prompt_lengths // size for size in full), jnp.zeros_like(prompt_lengths))


def fits_alone(
    lengths: Int[Array, " entries"], samples: Int[Array, " entries"], config: ServingConfig
) -> Bool[Array, " entries"]:
    """Whether an empty cache holds a prompt with one token more of each sample."""
    shared, one = shared_pages(lengths, config), pages_of(lengths + 1, config)
    # Compared by division: the product might overflow. A prompt that fills its row needs no page more.
    own, room = one - shared, config.cache.num_pages - shared
    fits = (own == 0) | (jnp.maximum(samples, 1) <= room // jnp.maximum(own, 1))
    return (room >= 0) & fits


def needs(
    cache: KVCache, slots: Int[Array, " slots"], num_tokens: Int[Array, " slots"]
) -> Int[Array, " slots"]:
    """Pages that `allocate` takes for so many more tokens of each slot, copies among them."""
    return jnp.sum(page_needs(cache, slots, num_tokens).need, axis=0, dtype=jnp.int32)
