"""Attention through the cache: each token sees its own sequence, up to and with itself."""

import inspect
import itertools
import sys
from dataclasses import replace
from importlib import import_module

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig
from jaxkv.testing import poison_free_pages
from pallas_kernels import formats, paged_attention, reference, use_backend
from pallas_kernels.paged_attention import prefixes
from pallas_kernels.reference.cases import TOLERANCE
from tests import jitted
from tests.caches import ONE_SEQUENCE, PAGE_OF_ONE, SMALL, filled, ints, normal, poisoned_init
from tests.twin import Twin

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "window": {"window": 7},
    "sink tokens": {"window": 7, "sink_tokens": 5},
    "softcap": {"softcap": 1.5},
    "all": {"window": 20, "softcap": 3.0, "scale": 0.2},
}


def step(cache, seqs, num_tokens, layer, k, v, q, **options):
    """One layer of one step, jitted and donated. `layer` is traced, or a Python int by a closure."""
    cache, batch = jaxkv.allocate(cache, seqs, num_tokens, total_tokens=q.shape[0])
    cache = jaxkv.append(cache, layer, batch, k, v)
    return cache, jaxkv.attend(cache, layer, batch, q, **options)


def compiled(layer=None, **options):
    if layer is None:
        return jax.jit(lambda *args: step(*args, **options), donate_argnums=0)
    return jax.jit(
        lambda cache, seqs, counts, _, k, v, q: step(cache, seqs, counts, layer, k, v, q, **options),
        donate_argnums=0,
    )


def float64(x):
    return np.asarray(x).astype(np.float64)


def random_step(config, total, q_heads, seed):
    k, v = (
        normal(total, config.num_kv_heads, config.head_dim, dtype=config.dtype, seed=seed + i) for i in (1, 2)
    )
    return k, v, normal(total, q_heads, config.head_dim, dtype=config.dtype, seed=seed)


def check_history(config, q_heads, counts, *, layer=None, sinks=None, **options):
    """Grows sequences 0, 1, .. by `counts[step][slot]` tokens, and holds every step's rows to float64."""
    total = max(map(sum, counts)) + 1
    run = compiled(layer, **options, **({} if sinks is None else {"sink_logits": sinks}))
    cache = poisoned_init(config)
    kept = [([], []) for _ in counts[0]]
    for number, row in enumerate(counts):
        k, v, q = random_step(config, total, q_heads, 10 * number)
        cache, out = run(cache, jnp.arange(len(row)), ints(*row), jnp.int32(layer or 0), k, v, q)
        assert out.dtype == config.dtype
        start, want = 0, np.zeros(out.shape)
        for count, (keys, values) in zip(row, kept, strict=True):
            rows = slice(start, start := start + count)
            keys.extend(float64(k[rows]))
            values.extend(float64(v[rows]))
            if count:
                arguments = float64(q[rows]), np.stack(keys), np.stack(values)
                sunk = None if sinks is None else float64(sinks)
                want[rows], _ = reference.attention(*arguments, sink_logits=sunk, **options)
        np.testing.assert_allclose(
            float64(out), want, rtol=TOLERANCE[config.dtype], atol=TOLERANCE[config.dtype]
        )


# Prompts of different lengths, decode for all, decode and a chunk together, nothing for one.
HISTORY = [(5, 16, 33), (1, 1, 1), (1, 20, 0), (1, 1, 1)]


