"""Pictures: that they show what there is, and leave nothing behind."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgba

import jaxkv
from jaxkv.memory.page_owners import page_map
from jaxkv.memory.pictures import RECLAIMABLE, plot_generation, plot_memory, plot_pages, plot_waste
from tests import jitted
from tests.caches import PAGE_OF_ONE, SMALL, ints


def scattered(config=SMALL):
    cache, _ = jitted.allocate(jaxkv.init(config), ints(0, 1, 2), ints(4, 2, 1), total_tokens=8)
    cache, _ = jitted.fork(cache, ints(2), ints(3))
    return jitted.free(cache, ints(0))


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_pages_before_and_after_compaction_stand_side_by_side(tmp_path):
    cache = scattered()
    before = page_map(cache)
    after, _ = jitted.compact(cache)
    figure = plot_pages(before, after, titles=["before", "after"])
    assert [ax.get_title() for ax in figure.axes] == ["before", "after"]
    assert texts(figure) == ["1", "×2"] * 2
    assert {"slot 1", "slot 2", "shared", "free"} < set(legend(figure))
    figure.savefig(tmp_path / "pages.png")
    assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_pages", [1, 3, 5000])
def test_pools_of_any_size_are_drawn(num_pages, tmp_path):
    config = jaxkv.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=1, num_pages=num_pages, page_size=1, max_pages_per_seq=1
    )
    slots = jnp.arange(min(num_pages, 20))
    cache, _ = jitted.allocate(jaxkv.init(config), slots, jnp.ones_like(slots))
    for one in (jaxkv.init(config), cache):
        figure = plot_pages(one)
        figure.savefig(tmp_path / "pages.png", dpi=20)
    assert f"{len(slots)} in use, 0 holes" in figure.axes[0].get_title()


def test_many_owners_are_told_apart_by_their_numbers():
    slots = jnp.arange(12)
    config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_pages=16, page_size=1)
    cache, _ = jitted.allocate(jaxkv.init(config), slots, jnp.ones_like(slots))
    figure = plot_pages(cache)
    assert texts(figure) == [str(slot) for slot in range(12)]
    assert not any(text.startswith("slot") for text in legend(figure))


def test_reclaimable_pages_are_a_kind_of_their_own():
    pages = page_map(scattered())
    pages = replace(pages, reclaimable=np.arange(8) == 0)  # that of slot 0, which is free
    figure = plot_pages(pages)
    (ax,) = figure.axes
    num_drawn = [
        len(of.get_paths())
        for of in ax.collections
        if np.array_equal(of.get_facecolor(), [to_rgba(RECLAIMABLE)])
    ]
    assert num_drawn == [1]
    assert ax.get_title() == "Pages: 2 in use, 1 reclaimable, 0 holes"
    assert "reclaimable" in legend(figure)
    assert "reclaimable" not in legend(plot_pages(scattered()))


def test_memory_and_waste_have_titles_units_and_the_numbers(tmp_path):
    profiles = [jaxkv.memory_profile(cache) for cache in (jaxkv.init(SMALL), scattered())]
    figure = plot_memory([0, 4], profiles)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("decode step", "MiB")
    in_use = next(line for line in ax.lines if line.get_label() == "pages in use")
    assert in_use.get_ydata().tolist() == [0, 2 * SMALL.page_bytes / 2**20]
    figure = plot_waste([10, 6], page_sizes=[8, 16])
    (ax,) = figure.axes
    assert "2 sequences of 6 to 10 tokens" in ax.get_title()
    assert [text.get_text() for text in ax.texts] == ["33.3%", "50.0%"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["8\n3", "16\n2"]


def test_the_whole_sheet_and_no_trace_of_pyplot(tmp_path):
    cache = scattered(PAGE_OF_ONE)
    after, _ = jitted.compact(cache)
    profiles = jax.device_get([jaxkv.memory_profile(cache)])
    figure = plot_generation(cache, after, [3], profiles, [4, 2, 1])
    figure.savefig(tmp_path / "sheet.svg")
    assert len(figure.axes) == 4
    assert "matplotlib.pyplot" not in sys.modules
    with pytest.raises(ValueError, match="needs a cache"):
        plot_pages()
