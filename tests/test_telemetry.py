"""Metrics: what a scrape sees while a model writes, and that counters never fall."""

import re
import socket
import urllib.request
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv import AllocationStats
from jaxkv.memory.telemetry import Telemetry
from jaxkv.models import random_model
from tests import jitted
from tests.caches import SMALL, ints
from tests.tiny_model import TINY

free = jax.jit(jaxkv.free, donate_argnames="cache")


def scrape(url: str) -> dict[str, float]:
    """The samples of jaxkv, by name; for a cache other than "default" with its name."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r'^(jaxkv_\w+)\{cache="(\w+)"\} (\S+)$', text, re.MULTILINE)
    return {name if cache == "default" else f"{name} {cache}": float(x) for name, cache, x in found}


def values(telemetry: Telemetry) -> dict[str, float]:
    """The same without HTTP."""
    return {
        sample.name: sample.value
        for metric in telemetry.registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def with_counters(cache, **counters):
    names = AllocationStats.names()
    vector = [counters.get(name, 0) for name in names]
    return replace(cache, stats=AllocationStats(jnp.array(vector, jnp.int32)))


def test_metrics_scraped_during_a_generation_change_as_pages_do():
    sizes = TINY.cache_config(num_pages=32, page_size=4, max_seqs=4, max_pages_per_seq=8, dtype="float32")
    telemetry, seen = Telemetry(), []
    with telemetry.serve(0) as server:

        def look(state):
            telemetry.observe(state.cache)
            telemetry.flush()
            in_use = int(state.cache.stats.current_pages), int(state.cache.table.lengths.sum())
            seen.append((in_use, scrape(server.url)))

        result = jaxkv.generate(
            random_model(TINY, jax.random.key(3)),
            sizes,
            [[1, 2, 3], [4, 5, 6, 7, 8]],
            num_samples=2,
            max_new_tokens=12,
            block=3,
            on_tokens=look,
        )
    assert result.num_new_tokens == 48
    for (pages, tokens), metrics in seen:
        assert metrics["jaxkv_pages_used"] == pages
        assert metrics["jaxkv_pages_free"] == 32 - pages
        assert metrics["jaxkv_kv_cache_usage_perc"] == pages / 32
        assert metrics["jaxkv_kv_cache_used_bytes"] == pages * sizes.page_bytes
        assert metrics["jaxkv_tokens"] == tokens
    first, last = seen[0][1], seen[-1][1]
    assert first["jaxkv_active_sequences"] == 4 and last["jaxkv_active_sequences"] == 0
    assert first["jaxkv_pages_shared"] == 3 and last["jaxkv_pages_used"] == 0
    assert len({metrics["jaxkv_pages_used"] for _, metrics in seen}) > 2
    assert last["jaxkv_copy_on_write_copies_total"] == int(result.cache.stats.copy_on_write_copies) > 0
    assert last["jaxkv_page_allocations_total"] == last["jaxkv_page_deallocations_total"] > 0
    for name in (name for name in last if name.endswith("_total")):
        history = [metrics[name] for _, metrics in seen]
        assert history == sorted(history)


def test_observing_does_not_wait_and_survives_donation():
    """What is asked for at one call is published at a later one, or by `flush`."""
    telemetry = Telemetry(every=3)
    cache = jaxkv.init(SMALL)
    for _ in range(7):
        cache, _ = jax.jit(jaxkv.allocate, donate_argnames="cache")(cache, ints(0), ints(1))
        telemetry.observe(cache)
    cache = free(cache, ints(0))
    telemetry.flush()
    assert values(telemetry)["jaxkv_tokens"] == 7  # the seventh call is the third that fetches
    telemetry.flush()


def test_profiles_that_pile_up_are_waited_for(monkeypatch):
    monkeypatch.setattr("jaxkv.memory.telemetry._is_ready", lambda profile: False)
    seen = []
    telemetry = Telemetry(on_profile=lambda name, profile: seen.append(profile.tokens))
    cache = jaxkv.init(SMALL)
    for _ in range(12):
        cache, _ = jitted.allocate(cache, ints(0), ints(1))
        telemetry.observe(cache)
    assert seen == [1, 2, 3, 4]
    telemetry.flush()
    assert seen == list(range(1, 13))


def test_other_systems_get_each_profile_on_the_host():
    seen = []
    telemetry = Telemetry(on_profile=lambda name, profile: seen.append((name, profile)))
    telemetry.observe(jaxkv.init(SMALL), name="draft")
    telemetry.flush()
    ((name, profile),) = seen
    assert name == "draft"
    assert isinstance(profile.num_used, np.ndarray | np.integer)
    assert profile.as_dict()["pages_moved"] == 0


def test_counters_add_up_over_caches_and_never_fall():
    telemetry, cache, sums = Telemetry(), jaxkv.init(SMALL), []
    most = 2**31 - 1
    for allocations in (5, 9, 2, 2, most, most):  # a new cache after 9; the device stops at the largest int32
        telemetry.observe(with_counters(cache, total_allocations=allocations))
        telemetry.flush()
        sums.append(values(telemetry)["jaxkv_page_allocations_total"])
    assert sums == [5, 9, 11, 11, 9 + most, 9 + most]


def test_pages_in_use_may_fall_without_starting_the_counters_again():
    telemetry, cache = Telemetry(), jaxkv.init(SMALL)
    for current in (5, 1):
        telemetry.observe(with_counters(cache, total_allocations=5, current_pages=current))
    telemetry.flush()
    assert values(telemetry)["jaxkv_page_allocations_total"] == 5


def test_two_caches_live_in_one_process_under_their_names_or_in_registries_of_their_own():
    cache = jaxkv.init(SMALL)
    used, _ = jitted.allocate(cache, ints(0), ints(4), total_tokens=4)
    telemetry, other = Telemetry(), Telemetry()
    telemetry.observe(cache)
    telemetry.observe(used, name="draft")
    other.observe(used)
    telemetry.flush()
    other.flush()
    with telemetry.serve(0) as server, other.serve(0) as second:
        metrics = scrape(server.url)
        assert scrape(second.url)["jaxkv_pages_used"] == 1
    assert (metrics["jaxkv_pages_used"], metrics["jaxkv_pages_used draft"]) == (0, 1)
    with pytest.raises(ValueError, match="jaxkv_kv_cache_usage_perc"):
        Telemetry(registry=telemetry.registry)


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_a_bad_interval_is_refused(every):
    with pytest.raises(ValueError, match=f"every={every!r}"):
        Telemetry(every=every)


def test_a_port_out_of_range_or_in_use_is_refused_and_a_closed_one_is_free_again():
    telemetry = Telemetry()
    for port in (-1, 65536, "80"):
        with pytest.raises(ValueError, match="port="):
            telemetry.serve(port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}: Address already in use"):
            telemetry.serve(port)
    telemetry.serve(port).close()
    telemetry.serve(port).close()
