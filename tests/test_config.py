"""Static sizes, their checks, and the empty cache they describe."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig

SIZES = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 64, "num_pages": 128}


def test_defaults():
    config = CacheConfig(**SIZES)
    assert (config.page_size, config.max_seqs, config.max_pages_per_seq) == (16, 64, 128)
    assert (config.dtype, config.quantization, config.compaction_threshold) == ("bfloat16", None, 0.3)


def test_what_follows_from_the_sizes():
    config = CacheConfig(**SIZES, page_size=8, max_pages_per_seq=5)
    assert config.max_tokens_per_seq == 40
    assert config.pool_shape == (2, 128, 4, 8, 64)


def test_config_is_hashable_frozen_and_equal_by_value():
    config = CacheConfig(**SIZES)
    assert hash(config) == hash(CacheConfig(**SIZES))
    assert config == CacheConfig(**SIZES)
    assert config != CacheConfig(**SIZES, page_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.page_size = 8


def test_a_dtype_may_be_given_as_jax_gives_it():
    assert CacheConfig(**SIZES, dtype=jnp.float16) == CacheConfig(**SIZES, dtype="float16")


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True], ids=repr)
@pytest.mark.parametrize(
    "field",
    ["num_layers", "num_kv_heads", "head_dim", "num_pages", "page_size", "max_seqs", "max_pages_per_seq"],
)
def test_a_size_that_is_no_positive_integer_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r}.*positive"):
        CacheConfig(**{**SIZES, field: value})


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("dtype", "int8", "float32, bfloat16, float16"),
        ("dtype", "flaot32", "float32, bfloat16, float16"),
        ("quantization", "int3", "None, 'int8', 'fp8', 'int4'"),
        ("compaction_threshold", -0.1, "0 to 1"),
        ("compaction_threshold", 1.5, "0 to 1"),
        ("compaction_threshold", float("nan"), "0 to 1"),
        ("max_pages_per_seq", 129, "128"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field}={value!r}.*{allowed}"):
        CacheConfig(**SIZES, **{field: value})


def test_places_that_int32_cannot_count_are_refused():
    with pytest.raises(ValueError, match="page_size"):
        CacheConfig(**{**SIZES, "num_pages": 2**16}, page_size=2**16)


def test_a_contiguous_cache_is_one_page_a_sequence():
    config = CacheConfig.contiguous(
        num_layers=2, num_kv_heads=4, head_dim=64, max_seqs=8, max_tokens=100, dtype="float32"
    )
    assert config.pool_shape == (2, 8, 4, 100, 64)
    assert (config.max_seqs, config.max_tokens_per_seq, config.max_pages_per_seq) == (8, 100, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_empty_cache_is_zero_and_all_free(dtype):
    config = CacheConfig(**SIZES, dtype=dtype)
    cache = jaxkv.init(config)
    for pool in (cache.pool.k, cache.pool.v):
        assert pool.shape == config.pool_shape
        assert pool.dtype == config.storage_dtype
        assert not np.asarray(pool).any()
    k, v, _ = jaxkv.gather(cache, 0, jnp.array([0]))
    assert k.dtype == v.dtype == dtype
    assert cache.pool.k_scale is None
    assert cache.table.num_free == 128
    assert cache.table.free_pages[::-1].tolist() == list(range(128))
    assert not cache.table.lengths.any()
    assert not cache.table.positions.any()
    assert not cache.table.refcounts.any()
    assert np.all(cache.table.pages == 128)
    assert not cache.stats.counters.any()
    jaxkv.check_invariants(cache)


def test_a_cache_can_be_made_inside_jit_and_donated():
    cache = jax.jit(lambda: jaxkv.init(CacheConfig(**SIZES)))()
    same = jax.jit(lambda cache: cache, donate_argnums=0)(cache)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
    again = jax.jit(lambda cache: cache, donate_argnums=0)(jaxkv.init(same.config))
    jaxkv.check_invariants(again)


def test_a_cache_goes_through_tree_maps_and_keeps_its_config():
    cache = jaxkv.init(CacheConfig(**SIZES))
    shapes = jax.eval_shape(lambda cache: cache, cache)
    assert shapes.config == cache.config
    assert jax.tree.structure(cache) == jax.tree.structure(shapes)
    assert jax.tree.map(lambda leaf: None, cache).config == cache.config
    assert not any(isinstance(leaf, CacheConfig) for leaf in jax.tree.leaves(cache))


def test_init_takes_nothing_but_a_config():
    with pytest.raises((ValueError, TypeError), match="CacheConfig"):
        jaxkv.init({"num_layers": 2})


def test_status_values_are_fixed():
    assert {status.name: int(status) for status in jaxkv.Status} == {
        "OK": 0,
        "OUT_OF_PAGES": 1,
        "SEQUENCE_TOO_LONG": 2,
        "INVALID_SEQ": 3,
        "OCCUPIED": 4,
        "PADDING": 5,
        "INVALID_LENGTH": 6,
        "ROLLBACK_TOO_LONG": 7,
        "TABLE_FULL": 8,
    }


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_four_bits_take_at_most_three_tenths_of_bfloat16(head_dim):
    sizes = dict(num_layers=2, num_kv_heads=3, head_dim=head_dim, num_pages=4)
    config = CacheConfig(**sizes, quantization="int4")
    pool = jaxkv.init(config).pool
    assert sum(array.nbytes for array in (pool.k, pool.v, pool.k_scale, pool.v_scale)) == config.pool_bytes
    assert config.pool_bytes <= 0.30 * CacheConfig(**sizes, dtype="bfloat16").pool_bytes


@pytest.mark.parametrize("head_dim", [4, 20, 520])
def test_four_bits_come_by_eights(head_dim):
    sizes = dict(num_layers=2, num_kv_heads=1, num_pages=1, quantization="int4")
    with pytest.raises(ValueError, match=f"head_dim={head_dim} must be a multiple of 8, at most 512"):
        CacheConfig(**sizes, head_dim=head_dim)
    with pytest.raises(ValueError, match=rf"layer_head_dims\[1\]={head_dim} must be a multiple of 8"):
        CacheConfig(**sizes, layer_head_dims=(8, head_dim))


# Layers of several kinds -------------------------------------------------------------------------


def every(period, layers, full, windowed):
    """`full` for each last layer of `period`, `windowed` for the others."""
    return tuple(full if layer % period == period - 1 else windowed for layer in range(layers))


LONG = dict(num_pages=4096, page_size=16, max_seqs=2)
MODELS = {
    "Gemma-3-1B": dict(
        LONG, num_layers=26, num_kv_heads=1, head_dim=256, layer_windows=every(6, 26, None, 512)
    ),
    "gpt-oss-20b": dict(
        LONG, num_layers=24, num_kv_heads=8, head_dim=64, layer_windows=every(2, 24, None, 128)
    ),
    "Gemma-4-26B": dict(
        LONG,
        page_size=32,
        num_layers=30,
        layer_windows=every(6, 30, None, 1024),
        layer_kv_heads=every(6, 30, 2, 8),
        layer_head_dims=every(6, 30, 512, 256),
    ),
}
# Two layers of 2 heads of 32 beside one of 4 heads of 24: three of its tokens fill two pages of theirs.
UNEVEN = dict(num_layers=3, layer_kv_heads=(2, 2, 4), layer_head_dims=(32, 32, 24), num_pages=8, max_seqs=2)
FORMATS = ["float32", "bfloat16", "float16", "int8", "fp8", "int4"]


def stored_as(name):
    return {"quantization": name} if name in ("int8", "fp8", "int4") else {"dtype": name}


@pytest.mark.parametrize(
    ("field", "values", "said"),
    [
        ("layer_windows", (8,), "an entry for each of num_layers=2"),
        ("layer_windows", (8, 8, None), "an entry for each of num_layers=2"),
        ("layer_windows", "88", "an entry for each of num_layers=2"),
        ("layer_windows", 8, "an entry for each of num_layers=2"),
        ("layer_windows", (0, None), r"layer_windows\[0\]=0 must be a positive integer, or None"),
        ("layer_windows", (8, -1), r"layer_windows\[1\]=-1 must be a positive integer"),
        ("layer_windows", (8, True), r"layer_windows\[1\]=True must be a positive integer"),
        ("layer_windows", (8, "8"), r"layer_windows\[1\]='8' must be a positive integer"),
        ("layer_windows", (8, 8.0), r"layer_windows\[1\]=8.0 must be a positive integer"),
        ("layer_kv_heads", (4, None), r"layer_kv_heads\[1\]=None must be a positive integer"),
        ("layer_kv_heads", (4, 0), r"layer_kv_heads\[1\]=0 must be a positive integer"),
        ("layer_head_dims", (64,), "an entry for each of num_layers=2"),
        ("layer_head_dims", (64, "64"), r"layer_head_dims\[1\]='64' must be a positive integer"),
        ("group_layers", 0, "group_layers=0 must be a positive integer"),
        ("group_layers", 3, "group_layers=3 must not exceed num_layers=2"),
        ("rollback", -1, "rollback=-1 must be a whole number of 0 or more"),
        ("rollback", True, "rollback=True must be a whole number"),
        ("max_chunk", 0, "max_chunk=0 must be a positive integer"),
    ],
    ids=repr,
)
def test_what_is_said_of_a_layer_and_not_allowed_is_named(field, values, said):
    with pytest.raises(ValueError, match=said):
        CacheConfig(**SIZES, **{field: values})


def test_heads_may_be_given_for_each_layer_alone():
    config = CacheConfig(num_layers=2, layer_kv_heads=(4, 4), layer_head_dims=(64, 64), num_pages=128)
    assert config == CacheConfig(**SIZES)
    assert config.uniform
    config = CacheConfig(
        num_layers=2, layer_windows=(8, None), layer_kv_heads=(4, 2), head_dim=64, num_pages=128
    )
    assert (config.num_kv_heads, config.head_dim) == (2, 64)  # of the layer with full attention
    assert not config.uniform


@pytest.mark.parametrize("missing", ["num_kv_heads", "head_dim"])
def test_without_any_heads_the_missing_field_is_named(missing):
    sizes = {name: value for name, value in SIZES.items() if name != missing}
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        CacheConfig(**sizes)


@pytest.mark.parametrize(
    "layers",
    [
        UNEVEN,
        # What fits the second kind does not fit the third.
        dict(num_layers=3, layer_kv_heads=(1, 2, 3), layer_head_dims=(16, 24, 40), num_pages=8),
    ],
    ids=["two kinds", "three kinds"],
)
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_page_size_that_does_not_fit_names_one_that_does(layers, quantization):
    with pytest.raises(ValueError, match=r"page_size=16: .*take a multiple of \d+") as refused:
        CacheConfig(**layers, page_size=16, quantization=quantization)
    step = int(re.findall(r"multiple of (\d+)", str(refused.value))[0])
    for page_size in range(1, 2 * step + 1):
        if page_size % step == 0:
            config = CacheConfig(**layers, page_size=page_size, quantization=quantization)
            elements = {group.page_size * group.num_kv_heads * group.head_dim for group in config.groups}
            assert len(elements) == 1
        else:
            with pytest.raises(ValueError, match="page would hold"):
                CacheConfig(**layers, page_size=page_size, quantization=quantization)


@pytest.mark.parametrize(
    ("name", "layers_a_group", "groups"),
    [("Gemma-3-1B", 4, 7), ("gpt-oss-20b", 12, 2), ("Gemma-4-26B", 5, 6)],
)
def test_groups_of_models_with_windows(name, layers_a_group, groups):
    config = CacheConfig(**MODELS[name])
    assert config.pool_shape[0] == layers_a_group
    assert len(config.groups) == groups
    assert sorted(layer for group in config.groups for layer in group.layers) == list(
        range(config.num_layers)
    )
    windows = [group.window for group in config.groups]
    assert windows == sorted(windows, key=lambda window: window is not None)  # full attention first
    for layer, (group, nth) in enumerate(config.homes):
        assert config.groups[group].layers[nth] == layer


def test_pages_of_a_kind_hold_as_many_elements_as_those_of_any_other():
    config = CacheConfig(**MODELS["Gemma-4-26B"])
    sizes = {(group.num_kv_heads, group.head_dim): group.page_size for group in config.groups}
    assert sizes == {(2, 512): 32, (8, 256): 16}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_pages_per_seq", [1, 40, 4096])
def test_groups_take_the_fewest_bytes_then_the_fewest_groups_of_at_most_eight(name, max_pages_per_seq):
    sizes = MODELS[name] | {"max_pages_per_seq": max_pages_per_seq}
    config = CacheConfig(**sizes)

    def cost(config):
        return config.pages_for_seq(config.max_tokens_per_seq) * config.page_bytes, len(config.groups)

    others = [CacheConfig(**sizes, group_layers=size) for size in range(1, config.num_layers + 1)]
    assert len(config.groups) <= 8
    assert cost(config) == min(cost(other) for other in others if len(other.groups) <= 8)


def test_more_kinds_than_eight_have_a_group_each():
    windows = (*range(1, 11), None)
    config = CacheConfig(num_layers=11, num_kv_heads=1, head_dim=8, num_pages=64, layer_windows=windows)
    assert [group.layers for group in config.groups] == [(10,), *((layer,) for layer in range(10))]


def test_without_windows_all_layers_are_one_group():
    (group,) = CacheConfig(**SIZES).groups
    assert group.layers == (0, 1)
    assert (group.window, group.page_size, group.columns) == (None, 16, 128)


def test_a_row_with_a_window_holds_the_window_a_chunk_and_what_may_be_taken_back():
    sizes = dict(SIZES, page_size=8, layer_windows=(20, None))
    columns = [
        CacheConfig(**sizes, max_chunk=chunk, rollback=back).groups[1].columns
        for chunk, back in ((1, 0), (1, 5), (6, 0), (512, 0))
    ]
    # From the worst place in a page: 7 tokens of it are of no use.
    assert columns == [4, 4, 4, 68]
    assert CacheConfig(**sizes).groups[0].columns == 128


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize(
    "layers",
    [
        dict(num_layers=4, num_kv_heads=2, head_dim=32, num_pages=8, layer_windows=(8, 8, 8, None)),
        UNEVEN | {"page_size": 6},
        MODELS["Gemma-4-26B"] | {"num_pages": 8},
        MODELS["Gemma-4-26B"] | {"num_pages": 8, "group_layers": 3},
    ],
    ids=["one shape", "uneven shapes", "two shapes", "padded groups"],
)
def test_the_estimated_memory_is_that_of_inits_arrays(layers, stored):
    config = CacheConfig(**layers, **stored_as(stored))
    arrays = jax.tree.leaves(jax.eval_shape(lambda: jaxkv.init(config)))
    assert config.estimated_memory_bytes() == sum(array.size * array.dtype.itemsize for array in arrays)


@pytest.mark.parametrize("stored", ["int8", "fp8", "int4"])
def test_scales_of_a_page_are_enough_for_each_kind_and_a_whole_number_of_slots_in_each(stored):
    config = CacheConfig(**UNEVEN, page_size=6, quantization=stored)
    pool = jax.eval_shape(lambda: jaxkv.init(config)).pool
    for group in config.groups:
        row = config.storage.row_size(group.head_dim)
        shapes = config.storage.scale_shapes((group.num_kv_heads, group.page_size, row))
        for (heads, slots, *words), scale in zip(shapes, (pool.k_scale, pool.v_scale), strict=True):
            there, rest = divmod(scale.shape[2], heads * int(np.prod(words)))
            assert there >= slots
            assert rest == 0


def test_equal_configs_are_equal_however_they_are_spelled():
    sizes = dict(num_layers=3, num_kv_heads=2, head_dim=32, num_pages=8)
    plain = CacheConfig(**sizes)
    spellings = [
        dict(layer_windows=(None, None, None)),
        dict(layer_windows=[None] * 3),
        dict(layer_kv_heads=[2, 2, 2], layer_head_dims=np.array([32, 32, 32])),
    ]
    windowed = CacheConfig(**sizes, layer_windows=(4, 4, 8))
    groups = [
        (plain, [CacheConfig(**sizes, **spelling) for spelling in spellings]),
        (
            windowed,
            [
                CacheConfig(**sizes, layer_windows=values)
                for values in ([4, 4, 8], np.array([4, 4, 8]), [np.int64(4), 4, np.int32(8)])
            ],
        ),
    ]
    for one, others in groups:
        for other in others:
            assert other == one
            assert hash(other) == hash(one)
            assert repr(other) == repr(one)
    assert plain != windowed


@pytest.mark.parametrize("name", MODELS)
def test_replace_keeps_what_is_said_of_the_layers(name):
    config = CacheConfig(**MODELS[name])
    assert dataclasses.replace(config) == config
    other = dataclasses.replace(config, num_pages=9, max_pages_per_seq=9, quantization="int8")
    assert other.homes and [group.shape for group in other.groups]
    assert other == CacheConfig(**MODELS[name] | {"num_pages": 9, "quantization": "int8"})
