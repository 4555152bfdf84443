"""Layers of several kinds: windows release their pages, and kinds of different shape share one pool."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import CacheConfig, Status, policies
from jaxkv.models import ModelConfig, random_model
from jaxkv.testing import assert_in_place
from tests import jitted
from tests.caches import ints, normal, poisoned_init
from tests.policy_twin import PolicyTwin
from tests.test_state_machine import GROUPED
from tests.twin import Twin

OK, INVALID_LENGTH = Status.OK, Status.INVALID_LENGTH
OUT_OF_PAGES, ROLLBACK_TOO_LONG = Status.OUT_OF_PAGES, Status.ROLLBACK_TOO_LONG
# Windows 5, pages of 4, chunks of 9; one config for all, so that one set of programs serves them.
ONE_FULL = GROUPED["one full layer among windows"]
ONE_FULL = ONE_FULL | {"config": replace(ONE_FULL["config"], num_pages=21)}
ROLLBACK = GROUPED["windows below and of a page, rollback"]  # windows 2 and 4, pages of 4, rollback 4
SHAPES = GROUPED["kinds of three shapes, int8"]


def rows(twin, slot):
    """Pages of each group's row."""
    return [len(row.pages) for row in twin.oracle.sequences[slot].rows]


def with_nine_pages_left():
    """A twin of which other sequences hold the rest of the pool."""
    twin = Twin(**ONE_FULL)
    twin.extend([1], [9])
    twin.extend([2], [3])
    assert twin.oracle.num_free == 9
    return twin


# releasing --------------------------------------------------------------------------------------


def test_a_window_keeps_no_more_than_its_pages_however_long_the_text():
    twin = Twin(**ONE_FULL)
    twin.extend([0], [9])
    for _ in range(15):
        assert twin.extend([0], [1]) == [OK]
        assert rows(twin, 0)[1:] <= [3, 3]
    assert rows(twin, 0) == [6, 2, 2]


def test_a_chunk_longer_than_the_window_sees_the_window_of_its_first_token():
    twin = Twin(**ONE_FULL)
    twin.extend([0], [7])
    assert twin.extend([0], [9]) == [OK]


def test_a_chunk_longer_than_max_chunk_is_refused():
    twin = Twin(**ONE_FULL)
    assert twin.extend([0, 1], [10, 2]) == [INVALID_LENGTH, OK]


def test_what_is_released_counts_as_free_in_the_same_call_and_stands_for_a_refused_entry():
    twin = with_nine_pages_left()
    twin.extend([0], [9])  # three pages in each group
    assert twin.oracle.num_free == 0
    # The pages before the window of position 9 are released: one in each windowed group.
    assert twin.extend([0], [9]) == [OUT_OF_PAGES]
    assert rows(twin, 0) == [3, 2, 2]
    assert twin.extend([0], [4]) == [OUT_OF_PAGES], "three more pages, two free"
    assert twin.extend([0], [3]) == [OK]


def test_a_full_group_may_need_a_page_when_windowed_ones_give_theirs_back():
    twin = with_nine_pages_left()
    twin.extend([0], [9])
    twin.extend([0], [3])
    assert twin.extend([0], [1]) == [OK]


# sharing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 14], ids=["inside the window", "beyond it"])
def test_a_fork_shares_every_group_and_the_first_write_copies_in_each(length):
    twin = Twin(**ONE_FULL)
    for start in range(0, length, 9):
        twin.extend([0], [min(9, length - start)])
    twin.fork([0], [1])
    copies = twin.oracle.stats["copy_on_write_copies"]
    assert twin.extend([0, 1], [1, 1]) == [OK, OK]
    assert twin.oracle.stats["copy_on_write_copies"] == copies + 6, "both, in each group"
    twin.extend([0, 1], [6, 3])
    twin.reorder([0, 1], [1, 0])
    twin.compact()
    twin.free([0])
    twin.extend([1], [5])


# taking tokens back -----------------------------------------------------------------------------