def seldom(*values):
    """Combinations of what other cases hold one by one: in `make test-slow`."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for value in values
    ]


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ("MHA", "float16"),
        ("GQA", "float32"),
        ("MQA", "bfloat16"),
        *seldom(("MHA", "float32"), ("MHA", "bfloat16"), ("GQA", "float16"), ("GQA", "bfloat16")),
        *seldom(("MQA", "float32"), ("MQA", "float16")),
    ],
)
def test_heads_and_dtypes(heads, dtype):
    q_heads, kv_heads = HEADS[heads]
    config = CacheConfig(
        num_layers=1, num_kv_heads=kv_heads, head_dim=64, num_pages=9, max_seqs=3, dtype=dtype
    )
    check_history(config, q_heads, HISTORY)


@pytest.mark.parametrize("head_dim", [80, 256, *seldom(64, 96, 128)])
def test_head_dims(head_dim):
    config = CacheConfig(
        num_layers=1, num_kv_heads=2, head_dim=head_dim, num_pages=9, max_seqs=3, dtype="float32"
    )
    check_history(config, 4, HISTORY)


@pytest.mark.parametrize("page_size", [1, 5, 200, *seldom(16, 64)])
def test_page_sizes(page_size):
    config = CacheConfig(
        num_layers=1,
        num_kv_heads=2,
        head_dim=8,
        num_pages=3 + 90 // page_size,
        page_size=page_size,
        max_seqs=3,
        dtype="float32",
    )
    check_history(config, 4, HISTORY)


@pytest.mark.parametrize(
    ("options", "sinks"),
    [
        ("window", False),
        ("all", False),
        ("plain", True),
        ("sink tokens", True),
        *seldom(*((options, False) for options in ("plain", "scale", "sink tokens", "softcap"))),
        *seldom(*((options, True) for options in ("scale", "window", "softcap", "all"))),
    ],
)
def test_options(options, sinks):
    config = CacheConfig(
        num_layers=1, num_kv_heads=2, head_dim=16, num_pages=30, page_size=4, max_seqs=3, dtype="float32"
    )
    check_history(config, 4, HISTORY, sinks=normal(4) if sinks else None, **OPTIONS[options])


@pytest.mark.parametrize("layer", [2, *seldom(0)])
def test_layer_as_a_python_int(layer):
    config = CacheConfig(num_layers=3, num_kv_heads=2, head_dim=8, num_pages=9, max_seqs=3, dtype="float32")
    check_history(config, 4, HISTORY, layer=layer)


def test_a_prompt_in_chunks_gives_what_it_gives_whole():
    config = replace(SMALL, num_pages=16, max_pages_per_seq=16)
    k, v, q = random_step(config, 40, 4, 3)
    run = compiled()
    _, whole = run(poisoned_init(config), ints(0), ints(40), 0, k, v, q)
    cache, parts = poisoned_init(config), []
    k, v, q = (jnp.pad(x, [(0, 8), (0, 0), (0, 0)]) for x in (k, v, q))
    for start, count in ((0, 16), (16, 16), (32, 8)):
        rows = slice(start, start + 16)
        cache, out = run(cache, ints(0), ints(count), 0, k[rows], v[rows], q[rows])
        parts.append(out[:count])
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-6)


def test_lse_merges_two_halves_into_the_whole():
    """What a split or a cascade relies on: attention over parts, weighted by exp(lse), is attention."""
    config = replace(SMALL, num_layers=3, num_pages=16, max_pages_per_seq=16)
    k, v, q = random_step(config, 24, 4, 3)
    cache, batch = jitted.allocate(poisoned_init(config), ints(0), ints(24), total_tokens=24)
    cache = jitted.append(cache, 0, batch, k, v)
    ask = jax.jit(lambda cache, batch, q: jitted.attend(cache, 0, batch, q, return_lse=True))

    def of_the_last(batch):
        return replace(batch, query_starts=ints(0, 1), positions=batch.positions[:1])

    whole, lse = ask(cache, of_the_last(batch), q[-1:])
    parts = []
    for part in (slice(0, 8), slice(8, 24)):
        half, batch = jitted.allocate(
            poisoned_init(config), ints(0), ints(part.stop - part.start), total_tokens=24
        )
        half = jitted.append(half, 0, batch, jnp.roll(k, -part.start, 0), jnp.roll(v, -part.start, 0))
        parts.append(ask(half, of_the_last(batch), q[-1:]))
    weights = [np.exp(part_lse - lse)[..., None] for _, part_lse in parts]
    np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-5)
    merged = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
    np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, *seldom(PAGE_OF_ONE, ONE_SEQUENCE)], ids=["4", "1", "one"])
def test_rows_of_padding_and_of_refused_sequences_are_zero(config):
    twin = Twin(config)
    full = config.max_tokens_per_seq
    twin.extend([-1, 0, config.max_seqs, 0, 0], [2, 3, 1, 1, -4])
    twin.extend([-1, 0, -3], [1, full, 4])
    twin.extend([0], [full - 3])
    twin.extend([0], [1])


def test_query_rows_of_padding_may_hold_anything():
    cache, batch = jitted.allocate(poisoned_init(SMALL), ints(0, -1), ints(3, 2), total_tokens=8)
    k, v, q = random_step(SMALL, 8, 4, 0)
    cache = jitted.append(cache, 0, batch, k, v)
    out, lse = jitted.attend(cache, 0, batch, q.at[3:].set(jnp.nan), return_lse=True)
    assert np.isfinite(out).all()
    assert not np.asarray(out[3:]).any()
    assert np.all(np.asarray(lse[3:]) == -np.inf)


def test_k_and_v_rows_of_padding_may_hold_anything():
    cache, batch = jitted.allocate(poisoned_init(SMALL), ints(0, -1), ints(3, 2), total_tokens=8)
    k, v, q = random_step(SMALL, 8, 4, 0)
    clean = jitted.append(cache, 0, batch, k, v)
    dirty = jitted.append(cache, 0, batch, k.at[3:].set(jnp.nan), v.at[3:].set(jnp.nan))
    np.testing.assert_array_equal(clean.pool.k, dirty.pool.k)
    np.testing.assert_array_equal(jitted.attend(clean, 0, batch, q), jitted.attend(dirty, 0, batch, q))


def test_a_sequences_output_does_not_depend_on_its_neighbours():
    config = replace(SMALL, num_pages=16)
    k, v, q = random_step(config, 12, 4, 0)
    run = compiled()
    _, together = run(poisoned_init(config), ints(3, 1, 0), ints(4, 6, 2), 0, k, v, q)
    rows = slice(4, 10)
    _, alone = run(poisoned_init(config), ints(1), ints(6), 0, k[rows], v[rows], q[rows])
    np.testing.assert_allclose(together[rows], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_queries_wider_than_the_pool_keep_their_dtype(dtype):
    cache, _ = filled(replace(SMALL, dtype=dtype), (5,))
    cache, batch = jitted.allocate(cache, ints(0), ints(0))
    batch = replace(batch, query_starts=ints(0, 1))
    assert jitted.attend(cache, 0, batch, normal(1, 4, 4)).dtype == jnp.float32


def mistakes(cache, batch):
    attend = inspect.unwrap(jaxkv.attend)
    q = jnp.zeros((2, 4, 4))
    return {
        "head_dim=4": lambda: attend(cache, 0, batch, jnp.zeros((2, 4, 8))),
        "multiple of 2": lambda: attend(cache, 0, batch, jnp.zeros((2, 3, 4))),
        "q .*int32": lambda: attend(cache, 0, batch, q.astype(jnp.int32)),
        "q must be": lambda: attend(cache, 0, batch, q[0]),
        "layer=2": lambda: attend(cache, 2, batch, q),
        "window=0": lambda: attend(cache, 0, batch, q, window=0),
        "window=1.5": lambda: attend(cache, 0, batch, q, window=1.5),
        "sink_tokens=-1": lambda: attend(cache, 0, batch, q, window=4, sink_tokens=-1),
        "sink_tokens=1.5": lambda: attend(cache, 0, batch, q, window=4, sink_tokens=1.5),
        "sink_tokens=2 needs a window": lambda: attend(cache, 0, batch, q, sink_tokens=2),
        "softcap=-1": lambda: attend(cache, 0, batch, q, softcap=-1),
        "scale=1000000000.0 must lie": lambda: attend(cache, 0, batch, q, scale=1e9),
        "q_heads=4": lambda: attend(cache, 0, batch, q, sink_logits=jnp.zeros(2)),
        "backend='cuda'": lambda: attend(cache, 0, batch, q, backend="cuda"),
    }


@pytest.mark.parametrize("message", mistakes(None, None))
def test_a_wrong_shape_dtype_or_option_is_a_value_error_that_names_it(message, no_shape_checks):
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0, 1), ints(1, 1))
    with pytest.raises(ValueError, match=message):
        mistakes(cache, batch)[message]()


def test_a_backend_that_cannot_serve_is_refused_by_name():
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    with pytest.raises(NotImplementedError, match="mosaic"):
        jitted.attend(cache, 0, batch, jnp.zeros((1, 4, 4)), backend="mosaic")


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_attend(self):
        cache, batch = jitted.allocate(poisoned_init(SMALL), ints(1, 2), ints(5, 2), total_tokens=8)
        k, v, q = random_step(SMALL, 8, 4, 0)
        cache = jitted.append(cache, 1, batch, k, v)
        out = self.variant(jaxkv.attend)(cache, jnp.int32(1), batch, q)
        want = np.zeros(out.shape)
        for rows in (slice(0, 5), slice(5, 7)):
            want[rows], _ = reference.attention(*(float64(x[rows]) for x in (q, k, v)))
        chex.assert_trees_all_close(float64(out), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("page_size", "stored"),
    [
        (1, "int8"),
        (16, "float32"),
        (200, "int8"),
        *seldom((16, "uint8"), (1, "float32"), (1, "uint8"), (16, "int8"), (200, "float32"), (200, "uint8")),
    ],
)
def test_tiles_of_any_size_give_the_same(page_size, stored, monkeypatch):
    """Large heads are copied without a branch, and int8 in smaller tiles."""
    key_tiles = import_module("pallas_kernels.paged_attention.xla.key_tiles")
    shape, codes = (1, -(-600 // page_size), 2, page_size, 16), stored != "float32"
    pages = [normal(*shape, seed=seed) for seed in (0, 1)]
    scales = {}
    if codes:
        pages, (k_scales, v_scales) = zip(
            *(formats.of(stored).encode(array, keys=True) for array in pages), strict=True
        )
        scales = dict(k_scales=k_scales, v_scales=v_scales)
    width = -(-300 // page_size)
    table = jnp.arange(2 * width, dtype=jnp.int32).reshape(2, width) % shape[1]
    q, lengths, starts = normal(5, 4, 16, seed=2), ints(290, 131), ints(0, 1, 5)

    def attend():
        run = jax.jit(lambda q: paged_attention(q, *pages, table, lengths, starts, backend="xla", **scales))
        return float64(run(q))

    expected = attend()
    for split in (1, 2 * 16 * 128 * 4):
        monkeypatch.setattr(key_tiles, "_SPLIT_BYTES", split)
        np.testing.assert_allclose(attend(), expected, rtol=1e-5, atol=1e-5)


OF_A_POOL = list(itertools.product([1, 2], [1, 2, 16], [1, 16, 200]))
ONE_AXIS = [shape for shape in OF_A_POOL if sum(map(int.__ne__, shape, (2, 2, 16))) <= 1]


@pytest.mark.parametrize(
    ("num_layers", "kv_heads", "page_size"),
    [*ONE_AXIS, *seldom(*(shape for shape in OF_A_POOL if shape not in ONE_AXIS))],
)
def test_reading_takes_no_copy_of_the_pool(num_layers, kv_heads, page_size):
    num_pages = 2**17 // page_size
    pool = jax.ShapeDtypeStruct((num_layers, num_pages, kv_heads, page_size, 64), "float32")
    numbers = [(2, 8), (2,), (3,)]
    table, lengths, starts = (jax.ShapeDtypeStruct(shape, "int32") for shape in numbers)
    q = jax.ShapeDtypeStruct((2, 2 * kv_heads, 64), "float32")
    layer = jax.ShapeDtypeStruct((), "int32")
    attend = jax.jit(lambda layer, *arrays: paged_attention(*arrays, layer=layer, backend="xla"))
    memory = attend.lower(layer, q, pool, pool, table, lengths, starts).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pool.size * 4 / 16


@pytest.mark.parametrize("backend", ["xla", *seldom("triton")])
def test_forks_attend_once_to_what_they_share(backend, monkeypatch, traced_anew):
    """As attention to each on its own; the parent is gone, and padding lies between them."""
    config = replace(SMALL, head_dim=16, num_pages=24, page_size=16, max_seqs=5, max_pages_per_seq=12)
    cache, _ = filled(config, (150,))
    cache, _ = jitted.fork(cache, ints(0, 0, 0), ints(3, 1, 4))
    cache = jitted.free(cache, ints(0))
    cache = poison_free_pages(cache)
    seqs, counts = ints(4, -1, 1, 3), ints(3, 1, 1, 1)
    cache, batch = jitted.allocate(cache, seqs, counts, total_tokens=7)
    k, v, q = random_step(config, 7, 4, 0)
    cache = jitted.append(cache, 1, batch, k, v)
    with use_backend(backend, interpret=backend == "triton"):
        alone = jax.jit(lambda cache, batch, q: jaxkv.attend(cache, 1, batch, q))(cache, batch, q)
        monkeypatch.setattr(prefixes, "_LEAST_BYTES", 0)
        found = []
        monkeypatch.setattr(prefixes, "find", noting(found, prefixes.find))
        jax.clear_caches()
        shared = jax.jit(lambda cache, batch, q: jaxkv.attend(cache, 1, batch, q))(cache, batch, q)
    jax.effects_barrier()
    assert found
    assert all(lengths == [128, 0, 0, 0] for lengths in found)
    np.testing.assert_allclose(shared, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(shared[3], jnp.zeros_like(shared[3]))


def noting(found, find):
    def call(*arguments, **options):
        prefix = find(*arguments, **options)
        jax.debug.callback(lambda lengths: found.append(lengths.tolist()), prefix.lengths)
        return prefix

    return call


def test_the_smaller_window_holds_with_its_sink_tokens(monkeypatch, traced_anew):
    """Of what a policy wrote in the batch, and what the model asks for."""
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    q, held = jnp.zeros((1, 4, 4)), []

    def paged_attention(q, *_, window, sink_tokens, **others):
        held.append((window, sink_tokens))
        return q, q[..., 0]

    monkeypatch.setattr(sys.modules["jaxkv.attention"], "paged_attention", paged_attention)
    for batchs, models, both in [
        ((5, 2), (None, 0), (5, 2)),
        ((5, 2), (9, 4), (5, 4)),
        ((9, 8), (5, 0), (5, 0)),
        ((None, 3), (6, 1), (6, 1)),
        ((None, 3), (None, 0), (None, 0)),
        ((6, 0), (None, 2), (6, 2)),
    ]:
        limited = replace(batch, window=batchs[0], sink_tokens=batchs[1])
        jaxkv.attend(cache, 0, limited, q, window=models[0], sink_tokens=models[1])
        assert held.pop() == both


def test_a_batch_with_a_window_is_one_of_another_program():
    """Static, so that what lies outside of it is not visited at all."""
    cache, _ = filled(replace(SMALL, num_pages=12, max_pages_per_seq=8), (20,))
    cache, batch = jitted.allocate(cache, ints(0), ints(1))
    k, v, q = random_step(SMALL, 1, 4, 0)
    cache = jitted.append(cache, 0, batch, k, v)
    limited = replace(batch, window=5, sink_tokens=2)
    want = jitted.attend(cache, 0, batch, q, window=5, sink_tokens=2)
    np.testing.assert_array_equal(jitted.attend(cache, 0, limited, q), want)
    assert np.abs(jitted.attend(cache, 0, batch, q) - want).max() > 0.01


@pytest.mark.parametrize(
    ("options", "sinks"),
    [("plain", False), ("sink tokens", True), *seldom(("plain", True), ("sink tokens", False))],
)
def test_mass_is_what_each_token_slot_received(options, sinks):
    """By entry, whatever the slots; of padding and a refused entry it is zero."""
    cache, written = filled(replace(SMALL, num_pages=12, max_pages_per_seq=6), (9, 4))
    seqs, counts = ints(1, -1, 0, 3), ints(3, 2, 1, 30)
    cache, batch = jitted.allocate(cache, seqs, counts, total_tokens=8)
    k, v, q = random_step(SMALL, 8, 4, 0)
    cache = jitted.append(cache, 1, batch, k, v)
    options, logits = OPTIONS[options], normal(4) if sinks else None

    @jax.jit
    def ask(cache, batch, q):
        _, lse = jaxkv.attend(cache, 1, batch, q, sink_logits=logits, return_lse=True, **options)
        return jaxkv.attention_mass(cache, 1, batch, q, lse, **options)

    mass = ask(cache, batch, q)
    assert mass.shape == (4, 2, 24)
    want, before = np.zeros(mass.shape), written[1][0]
    for entry, rows, keys in ((0, slice(0, 3), before[9:]), (2, slice(5, 6), before[:9])):
        keys = np.concatenate([keys, k[rows]])
        weights, _ = reference.softmax(float64(q[rows]), float64(keys), sink_logits=logits, **options)
        want[entry, :, : len(keys)] = weights.reshape(len(weights), 2, 2, -1).sum(axis=(0, 2))
    np.testing.assert_allclose(mass, want, rtol=1e-5, atol=1e-6)


def test_a_batchs_window_holds_for_mass_too():
    cache, _ = filled(replace(SMALL, num_pages=12, max_pages_per_seq=8), (20,))
    cache, batch = jitted.allocate(cache, ints(0), ints(1))
    k, v, q = random_step(SMALL, 1, 4, 0)
    cache = jitted.append(cache, 0, batch, k, v)
    _, lse = jitted.attend(cache, 0, batch, q, window=5, sink_tokens=2, return_lse=True)
    want = jitted.attention_mass(cache, 0, batch, q, lse, window=5, sink_tokens=2)
    limited = replace(batch, window=5, sink_tokens=2)
    np.testing.assert_array_equal(jitted.attention_mass(cache, 0, limited, q, lse), want)


def test_mass_of_other_shapes_than_the_batchs_is_refused(no_shape_checks):
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    q, lse = jnp.zeros((1, 4, 4)), jnp.zeros((1, 4))
    for message, arguments in {
        "q has 2 tokens, the batch 1": (jnp.zeros((2, 4, 4)), lse),
        r"lse must be float32\[1, 4\], not float32\[1, 2\]": (q, lse[:, :2]),
        r"lse must be float32\[1, 4\], not int32": (q, lse.astype(int)),
    }.items():
        with pytest.raises(ValueError, match=message):
            jaxkv.attention_mass(cache, 0, batch, *arguments)


def test_a_backend_without_mass_is_a_value_error_that_names_both():
    cache, batch = jitted.allocate(jaxkv.init(SMALL), ints(0), ints(1))
    with pytest.raises(ValueError, match=r"'mosaic'.*attention_mass.*policies"):
        jitted.attention_mass(cache, 0, batch, jnp.zeros((1, 4, 4)), jnp.zeros((1, 4)), backend="mosaic")
