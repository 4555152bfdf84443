"""A compiled program updates the index of prefixes in place: none of its arrays is copied, however large."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv import reclaimable
from jaxkv.hlo import copies_of, new_buffers

# So many that nothing else is as large as a word for each.
ONE_KIND = jaxkv.CacheConfig(
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    num_pages=20_000,
    page_size=4,
    max_seqs=8,
    max_pages_per_seq=16,
    prefix_cache=True,
)
TWO_KINDS = replace(ONE_KIND, layer_windows=(9, None), max_chunk=16)


def allocate(cache, seqs, num_tokens):
    return jaxkv.allocate(cache, seqs, num_tokens, total_tokens=16)


OPERATIONS = [jaxkv.match_prefix, jaxkv.record_prefix, allocate, jaxkv.free]


def arguments(operation, entries):
    vector = jax.ShapeDtypeStruct((entries,), jnp.int32)
    if operation in (jaxkv.match_prefix, jaxkv.record_prefix):
        return vector, jax.ShapeDtypeStruct((entries, 64), jnp.int32), vector
    return (vector, vector) if operation is allocate else (vector,)


def copied(operation, config, *arguments) -> list[str]:
    """What a program that was given the cache writes anew, as large as an array of the index."""
    cache = jax.eval_shape(lambda: jaxkv.init(config))
    hlo = jax.jit(operation, donate_argnums=0).lower(cache, *arguments).compile().as_text()
    shapes = {x.shape for x in jax.tree.leaves(cache.table.prefixes) if x.size >= config.num_pages}
    return [*copies_of(hlo, shapes), *new_buffers(hlo, at_least=4 * config.num_pages)]


# Every run has those that a decode loop calls; `make check-aot` compiles all of them for a GPU.
@pytest.mark.parametrize(
    ("operation", "config", "entries"),
    [
        pytest.param(
            operation,
            config,
            entries,
            id=f"{operation.__name__}, {name}",
            marks=() if name == "one kind" and operation in (allocate, jaxkv.free) else pytest.mark.slow,
        )
        for operation in OPERATIONS
        for name, config, entries in (
            ("one kind", ONE_KIND, 8),
            ("one entry", ONE_KIND, 1),
            ("two kinds", TWO_KINDS, 8),
        )
    ],
)
def test_no_array_of_the_index_is_copied(operation, config, entries, monkeypatch, traced_anew):
    """Where the queue is not tidied: that visits all of it, once in as many releases as there are pages."""
    monkeypatch.setattr(reclaimable, "_tidy_queue", lambda index: index)
    assert copied(operation, config, *arguments(operation, entries)) == []


def test_a_copy_of_one_of_its_arrays_is_recognised():
    def read_too_late(cache, seqs):
        index = cache.table.prefixes
        written = index.queue.at[seqs].set(0)
        read = jnp.sum(index.queue[::2] * written[::2])
        return replace(cache, table=replace(cache.table, prefixes=replace(index, queue=written))), read

    (copy,) = copied(read_too_late, ONE_KIND, *arguments(jaxkv.free, 8))[:1]
    assert "copy" in copy


def test_clearing_looks_at_every_page_and_copies_no_more_than_a_word_of_each():
    cache = jax.eval_shape(lambda: jaxkv.init(ONE_KIND))
    hlo = jax.jit(jaxkv.clear_prefixes, donate_argnums=0).lower(cache).compile().as_text()
    index = cache.table.prefixes
    large = {x.shape for x in (index.tokens, index.pages, index.buckets, index.queue)}
    assert list(copies_of(hlo, large)) == []