def test_the_tokens_of_the_last_call_can_always_be_taken_back_and_a_page_more_where_rollback_says_so():
    twin = Twin(**ROLLBACK)
    twin.extend([0], [8])
    for count in (5, 1, 3):
        twin.extend([0], [count])
        position = twin.oracle.sequences[0].position
        assert twin.truncate([0], [position - count]) == [OK]
        twin.extend([0], [count])
        assert twin.truncate([0], [position - count - 4]) == [OK]
        twin.extend([0], [4])
        twin.extend([0], [count])


def test_a_cut_beyond_what_is_kept_changes_nothing():
    twin = Twin(**ONE_FULL)
    twin.extend([0], [9])
    twin.extend([0], [8])
    before = jax.device_get(twin.cache.table)
    # Tokens from position 4 on are kept: the token at 8 attends to 4 and later ones, that at 7 to 3.
    assert twin.truncate([0, 0], [7, 12]) == [ROLLBACK_TOO_LONG] * 2
    after = jax.device_get(twin.cache.table)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert twin.truncate([0], [8]) == [OK]
    assert twin.truncate([0], [0]) == [OK]
    assert twin.extend([0], [9]) == [OK]


def test_truncate_says_what_it_refused():
    cache, _ = jitted.allocate(jaxkv.init(ONE_FULL["config"]), ints(0), ints(9), total_tokens=9)
    _, status = jitted.truncate(cache, ints(0, -1, 99, 0), ints(-1, 3, 3, 20))
    assert status.tolist() == [INVALID_LENGTH, Status.PADDING, Status.INVALID_SEQ, OK]
    with pytest.raises(jaxkv.RollbackTooLongError, match="released or rewritten"):
        jaxkv.raise_for_status(ints(ROLLBACK_TOO_LONG))


# layers and windows -----------------------------------------------------------------------------


def step(config, count=2):
    cache, batch = jitted.allocate(poisoned_init(config), ints(0), ints(count), total_tokens=count)
    return cache, batch


def attend_traced(config, **options):
    """Of a traced layer, after `append` to every layer."""
    cache, batch = step(config)
    kinds = [config.groups[home.group] for home in config.homes]
    for layer, kind in enumerate(kinds):
        k = normal(2, kind.num_kv_heads, kind.head_dim, seed=layer)
        cache = jitted.append(cache, layer, batch, k, k)
    return jax.jit(lambda layer, q: jaxkv.attend(cache, layer, batch, q, **options))


def test_a_traced_layer_needs_a_window_that_says_of_which_kind_it_is():
    q = normal(2, 2, 4)
    with pytest.raises(ValueError, match="window must say which one is meant: None, 5"):
        attend_traced(ONE_FULL["config"])(ints(0)[0], q)
    windowed = attend_traced(ONE_FULL["config"], window=5)
    assert np.isfinite(windowed(ints(2)[0], q)).all()
    assert np.isnan(windowed(ints(1)[0], q)).all(), "layer 1 has full attention"
    assert np.isnan(windowed(ints(3)[0], q)).all(), "there is no layer 3"
    full = attend_traced(ONE_FULL["config"], window=None)
    assert np.isnan(full(ints(0)[0], q)).all() and np.isfinite(full(ints(1)[0], q)).all()


def test_a_traced_layer_of_another_shape_is_not_written():
    config = replace(SHAPES["config"], quantization=None)
    cache, batch = step(config)
    k = normal(2, 4, 4)  # of layer 2
    write = jax.jit(lambda layer: jaxkv.append(cache, layer, batch, k, k))
    assert np.isnan(np.asarray(write(ints(0)[0]).pool.k)).all()
    assert np.isfinite(np.asarray(write(ints(2)[0]).pool.k)).any()
    with pytest.raises(ValueError, match=r"k fits no layer .* one of \[1, 16\], \[2, 8\], \[4, 4\]"):
        jax.jit(lambda layer: jaxkv.append(cache, layer, batch, normal(2, 3, 4), normal(2, 3, 4)))(ints(2)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6}, "window=6 is wider than the layer's own, 5"),
        ({"window": None}, "window=None is wider"),
        ({"sink_tokens": 1}, "releases its first tokens"),
        ({"window": "all"}, "must be an integer, None or 'layer'"),
    ],
    ids=str,
)
def test_a_window_may_be_narrower_than_the_layers_but_no_wider(no_shape_checks, options, message):
    cache, batch = step(ONE_FULL["config"])
    with pytest.raises(ValueError, match=message):
        jaxkv.attend(cache, 0, batch, normal(2, 2, 4), **options)


