"""A damaged checkpoint is refused in one line that names it, or read as the checkpoint that it was."""

import dataclasses
import functools
import resource
import time

import jax
import numpy as np
import pytest

from jaxkv.models import load
from tests.models.damage import FOLDERS, damaged, whole_gguf

# What no tensor contradicts; a byte of the header that changes it reads as the right value.
SCALARS = ("rope_theta", "rms_norm_eps", "max_context", "rope_scaling", "window", "full_attention_layers")
MOST_LETTERS, MOST_SECONDS, MOST_KILOBYTES = 500, 20, 512 * 1024


@functools.cache
def undamaged(name, is_gguf, folder):
    if not is_gguf:
        return load(FOLDERS[name])
    path = folder / f"{name}.gguf"
    path.write_bytes(whole_gguf(name))
    return load(path)


def assert_the_same(loaded, whole):
    known = {name: getattr(whole.config, name) for name in SCALARS}
    assert dataclasses.replace(loaded.config, **known) == whole.config
    pairs = zip(jax.tree.leaves(loaded.model), jax.tree.leaves(whole.model), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def check(seed, tmp_path, shared):
    folder = tmp_path / str(seed)
    folder.mkdir()
    path, name, damage, must_fail = damaged(seed, folder)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        loaded = load(path)
    except ValueError as error:  # as a ModelLoadError is
        text = str(error)
        assert str(path) in text and "\n" not in text, (seed, damage, text)
        assert len(text) - text.count(str(path)) * len(str(path)) <= MOST_LETTERS, (seed, damage, text)
    except Exception as error:
        raise AssertionError(f"{seed}: {damage} of {name} ends in {error!r}") from error
    else:
        assert not must_fail, f"{seed}: {damage} of {name} was read"
        assert_the_same(loaded, undamaged(name, path.is_file(), shared))
    assert time.monotonic() - start < MOST_SECONDS, (seed, damage)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KILOBYTES, (seed, damage)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def test_sixty_damaged_checkpoints_are_refused_by_name_or_read_right(tmp_path, shared):
    for seed in range(60):
        check(seed, tmp_path, shared)


@pytest.mark.slow
def test_five_hundred_damaged_checkpoints_are_refused_by_name_or_read_right(tmp_path, shared):
    for seed in range(500):
        check(seed, tmp_path, shared)
