"""Every operation on four host devices; run in a process of its own, which has four.

`python -m tests.four_devices none decode` (or `int8`; further names of `OPERATIONS` and `POLICIES`) prints a
line for each that is as on one device, and fails at the first that is not.
"""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxkv
from jaxkv.policies import HeavyHitter, LeastRecentlyUsed, PromptCompress, SemanticMerge, SlidingWindow
from jaxkv.sampling import SamplingBatch, sample, sample_each

LAYERS, TOKENS = 2, 4
SEQS = jnp.arange(4, dtype=jnp.int32)
ROPE = jaxkv.Rope.of(head_dim=16, theta=10000.0)
_POLICIES = [
    SlidingWindow(2, sinks=0, positions="cache", rope=ROPE),
    HeavyHitter(4, 2),
    LeastRecentlyUsed(4),
    SemanticMerge(4, 2),
    PromptCompress(4, observe_last=2),
]
POLICIES = {type(policy).__name__: policy for policy in _POLICIES}


def decode(cache, seqs, x):
    cache = jaxkv.maybe_compact(cache)
    cache, batch = jaxkv.allocate(cache, seqs, jnp.full_like(seqs, x.shape[0] // 4), total_tokens=x.shape[0])

    def layer(carry, number):
        cache, x = carry
        cache = jaxkv.append(cache, number, batch, x[:, :2], x[:, :2])
        return (cache, x + jaxkv.attend(cache, number, batch, x)), None

    (cache, x), _ = jax.lax.scan(layer, (cache, x), jnp.arange(LAYERS, dtype=jnp.int32))
    return cache, x


def options(cache, seqs, x):
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    cache = jaxkv.append(cache, 0, batch, x[:, :2], x[:, :2])
    seen = {"window": 4, "sink_tokens": 2, "softcap": 3.0}
    out, lse = jaxkv.attend(cache, 0, batch, x, return_lse=True, sink_logits=jnp.ones(4), **seen)
    mass = jaxkv.attention_mass(cache, 0, batch, x, lse, **seen)
    return cache, (jaxkv.merge_attention([out, out], [lse, lse]), mass)


def evicting(cache, seqs, x):
    """A step of a cache with a policy, an eviction, and a fork."""
    assert cache.policy is not None
    cache, batch = jaxkv.allocate(cache, seqs, jnp.ones_like(seqs))
    lses = [jaxkv.attend(cache, n, batch, x, return_lse=True)[1] for n in range(LAYERS)]
    mass = [jaxkv.attention_mass(cache, n, batch, x, lse) for n, lse in enumerate(lses)]
    cache = jaxkv.observe(cache, batch, jnp.stack(mass))
    if cache.policy.rule.once:
        cache, _ = jaxkv.evict(cache, seqs)
    else:
        cache, _ = jaxkv.allocate(cache, seqs, jnp.full_like(seqs, 4), total_tokens=16)
    cache, status = jaxkv.fork(jaxkv.free(cache, jnp.array([1])), jnp.array([0]), jnp.array([1]))
    return cache, status


def table_operations(cache, seqs, x):
    """Those that move no K or V, one after the other, then compaction."""
    cache, cut = jaxkv.truncate(cache, seqs, seqs + 2)
    cache = jaxkv.free(cache, jnp.array([2, 3]))
    cache, status = jaxkv.fork(cache, jnp.array([0, 1]), jnp.array([2, 3]))
    cache, shifted = jaxkv.shift_positions(cache, seqs, seqs, rope=ROPE)
    cache, reordered = jaxkv.reorder(cache, seqs, jnp.array([1, 0, 0, 3]))
    cache, moved = jaxkv.compact(jaxkv.free(cache, jnp.array([0])))
    seen = jaxkv.gather(cache, 1, seqs), jaxkv.lengths(cache), jaxkv.memory_profile(cache)
    return cache, (cut, status, shifted, reordered, moved, seen)


def prefixes(cache, seqs, x):
    """Pages that all sequences leave are matched, taken for others, and forgotten."""
    tokens = jnp.arange(40, dtype=jnp.int32).reshape(4, 10) // 20
    lengths = jnp.full_like(seqs, 5)
    cache = jaxkv.free(jaxkv.record_prefix(cache, seqs, tokens, lengths), jnp.array([0, 2, 3]))
    cache, matched = jaxkv.match_prefix(cache, seqs, tokens, lengths, salt=seqs // 3)
    cache, batch = jaxkv.allocate(cache, seqs, jnp.array([30, 1, 24, 8]), total_tokens=64)
    cache = jaxkv.free(jaxkv.record_prefix(cache, seqs, tokens, lengths, salt=seqs), seqs)
    cache, moved = jaxkv.compact(cache)
    cache, again = jaxkv.match_prefix(cache, seqs, tokens, lengths, salt=seqs)
    kept = cache.table.num_reclaimable
    return jaxkv.clear_prefixes(cache), (matched, batch.status, moved, again, kept, cache.stats.counters)


def sampled(cache, seqs, x):
    """Tokens drawn from logits that are sharded as `seqs` are."""
    settings = [jaxkv.Sampling(temperature=0.5 + n, top_k=9 - n, top_p=0.9) for n in range(4)]
    keys, logits = jax.random.split(jax.random.key(0), 4), x.sum(axis=1)
    ways = [*settings[:1], jaxkv.Sampling(temperature=1.0), jaxkv.Sampling(), SamplingBatch.of(settings)]
    return cache, [(sample(keys[0], logits, way), sample_each(keys, logits, way)) for way in ways]


OPERATIONS = {f.__name__: f for f in (decode, options, table_operations, sampled, prefixes)}


def assert_same(got, want):
    for one, other in zip(*map(jax.tree.leaves, jax.device_get((got, want))), strict=True):
        one, other = (np.asarray(array).astype(np.float64) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def in_shard_map(operation, cache, x):
    """A cache for each of four devices, with the default checks."""
    mesh = jax.make_mesh((4,), ("data",))
    sharded = PartitionSpec("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=sharded, out_specs=sharded)
    def run(arrays):
        results = operation(*jax.tree.map(lambda array: array[0], arrays))
        return jax.tree.map(lambda array: jnp.asarray(array)[None], results)

    four = jax.tree.map(lambda array: jnp.stack([array] * 4), (cache, SEQS, x))
    results = jax.jit(run)(jax.device_put(four, NamedSharding(mesh, sharded)))
    return [jax.tree.map(lambda array, n=n: array[n], jax.device_get(results)) for n in range(4)]


def over_axes(kind, operation, cache, x):
    """One cache, its K and V sharded by head, and the batch sharded over the other axis."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))

    def put(tree, *axes):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    pool = put(cache.pool, None, None, "model")
    arguments = replace(put(cache), pool=pool), put(SEQS, "data"), put(x, "data", "model")
    with jax.set_mesh(mesh):
        results = jax.jit(operation)(*arguments)
    if kind == AxisType.Explicit:
        for after, before in zip(*map(jax.tree.leaves, (results[0], arguments[0])), strict=True):
            assert after.sharding.is_equivalent_to(before.sharding, after.ndim)
    return [results]


def check_outside_jit(kind, cache):
    """Operations one by one, with K and V on a mesh and the page table where `init` put it."""
    mesh = jax.make_mesh((2,), ("model",), axis_types=(kind,))
    heads = NamedSharding(mesh, PartitionSpec(None, None, "model"))

    def operate(cache):
        cache = jaxkv.free(cache, jnp.array([1]))
        cache, forked = jaxkv.fork(cache, jnp.array([0]), jnp.array([1]))
        cache, copying = jaxkv.allocate(cache, SEQS, jnp.ones_like(SEQS))
        cache, plain = jaxkv.allocate(cache, SEQS, jnp.ones_like(SEQS))
        cache, cut = jaxkv.truncate(cache, SEQS, SEQS + 2)
        return cache, (forked, copying.status, plain.status, cut)

    got = operate(replace(cache, pool=jax.device_put(cache.pool, heads)))
    assert_same(got, operate(cache))
    assert got[0].stats.copy_on_write_copies > cache.stats.copy_on_write_copies
    assert got[0].pool.k.sharding.is_equivalent_to(heads, 5)
    print(f"outside jit, {kind.name} axes: as without a mesh", flush=True)


WAYS = {
    "in shard_map": in_shard_map,
    "over explicit axes": partial(over_axes, AxisType.Explicit),
    "over automatic axes": partial(over_axes, AxisType.Auto),
}


def main(quantization, *names):
    config = jaxkv.CacheConfig(
        num_layers=LAYERS,
        num_kv_heads=2,
        head_dim=16,
        num_pages=16,
        page_size=4,
        max_seqs=4,
        max_pages_per_seq=8,
        dtype="float32",
        quantization=None if quantization == "none" else quantization,
    )
    normal = partial(jax.random.normal, dtype=jnp.float32)
    cache, _ = jax.jit(decode)(jaxkv.init(config), SEQS, normal(jax.random.key(0), (20, 4, 16)))
    x = normal(jax.random.key(1), (TOKENS, 4, 16))
    for kind in (AxisType.Explicit, AxisType.Auto):
        check_outside_jit(kind, cache)
    for name in names:
        operation = OPERATIONS.get(name, evicting)
        cache = replace(cache, policy=jaxkv.init(config, POLICIES.get(name)).policy)
        if operation is prefixes:
            with_index = replace(config, prefix_cache=True)
            table = replace(cache.table, prefixes=jaxkv.init(with_index).table.prefixes)
            cache = replace(cache, table=table, config=with_index)
        want = jax.jit(operation)(cache, SEQS, x)
        assert cache.policy is None or want[0].stats.evictions > 0
        for way_name, way in WAYS.items():
            for got in way(operation, cache, x):
                assert_same(got, want)
            print(f"{name}, {way_name}: as on one device", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