def test_a_layer_of_its_own_attends_with_anothers_keys():
    """As Gemma 3n does: it attends with the other layer's number and never appends."""
    cache, batch = step(ONE_FULL["config"])
    k = normal(2, 2, 4)
    append = jax.jit(lambda cache: jaxkv.append(cache, 2, batch, k, k))
    attend = jax.jit(lambda cache: jaxkv.attend(cache, 2, batch, normal(2, 2, 4)))
    assert np.isfinite(attend(append(cache))).all()


def test_gather_of_a_windowed_layer_is_by_position():
    twin = Twin(**ONE_FULL)
    for count in (9, 9):
        twin.extend([1], [count])
    twin.extend([1], [1])
    k, _, lengths = jitted.gather(twin.cache, 0, ints(1, 0))
    assert lengths.tolist() == [19, 0]
    kept = np.flatnonzero(np.asarray(k[0]).any(axis=(1, 2))).tolist()
    assert kept == list(range(12, 19)), "whole pages from position 14 on"
    assert jaxkv.lengths(twin.cache).tolist()[:2] == [0, 19]


def test_mass_of_a_windowed_layer_is_by_position():
    cache, batch = step(ONE_FULL["config"], 9)
    k, q = normal(9, 2, 4), normal(9, 2, 4, seed=1)

    @jax.jit
    def fill_and_ask(cache, batch):
        for layer in range(3):
            cache = jaxkv.append(cache, layer, batch, k, k)
        _, lse = jaxkv.attend(cache, 0, batch, q, return_lse=True)
        return cache, jaxkv.attention_mass(cache, 0, batch, q, lse)[0]

    for _ in range(2):
        cache, mass = jax.device_get(fill_and_ask(cache, batch))
        cache = jax.tree.map(jnp.asarray, cache)
        first = int(cache.table.positions[0]) - 9
        assert np.flatnonzero(mass[0]).tolist() == list(range(max(0, first - 4), first + 9))
        np.testing.assert_allclose(mass.sum(), 18, rtol=1e-5)
        cache, batch = jitted.allocate(cache, ints(0), ints(9), total_tokens=9)


@pytest.mark.parametrize("layer", [0, 1], ids=["windowed", "full"])
def test_mass_of_a_stale_batch_is_nan(layer):
    cache, batch = step(ONE_FULL["config"])
    cache = jitted.free(cache, ints(0))
    ask = jax.jit(lambda cache: jaxkv.attention_mass(cache, layer, batch, normal(2, 2, 4), jnp.zeros((2, 2))))
    mass = ask(cache)
    assert np.isnan(mass[0]).all()


def test_a_traced_layer_of_one_window_and_several_head_counts_is_refused():
    config = CacheConfig(num_layers=2, num_pages=4, page_size=4, layer_kv_heads=(1, 2), head_dim=8)
    cache, batch = step(config)
    with pytest.raises(ValueError, match="window=None differ in their KV heads; give layer as a Python int"):
        jax.eval_shape(
            lambda layer: jaxkv.attend(cache, layer, batch, jnp.ones((2, 2, 8)), window=None), ints(0)[0]
        )


# policies ---------------------------------------------------------------------------------------

WITH_POLICY = replace(
    ONE_FULL["config"], num_layers=3, layer_windows=(5, None, None), num_pages=40, group_layers=1
)


