"""The models of `bench_groups` take the published bytes, and its small caches have the models' pages."""

import pytest

from benchmarks import bench_groups
from benchmarks.bench_groups import CONTEXTS, EXACT_MIB, GEMMA_3_27B, MIB, MODELS, POOL


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_exact_bytes_are_those_worked_out_apart(model):
    assert model.exact_bytes(CONTEXTS[0]) == EXACT_MIB[model.name] * MIB


@pytest.mark.parametrize("model", [*MODELS, GEMMA_3_27B], ids=lambda model: model.name)
def test_a_small_cache_has_as_many_pages_in_the_same_rows(model):
    config = bench_groups.pool_of(model, CONTEXTS[1], POOL)
    small = bench_groups.small(config)
    assert (small.num_pages, small.num_rows, small.num_columns) == (
        config.num_pages,
        config.num_rows,
        config.num_columns,
    )
    assert small.pool_bytes < config.pool_bytes / 100


def test_the_pools_of_a_split_fill_the_memory_of_one_pool():
    pools = bench_groups.split_pools(GEMMA_3_27B, CONTEXTS[1], POOL)
    taken = sum(config.pool_bytes for config in pools)
    assert taken <= POOL < taken + sum(config.page_bytes for config in pools) + len(pools)
    assert [len(config.groups) for config in pools] == [1, 1]


def test_a_sequence_that_is_run_takes_its_exact_bytes_and_at_most_a_page_for_each_group():
    assert bench_groups.memory_of(MODELS[-1], CONTEXTS[0])["right"]
