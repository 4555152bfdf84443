"""The kernels against NumPy float64, one table of cases for every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import append_kv, copy_pages, paged_attention
from tests.kernels import reference
from tests.kernels.cases import DTYPES, PAGED_ATTENTION, RAGGED, TOLERANCE, Case, make

BACKENDS = ("xla",)  # that run on this machine

attend = jax.jit(paged_attention, static_argnames=("scale", "window", "softcap", "return_lse", "backend"))

backends = pytest.mark.parametrize("backend", BACKENDS)


def float64(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


def expected(case, arguments):
    q, k_pages, v_pages = float64(arguments.q, arguments.k_pages, arguments.v_pages)
    rows = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    return reference.paged_attention(q, k_pages, v_pages, *rows, layer=case.layer, **arguments.options)


def assert_close(got, want, dtype, magnitude=1.0):
    np.testing.assert_allclose(*float64(got, want), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * magnitude)


@backends
@pytest.mark.parametrize("case", PAGED_ATTENTION, ids=str)
def test_attention_is_that_of_float64(case, backend):
    arguments = make(case)
    out, lse = attend(
        *arguments.arrays,
        layer=jnp.int32(case.layer),
        return_lse=True,
        backend=backend,
        **arguments.options,
    )
    want, want_lse = expected(case, arguments)
    assert out.dtype == jnp.dtype(case.dtype)
    assert lse.dtype == jnp.float32
    # Scores are float32 whatever the dtype, and their rounding grows with their magnitude.
    assert_close(out, want, case.dtype, case.magnitude)
    assert_close(lse, want_lse, "float32", case.magnitude)


@backends
def test_without_lse_only_the_output_comes_back(backend):
    case = Case("", RAGGED)
    arguments = make(case)
    out = attend(*arguments.arrays, layer=1, backend=backend)
    assert out.shape == arguments.q.shape
    assert_close(out, expected(case, arguments)[0], "float32")


@backends
@pytest.mark.parametrize("layer", [0, 2])
def test_layer_may_be_a_python_int(backend, layer):
    case = Case("", (20, 5), num_layers=3, layer=layer)
    arguments = make(case)
    out = jax.jit(lambda *args: paged_attention(*args, layer=layer, backend=backend))(*arguments.arrays)
    assert_close(out, expected(case, arguments)[0], "float32")


@backends
def test_output_holds_nothing_of_pages_that_are_not_the_sequences_own(backend):
    """The same sequences in two pools with different pages and different strangers."""
    case = Case("", (37, 16, 5), (1, 3, 5))
    one = make(case)
    k, v = np.zeros_like(one.k_pages), np.full_like(one.v_pages, 1e30)
    table = one.page_table.copy()
    for row, length in enumerate(case.lengths):
        for column in range(-(-length // case.page_size)):
            new, old = (one.page_table[row, column] + 1) % k.shape[1], one.page_table[row, column]
            table[row, column] = new
            used = slice(min(length - column * case.page_size, case.page_size))
            k[:, new, :, used], v[:, new, :, used] = (
                one.k_pages[:, old, :, used],
                one.v_pages[:, old, :, used],
            )
    q, _, _, _, *rows = one.arrays
    k, v, table = map(jnp.asarray, (k, v, table))
    out = attend(*one.arrays, layer=1, backend=backend)
    other = attend(q, k, v, table, *rows, layer=1, backend=backend)
    np.testing.assert_array_equal(out, other)


@backends
def test_window_is_that_of_the_places_it_covers(backend):
    """A token with window w sees what it would see in a sequence of its last w tokens."""
    case = Case("", (50,), page_size=4, num_layers=1, layer=0)
    arguments = make(case)
    q, *_, starts = arguments.arrays
    windowed = attend(*arguments.arrays, window=8, backend=backend)
    pools = arguments.k_pages, arguments.v_pages
    seen = [reference.read_pages(pages[0], arguments.page_table[0], 50)[-8:] for pages in pools]
    k, v = (jnp.asarray(tokens.swapaxes(0, 1)[None, None]) for tokens in seen)  # one page of eight
    alone = attend(q, k, v, jnp.array([[0]]), jnp.array([8]), starts, backend=backend)
    assert_close(windowed, alone, "float32")


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("traced", [True, False], ids=["traced layer", "int layer"])
def test_append_writes_each_token_to_its_place_and_nothing_else(backend, dtype, traced):
    random = np.random.default_rng(0)
    k_pages, v_pages = random.normal(size=(2, 3, 6, 2, 4, 8)).astype(jnp.dtype(dtype))
    k, v = random.normal(size=(2, 7, 2, 8)).astype(jnp.dtype(dtype))
    page_ids = np.array([5, 0, 6, 5, 2, 6, 1000], np.int32)  # 6 and beyond: dropped
    offsets = np.array([3, 0, 0, 1, 2, 3, 1], np.int32)
    want = reference.append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer=1)
    layer = jnp.int32(1) if traced else 1
    append = jax.jit(lambda *args: append_kv(*args, layer=layer, backend=backend), donate_argnums=(0, 1))
    got = append(jnp.asarray(k_pages), jnp.asarray(v_pages), k, v, page_ids, offsets)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(one, other)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "copies",
    [
        {},
        {3: 0},
        {3: 0, 1: 5, 4: 2},
    ],
    ids=["nothing", "one page", "three pages"],
)
def test_copy_moves_pages_in_every_layer_and_nothing_else(backend, dtype, copies):
    random = np.random.default_rng(0)
    k_pages, v_pages = random.normal(size=(2, 3, 6, 2, 4, 8)).astype(jnp.dtype(dtype))
    sources, destinations = [*copies, 1, 6], [*copies.values(), 6, 1000]  # 6 and beyond: nothing
    sources, destinations = np.array(sources, np.int32), np.array(destinations, np.int32)
    want = reference.copy_pages(k_pages, v_pages, sources, destinations)
    copy = jax.jit(lambda *args: copy_pages(*args, backend=backend), donate_argnums=(0, 1))
    got = copy(jnp.asarray(k_pages), jnp.asarray(v_pages), sources, destinations)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_copy_from_one_page_to_many():
    pages = jnp.arange(6, dtype=jnp.float32).reshape(1, 6, 1, 1, 1)
    got, _ = copy_pages(pages, pages, jnp.array([2, 2, 2]), jnp.array([0, 5, 3]))
    assert got.ravel().tolist() == [2, 1, 2, 2, 4, 2]


def calls(backend):
    arguments = make(Case("", (20, 5)))
    _, *pages, _, _, _ = arguments.arrays
    k, some = pages[0][0, :1, :, 0], jnp.array([0])
    return {
        "paged_attention": lambda: attend(*arguments.arrays, backend=backend),
        "append_kv": lambda: append_kv(*pages, k, k, some, some, backend=backend),
        "copy_pages": lambda: copy_pages(*pages, some, some + 1, backend=backend),
    }


@pytest.mark.parametrize("operation", calls("auto"))
def test_auto_finds_a_backend(operation):
    calls("auto")[operation]()


@pytest.mark.parametrize("operation", calls("auto"))
@pytest.mark.parametrize("backend", ["triton", "mosaic"])
def test_a_backend_that_cannot_serve_the_call_is_refused_by_name(operation, backend):
    with pytest.raises(NotImplementedError, match=backend):
        calls(backend)[operation]()


@pytest.mark.parametrize("operation", calls("auto"))
def test_an_unknown_backend_is_a_value_error(operation):
    with pytest.raises(ValueError, match=r"'cuda'.*xla"):
        calls("cuda")[operation]()