@pytest.mark.parametrize(
    "policy",
    [policies.HeavyHitter(6, 2), pytest.param(policies.SlidingWindow(4, 1), marks=pytest.mark.slow)],
    ids=repr,
)
def test_a_policy_evicts_from_full_groups_and_windows_release_by_position(policy):
    twin = PolicyTwin(policy, config=WITH_POLICY, q_heads=2, total_tokens=12)
    twin.extend([0, 1], [7, 3])
    twin.fork([0], [2])
    for _ in range(9):
        assert twin.extend([0, 1, 2], [1, 1, 2]) == [OK] * 3
    position = twin.oracle.sequences[0].position
    assert twin.truncate([0], [position - 1]) == [OK]
    assert twin.truncate([0], [2]) == [ROLLBACK_TOO_LONG]
    twin.evict([0, 1, 2])
    twin.compact()


def test_where_kinds_differ_no_key_is_rotated_to_another_position():
    rope = jaxkv.Rope.of(4, 10000.0)
    config = ONE_FULL["config"]
    with pytest.raises(ValueError, match="positions='cache' needs layers of one kind"):
        jaxkv.init(config, policies.SlidingWindow(4, 1, positions="cache", rope=rope))
    with pytest.raises(ValueError, match="shift_positions needs layers of one kind"):
        jaxkv.shift_positions(jaxkv.init(config), ints(0), ints(1), rope=rope)


def test_a_policy_needs_layers_with_full_attention():
    with pytest.raises(ValueError, match="the cache has none"):
        jaxkv.init(GROUPED["windows only"]["config"], policies.SlidingWindow(4, 1))


def test_a_policy_that_observes_more_than_a_chunk_at_once_is_refused():
    with pytest.raises(ValueError, match=r"observes the last 10 tokens .* takes at most max_chunk=9 a step"):
        jaxkv.init(WITH_POLICY, policies.PromptCompress(12, observe_last=10))
    jaxkv.init(WITH_POLICY, policies.PromptCompress(12, observe_last=9))


def test_evict_releases_what_windows_hide_without_a_policy():
    cache, _ = jitted.allocate(jaxkv.init(ONE_FULL["config"]), ints(0), ints(9), total_tokens=9)
    after, dropped = jax.jit(jaxkv.evict)(cache, ints(0, 0, -1))
    assert dropped.tolist() == [0, 0, 0]
    assert int(after.table.num_free) - int(cache.table.num_free) == 2
    jaxkv.check_invariants(after)


# sizes ------------------------------------------------------------------------------------------


def gemma(pattern, layers, **options):
    windows = (([pattern[0]] * pattern[1] + [None]) * layers)[:layers]
    return CacheConfig(num_layers=layers, layer_windows=windows, **options)


def test_a_cache_with_windows_takes_little_more_than_what_can_be_read():
    config = gemma((512, 5), 26, num_kv_heads=1, head_dim=256, num_pages=710, max_pages_per_seq=512)
    assert len(config.groups) == 7
    mebibytes = config.pages_for_seq(8192) * config.page_bytes / 2**20
    assert 43.0 < mebibytes < 44.5
    assert config.max_context_length() == 8192


@pytest.mark.parametrize(
    "sizes", [{"layer_windows": (2**31, None)}, {"layer_windows": (4, None), "rollback": 2**30}], ids=str
)
def test_windows_are_counted_in_int32(sizes):
    with pytest.raises(ValueError, match=r"a window of \d+ in layer_windows, rollback=.*must be below"):
        CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=8, **sizes)


def test_the_groups_table_is_todays_where_every_layer_is_full():
    config = CacheConfig(num_layers=5, num_kv_heads=2, head_dim=8, num_pages=6, layer_windows=(None,) * 5)
    assert config == replace(config, layer_windows=None)
    assert config.pool_shape == (5, 6, 2, 16, 8)
    assert jax.tree.map(jnp.shape, jaxkv.init(config).table).pages == (64, 6)


@pytest.mark.parametrize(
    ("window", "lengths", "new", "options"),
    [
        pytest.param(6, (40, 41, 33, 47), 1, {}, marks=pytest.mark.slow),
        (6, (40, 41, 33, 47, 39, 40), 1, {"prefill_chunk": 32}),
        pytest.param(
            64,
            (100,),
            20,
            {"prefill_chunk": 16, "policy": policies.HeavyHitter(8, 4)},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["in one step", "in short steps", "a policy keeps less than the window"],
)
def test_a_pool_made_for_prompts_holds_them(window, lengths, new, options):
    """While they are prefilled together, and where a policy keeps less than what windows show."""
    sizes = dict(vocab_size=20, hidden_size=8, num_layers=2, num_q_heads=1, num_kv_heads=1, head_dim=8)
    model = random_model(
        ModelConfig(**sizes, intermediate_size=8, max_context=256, window=window, full_attention_layers=(1,)),
        jax.random.key(0),
    )
    prompts = [[prompt] * length for prompt, length in enumerate(lengths)]
    result = jaxkv.generate(model, prompts, max_new_tokens=new, **options)
    assert result.finish == [[jaxkv.Finish.LENGTH]] * len(lengths)


def test_prompts_that_chunks_of_a_window_make_no_room_for_are_refused_before_anything_is_computed():
    """Counted step by step on the host: as many pages as it names are enough, and all of them are used."""
    sizes = dict(vocab_size=20, hidden_size=8, num_layers=3, num_q_heads=1, num_kv_heads=1, head_dim=8)
    model = random_model(
        ModelConfig(**sizes, intermediate_size=8, max_context=256, window=6, full_attention_layers=(0, 2)),
        jax.random.key(0),
    )
    prompts = [[5] * 17 + [number] * (9 + 7 * number) for number in range(3)]
    options = dict(page_size=4, max_seqs=3, max_pages_per_seq=16, max_chunk=16, rollback=4)

    def run(num_pages):
        config = model.cache_config(num_pages=num_pages, **options)
        return jaxkv.generate(model, prompts, config, max_new_tokens=0, keep=True, prefill_chunk=8)

    with pytest.raises(jaxkv.OutOfPagesError, match=r"the prompts need \d+ pages") as refused:
        run(16)
    needed = int(re.search(r"need (\d+)", str(refused.value))[1])
    assert run(needed).peak_pages == needed
    with pytest.raises(jaxkv.OutOfPagesError, match=f"need {needed} pages"):
        run(needed - 1)


def test_text_from_released_pages_is_that_of_a_full_cache_with_masked_windows():
    sizes = dict(vocab_size=50, hidden_size=32, num_layers=3, num_q_heads=4, num_kv_heads=2, head_dim=8)
    model = random_model(
        ModelConfig(**sizes, intermediate_size=32, max_context=256, window=6, full_attention_layers=(1,)),
        jax.random.key(0),
    )
    prompts = [list(range(1, 40)), list(range(3, 12))]
    options = dict(page_size=4, max_seqs=4, num_pages=120, max_pages_per_seq=24, dtype="float32")
    texts = [
        jaxkv.generate(model, prompts, model.cache_config(**options, **of), max_new_tokens=40, num_samples=2)
        for of in ({}, {"layer_windows": None})
    ]
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].peak_pages * 2 < texts[1].peak_pages * 3, "a group of one layer against one of three"
    fitting = jaxkv.generate(model, prompts, max_new_tokens=40)
    assert [[tokens[0]] for tokens in texts[0].tokens] == fitting.tokens
    assert len(fitting.cache.config.groups) > 1


def test_releasing_pages_copies_no_page_table():
    config = replace(
        gemma((64, 1), 2, num_kv_heads=1, head_dim=8, num_pages=4096, max_pages_per_seq=2048, max_seqs=256),
        group_layers=1,
    )
    cache, seqs = jax.eval_shape(lambda: jaxkv.init(config)), jnp.arange(256, dtype=jnp.int32)
    table = 4 * config.num_rows * config.num_columns
    assert table == 2**22
    for operation in (
        lambda cache: jaxkv.allocate(cache, seqs, jnp.ones_like(seqs)),
        lambda c: jaxkv.evict(c, seqs),
    ):
        assert_in_place(operation, cache, max_temp_bytes=table // 16)
