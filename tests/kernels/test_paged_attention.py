"""The kernels against NumPy float64, one table of cases for every backend."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    append_kv,
    attention_mass,
    copy_pages,
    formats,
    move_pages,
    paged_attention,
    reference,
    use_backend,
)
from pallas_kernels.paged_attention.triton.tuning import Tuning
from pallas_kernels.reference.cases import (
    DTYPES,
    PAGED_ATTENTION,
    RAGGED,
    TOLERANCE,
    Case,
    make,
    padded,
    with_slots,
)

BACKENDS = ("xla", "triton")
QUANTIZED = ("int8", "uint8")
CODES = (*QUANTIZED, "int32")

attend = jax.jit(
    paged_attention,
    static_argnames=(
        *("scale", "window", "sink_tokens", "softcap", "return_lse", "shared_prefix"),
        *("backend", "interpret", "tuning"),
    ),
)

mass_of = jax.jit(
    attention_mass,
    static_argnames=("scale", "window", "sink_tokens", "softcap", "backend", "interpret", "tuning"),
)
append = jax.jit(append_kv, static_argnames=("backend", "interpret"))
copy = jax.jit(copy_pages, static_argnames=("backend", "interpret"))
move = jax.jit(move_pages, donate_argnums=(0, 1), static_argnames=("backend", "interpret"))

backends = pytest.mark.parametrize("backend", BACKENDS)
# Where values are only copied, two bytes are two bytes: float16 in `make test-slow`.
COPIED = ("float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow))


def on(backend):
    """The arguments that run a backend here: its kernels interpreted where there is no GPU."""
    return {"backend": backend, "interpret": backend != "xla" and jax.default_backend() != "gpu"}


def float64(*arrays):
    return [np.asarray(array).astype(np.float64) for array in arrays]


def expected(case, arguments):
    pages = arguments.k_pages, arguments.v_pages
    rows = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    return reference.paged_attention(arguments.q, *pages, *rows, layer=case.layer, **arguments.options)


def assert_close(got, want, dtype, magnitude=1.0):
    np.testing.assert_allclose(*float64(got, want), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * magnitude)


# They differ in data alone, and are padded to the same shapes: one program for a backend.
ONE_PROGRAM = (
    "prefill with head_dim 64",
    "one token of one sequence",
    "live sequences without queries",
    "every length at a page boundary",
    "whole prompts",
    "a chunk after a prefix",
    "prefill and decode in one call",
    "live sequences that ask nothing",
    "nothing to see at all",
    "rows of no sequence",
    "large scores",
)
# Combinations of what other cases hold one by one.
SELDOM = (
    "decode with MHA, bfloat16",
    "decode with MHA, float16",
    "decode with GQA, float32",
    "decode with GQA, float16",
    "decode with MQA, float32",
    "decode with MQA, bfloat16",
    "decode with head_dim 64",
    "decode with head_dim 80",
    "decode with head_dim 128",
    "prefill with head_dim 96",
    "prefill with head_dim 128",
    "prefill with head_dim 256",
    "pages of 2",
    "pages of 8",
    "pages of 64",
    "a long prompt",
    "scale",
    "a window inside a page",
    "a window longer than the sequence",
    "a softcap of 50",
    "decode of int8, float16",
    "decode of uint8, bfloat16",
    "prefill of int8, float32",
    "prefill of int8, float16",
    "prefill of int4, bfloat16",
    "pages of 3, of int8, head_dim 80",
    "a large page of int4, head_dim 96",
    "a large page of int8",
    "sink tokens up to the window, pages of 3",
    "sink tokens of fp8, and all options",
    "two share all but a tail",
    "a prefix and nothing else",
    "shared pages larger than a tile",
    "a shared prefix of uint8",
    "a shared prefix of int32",
    "a chunk past its window, int8, 2 KV heads",
    "a chunk past its window, uint8, 2 KV heads",
)
CASES = [
    pytest.param(padded(case) if case.name in ONE_PROGRAM else case, marks=marks, id=case.name)
    for case in PAGED_ATTENTION
    for marks in ([pytest.mark.slow] if case.name in SELDOM else [()])
]


@backends
@pytest.mark.parametrize("case", CASES)
def test_attention_is_that_of_float64(case, backend):
    arguments = make(case)
    out, lse = attend(
        *arguments.arrays,
        layer=jnp.int32(case.layer),
        return_lse=True,
        **on(backend),
        **arguments.options,
    )
    want, want_lse = expected(case, arguments)
    assert out.dtype == jnp.dtype(case.dtype)
    assert lse.dtype == jnp.float32
    # Scores are float32 whatever the dtype, and their rounding grows with their magnitude.
    assert_close(out, want, case.dtype, case.magnitude)
    # Four-bit codes meet a query that was rotated, and rounded to its dtype.
    exact = "float32" if case.stored != "int32" else case.dtype
    assert_close(lse, want_lse, exact, case.magnitude)


@backends
def test_without_lse_only_the_output_comes_back(backend):
    case = Case("", RAGGED)
    arguments = make(case)
    out = attend(*arguments.arrays, layer=1, **on(backend))
    assert out.shape == arguments.q.shape
    assert_close(out, expected(case, arguments)[0], "float32")


@backends
@pytest.mark.parametrize("layer", [0, 2])
def test_layer_may_be_a_python_int(backend, layer):
    case = Case("", (20, 5), num_layers=3, layer=layer)
    arguments = make(case)
    out = jax.jit(lambda *args: paged_attention(*args, layer=layer, **on(backend)))(*arguments.arrays)
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
    out = attend(*one.arrays, layer=1, **on(backend))
    other = attend(q, k, v, table, *rows, layer=1, **on(backend))
    np.testing.assert_array_equal(out, other)


@backends
def test_window_is_that_of_the_tokens_it_covers(backend):
    """A token with window w sees what it would see in a sequence of its last w tokens."""
    case = Case("", (50,), page_size=4, num_layers=1, layer=0)
    arguments = make(case)
    q, *_, starts = arguments.arrays
    windowed = attend(*arguments.arrays, window=8, **on(backend))
    pools = arguments.k_pages, arguments.v_pages
    seen = [reference.read_pages(pages[0], arguments.page_table[0], 50)[-8:] for pages in pools]
    k, v = (jnp.asarray(tokens.swapaxes(0, 1)[None, None]) for tokens in seen)  # one page of eight
    alone = attend(q, k, v, jnp.array([[0]]), jnp.array([8]), starts, **on(backend))
    assert_close(windowed, alone, "float32")


@backends
@pytest.mark.parametrize("queries", [1, 45])
def test_a_row_that_begins_in_mid_text_gives_what_the_whole_text_gives(backend, queries):
    """A window's row without the pages that no query sees, and the whole row, in one batch of tables."""
    window, page_size = 20, 8
    case = Case("", (120,), (queries,), page_size=page_size, options={"window": window})
    arguments = make(case)
    released = (120 - queries + 1 - window) // page_size
    assert released > 0
    q, k_pages, v_pages, table, lengths, starts = arguments.arrays
    whole = attend(q, k_pages, v_pages, table, lengths, starts, layer=1, window=window, **on(backend))
    # As wide as the table was: what is past the row is of no page.
    rest = jnp.pad(table[:, released:], ((0, 0), (0, released)), constant_values=k_pages.shape[1])
    row = attend(
        q,
        k_pages,
        v_pages,
        rest,
        lengths - released * page_size,
        starts,
        layer=1,
        window=window,
        **on(backend),
    )
    assert_close(row, whole, "float32")
    assert_close(row, expected(case, arguments)[0], "float32")


@backends
@pytest.mark.parametrize("dtype", COPIED)
def test_append_writes_each_token_to_its_slot_and_nothing_else(backend, dtype):
    random = np.random.default_rng(0)
    k_pages, v_pages = random.normal(size=(2, 3, 6, 2, 4, 8)).astype(jnp.dtype(dtype))
    k, v = random.normal(size=(2, 7, 2, 8)).astype(jnp.dtype(dtype))
    page_ids = np.array([5, 0, 6, 5, 2, 6, 1000], np.int32)  # 6 and beyond: dropped
    offsets = np.array([3, 0, 0, 1, 2, 3, 1], np.int32)
    want = reference.append_kv(k_pages, v_pages, k, v, page_ids, offsets, layer=1)
    arguments = jnp.asarray(k_pages), jnp.asarray(v_pages), k, v, page_ids, offsets
    results = [append(*arguments, layer=jnp.int32(1), **on(backend))]
    if dtype == "float32":
        results.append(jax.jit(lambda *args: append_kv(*args, layer=1, **on(backend)))(*arguments))
    for got in results:
        for one, other in zip(got, want, strict=True):
            assert one.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(one, other)


@backends
@pytest.mark.parametrize("dtype", COPIED)
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
    nothing = 4 - len(copies)  # beyond the 6 pages: as source, as destination, or both
    sources, destinations = [*copies, *[1, 6, 7, 1][:nothing]], [*copies.values(), *[6, 1000, 6, 7][:nothing]]
    sources, destinations = np.array(sources, np.int32), np.array(destinations, np.int32)
    want = reference.copy_pages(k_pages, v_pages, sources, destinations)
    got = copy(jnp.asarray(k_pages), jnp.asarray(v_pages), sources, destinations, **on(backend))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_copy_from_one_page_to_many():
    pages = jnp.arange(6, dtype=jnp.float32).reshape(1, 6, 1, 1, 1)
    got, _ = copy_pages(pages, pages, jnp.array([2, 2, 2]), jnp.array([0, 5, 3]))
    assert got.ravel().tolist() == [2, 1, 2, 2, 4, 2]


@st.composite
def some_moves(draw):
    """Some of the pages to some of the page ids: chains, cycles, and what stays."""
    num_pages = draw(st.sampled_from([1, 12]))
    count = draw(st.integers(0, num_pages))
    pages = draw(st.permutations(range(num_pages)))[:count]
    ids = draw(st.sampled_from([sorted(pages), range(num_pages), draw(st.permutations(range(num_pages)))]))
    targets = np.full(num_pages, draw(st.sampled_from([-1, num_pages, 1000])), np.int32)
    targets[pages] = ids[:count]
    return targets


@backends
@settings(max_examples=60, deadline=None)
@given(targets=some_moves())
def test_pages_move_as_if_all_at_once(backend, targets):
    num_pages = len(targets)
    k_pages, v_pages = np.random.default_rng(0).normal(size=(2, 2, num_pages, 1, 3, 8)).astype(np.float32)
    want = reference.move_pages(k_pages, v_pages, targets)
    got = move(jnp.asarray(k_pages), jnp.asarray(v_pages), targets, **on(backend))
    came = targets[(targets >= 0) & (targets < num_pages)]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one[:, came], other[:, came])


@backends
@pytest.mark.parametrize("dtype", COPIED)
def test_a_pool_moves_in_every_layer_and_every_part_of_a_page(backend, dtype):
    """Parts of 4096 bytes, the last of them part full; one long cycle, and two pages that are swapped."""
    random = np.random.default_rng(0)
    k_pages, v_pages = random.normal(size=(2, 3, 9, 3, 11, 80)).astype(jnp.dtype(dtype))
    targets = np.array([1, 2, 3, 4, 0, 6, 5, 7, 8], np.int32)
    want = reference.move_pages(k_pages, v_pages, targets)
    got = move(jnp.asarray(k_pages), jnp.asarray(v_pages), targets, **on(backend))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(one, other)


def pool_of_codes(stored, shape=(3, 9, 2, 5, 24), more_slots=0):
    """k_pages, v_pages and their scales by name, random."""
    k, v = np.random.default_rng(0).normal(size=(2, *shape))
    k_pages, v_pages, *scales = reference.encode(k, v, np.dtype(stored))
    k_scales, v_scales = (with_slots(array, more_slots, 1) for array in scales)
    return (k_pages, v_pages), {"k_scales": k_scales, "v_scales": v_scales}


@backends
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("int8", "float32"),
        ("uint8", "float32"),
        ("int32", "float32"),
        ("uint8", "bfloat16"),
        pytest.param("int8", "float16", marks=pytest.mark.slow),
        pytest.param("int32", "bfloat16", marks=pytest.mark.slow),
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("uint8", "float16", marks=pytest.mark.slow),
        pytest.param("int32", "float16", marks=pytest.mark.slow),
    ],
)
def test_append_quantizes_each_row_on_its_own(backend, stored, dtype):
    pages, scales = pool_of_codes(stored)
    k, v = np.random.default_rng(1).normal(size=(2, 7, 2, 24)).astype(jnp.dtype(dtype))
    k[0, 0], v[1] = 0, 0
    k[2, 0, 3], k[3, 1, :2], v[4, 0, 5], v[5, 1, 0] = np.nan, np.inf, -np.inf, np.nan
    k[6, 0], v[6, 1] = np.nan, 3e-38
    page_ids, offsets = np.array([5, 0, 9, 5, 2, 8, 7], np.int32), np.array([3, 0, 0, 1, 2, 4, 1], np.int32)
    want = reference.append_kv(*pages, k, v, page_ids, offsets, layer=1, **scales)
    got = append(*pages, k, v, page_ids, offsets, layer=1, **scales, **on(backend))
    assert [array.dtype for array in got] == [array.dtype for array in want]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(*float64(one, other))
    for one in formats.of(stored).decode_pair(got, jnp.float32):
        assert np.isfinite(one).all()


@backends
@pytest.mark.parametrize("stored", CODES)
def test_scales_go_where_their_pages_go(backend, stored):
    pages, scales = pool_of_codes(stored)
    some, others = np.array([1, 4, 9], np.int32), np.array([0, 8, 3], np.int32)
    targets = np.array([1, 2, 0, 9, 8, 4, 6, 5, 7], np.int32)
    want_copied = reference.copy_pages(*pages, some[:2], others[:2], **scales)
    want_moved = reference.move_pages(*pages, targets, **scales)
    for want, got in (
        (want_copied, copy(*pages, some, others, **scales, **on(backend))),
        (want_moved, move(*pages, targets, **scales, **on(backend))),
    ):
        assert len(got) == 4
        for one, other in zip(got, want, strict=True):
            # Page 3 is left, and nothing comes to it.
            np.testing.assert_array_equal(*(np.delete(array, 3, axis=1) for array in float64(one, other)))


@partial(jax.jit, static_argnums=(2, 3))
def stored_and_read(k, v, storage, dtype):
    storage = formats.named(storage) if isinstance(storage, str) else storage
    return storage.decode_pair(storage.encode_pair(k, v), dtype)


@backends
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("stored", CODES)
def test_slots_of_scales_past_the_page_move_with_it_and_are_never_written(backend, stored, kv_heads):
    """As in pools of layers of different shape: there a page may have more scales than tokens."""
    pages, scales = pool_of_codes(stored, (3, 9, kv_heads, 5, 24), more_slots=3)
    k, v = np.random.default_rng(1).normal(size=(2, 6, kv_heads, 24)).astype(np.float32)
    page_ids, offsets = np.array([5, 0, 9, 5, 4, 3], np.int32), np.array([4, 0, 0, 1, 5, 7], np.int32)
    targets = np.array([1, 2, 0, 9, 8, 4, 6, 5, 7], np.int32)
    # The last two are past the page: neither codes nor scales are written.
    inside = np.where(offsets < 5, page_ids, 9)
    append = jax.jit(lambda *args, **scales: append_kv(*args, layer=1, **scales, **on(backend)))
    copy = jax.jit(lambda *args, **scales: copy_pages(*args, **scales, **on(backend)))
    for want, got in (
        (
            reference.append_kv(*pages, k, v, inside, offsets, layer=1, **scales),
            append(*pages, k, v, page_ids, offsets, **scales),
        ),
        (
            reference.copy_pages(*pages, page_ids[:2], page_ids[4:], **scales),
            copy(*pages, page_ids[:2], page_ids[4:], **scales),
        ),
        (
            reference.move_pages(*pages, targets, **scales),
            move(*pages, targets, **scales, **on(backend)),
        ),
    ):
        for one, other in zip(got, want, strict=True):
            # Page 3 is left by the move, and nothing comes to it.
            np.testing.assert_array_equal(*(np.delete(array, 3, axis=1) for array in float64(one, other)))


@pytest.mark.parametrize("stored", QUANTIZED)
def test_what_codes_stand_for_is_near_what_was_written(stored):
    values = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
    storage = formats.of(stored)
    stored_and_read = jax.jit(lambda x: storage.decode(*storage.encode(x, keys=True), "float32"))
    error = np.abs(stored_and_read(values) - values)
    most = np.abs(values).max(axis=1, keepdims=True)
    if stored == "int8":
        assert np.all(error <= most / 127 / 2 * 1.001)
    else:  # three bits behind the leading one
        assert np.all(error <= np.maximum(np.abs(values) / 16, most / 448 / 2**9) * 1.001)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_four_bits_are_near_what_was_written(head_dim, offset):
    """An element that stands out is kept apart in keys, and costs the others of V."""
    random = np.random.default_rng(0)
    values = (random.normal(size=(1000, head_dim)) + offset).astype(np.float32)
    values[:, 3] *= 20
    k, v = stored_and_read(values, values, "int4", "float32")
    size, plain = (np.linalg.norm(part, axis=1) for part in (values, np.delete(values, 3, axis=1)))
    # What all elements have in common falls on one of those that they are rotated to.
    assert np.mean(np.linalg.norm(k - values, axis=1) / plain) < (0.13 if offset else 0.1)
    assert np.max(np.linalg.norm(k - values, axis=1) / size) < 0.15
    assert np.max(np.linalg.norm(v - values, axis=1) / size) < 0.25


@pytest.mark.parametrize("stored", ["bfloat16", *CODES])
def test_what_is_stored_is_stored_again_as_near(stored):
    values = np.random.default_rng(0).normal(size=(2, 50, 32)).astype(np.float32)
    once = stored_and_read(*values, formats.of(stored), "float32")
    again = stored_and_read(*once, formats.of(stored), "float32")
    assert np.linalg.norm(np.subtract(again, once)) < 0.1 * np.linalg.norm(values)


@pytest.mark.parametrize("stored", CODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_of_a_dtype_come_back_finite(stored, dtype):
    random, most = np.random.default_rng(0), float(jnp.finfo(dtype).max)
    values = (most * random.uniform(-1, 1, size=(500, 16))).astype(jnp.dtype(dtype))
    values[:, 0] = most
    for part in stored_and_read(values, values, formats.of(stored), dtype):
        assert np.isfinite(float64(part)[0]).all()


@pytest.mark.parametrize("stored", QUANTIZED)
def test_every_code_is_read_as_numpy_reads_it(stored):
    codes = np.arange(256, dtype=np.uint8).view(jnp.dtype(stored))
    want = reference.unscaled(codes).astype(np.float32)
    real = np.isfinite(want)
    np.testing.assert_array_equal(formats.of(stored).widen(jnp.asarray(codes))[real], want[real])


@pytest.mark.usefixtures("no_shape_checks")
def test_codes_and_scales_must_go_together():
    (k, v), scales = pool_of_codes("int8")
    numbers = np.zeros(k.shape, np.float32)
    move = np.arange(9, dtype=np.int32)
    for arguments, options, said in [
        ((k, v, move), {}, "int8 need k_scales"),
        ((k, v, move), {"k_scales": scales["k_scales"]}, "int8 need v_scales"),
        ((numbers, numbers, move), scales, "float32 have no k_scales"),
        (
            (k, v, move),
            scales | {"v_scales": scales["v_scales"][:1]},
            r"v_scales must be float32\[3, 9, 2, 5\]",
        ),
        ((k.view(jnp.float8_e4m3fnuz),) * 2 + (move,), scales, "float8_e4m3fnuz are not supported"),
    ]:
        with pytest.raises(ValueError, match=said):
            move_pages(*map(jnp.asarray, arguments), **jax.tree.map(jnp.asarray, options))


def calls(backend):
    arguments = make(Case("", (20, 5)))
    q, k_pages, v_pages, *rows = arguments.arrays
    pages = k_pages, v_pages
    k, some = pages[0][0, :1, :, 0], jnp.array([0])
    return {
        "paged_attention": lambda: paged_attention(*arguments.arrays, backend=backend),
        "attention_mass": lambda: attention_mass(q, pages[0], *rows, q[..., 0], backend=backend),
        "append_kv": lambda: append_kv(*pages, k, k, some, some, backend=backend),
        "copy_pages": lambda: copy_pages(*pages, some, some + 1, backend=backend),
        "move_pages": lambda: move_pages(*pages, jnp.arange(pages[0].shape[1]), backend=backend),
    }


@pytest.mark.parametrize("operation", calls("auto"))
def test_auto_finds_a_backend(operation):
    jax.jit(calls("auto")[operation])()


@pytest.mark.parametrize("operation", calls("auto"))
def test_a_backend_that_is_not_built_is_refused_by_name(operation):
    with pytest.raises(NotImplementedError, match="mosaic"):
        calls("mosaic")[operation]()


@pytest.mark.parametrize("operation", calls("auto"))
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_a_kernel_without_a_gpu_is_refused_and_says_what_helps(operation):
    with pytest.raises(NotImplementedError, match=r"triton.*lacks a GPU.*use_backend"):
        calls("triton")[operation]()


@pytest.mark.parametrize("operation", calls("auto"))
def test_auto_means_what_use_backend_says(operation):
    with use_backend("mosaic"), pytest.raises(NotImplementedError, match="mosaic"):
        calls("auto")[operation]()


def test_use_backend_is_part_of_the_program():
    """A function compiled for one backend is compiled again for another."""
    pages, token, one = jnp.zeros((1, 2, 1, 4, 16)), jnp.ones((1, 1, 16)), jnp.array([1])
    append = jax.jit(lambda pages: append_kv(pages, pages, token, token, one, one)[0])
    plain = str(append.trace(pages).jaxpr)
    with use_backend("triton", interpret=True):
        assert "pallas_call" in str(append.trace(pages).jaxpr)
        np.testing.assert_array_equal(append(pages)[0, 1, 0, 1], 1)
    assert "pallas_call" not in plain
    assert str(append.trace(pages).jaxpr) == plain


def test_use_backend_takes_only_backends():
    with pytest.raises(ValueError, match="cuda"), use_backend("cuda"):
        pass


@pytest.mark.parametrize("operation", calls("auto"))
def test_an_unknown_backend_is_a_value_error(operation):
    with pytest.raises(ValueError, match=r"'cuda'.*xla"):
        calls("cuda")[operation]()


@backends
def test_64_bit_mode_changes_nothing(backend):
    case = Case("", (300, 33, 0, 5), (40, 1, 0, 5), page_size=3, padding_rows=2, sinks=True)
    arguments = make(replace(case, options={"window": 20, "softcap": 5.0}))
    with jax.enable_x64(True):
        out, lse = attend(*arguments.arrays, layer=1, return_lse=True, **on(backend), **arguments.options)
        q, k_pages, v_pages, *rows = arguments.arrays
        options = {name: value for name, value in arguments.options.items() if name != "sink_logits"}
        mass = mass_of(q, k_pages, *rows, lse, layer=1, **options, **on(backend))
        zero = jnp.zeros(1, jnp.int32)
        k_new, v_new = append(
            k_pages, v_pages, k_pages[0, :1, :, 0], v_pages[0, :1, :, 0], zero, zero, **on(backend)
        )
        copied = copy(k_pages, v_pages, zero, zero + 1, **on(backend))
    want = expected(case, arguments)
    assert_close(out, want[0], "float32")
    assert_close(lse, want[1], "float32")
    assert np.isfinite(mass).all()
    assert {array.dtype for array in (out, lse, mass, k_new, v_new, *copied)} == {jnp.dtype("float32")}


TUNINGS = {
    "one cut": Tuning(query_tile=1, key_tile=16, num_warps=4, num_stages=1, programs=1),
    "many cuts": Tuning(query_tile=1, key_tile=16, num_warps=4, num_stages=1, programs=200),
    "more items than work": Tuning(query_tile=4, key_tile=64, num_warps=4, num_stages=1, programs=4000),
}
TUNED = {
    "long beside short": Case("", (700, 3, 0, 17)),
    "window, sink tokens, sinks, padding": Case(
        "",
        (300, 90, 7),
        (5, 1, 7),
        padding_rows=4,
        sinks=True,
        options={"window": 33, "sink_tokens": 20},
    ),
    "71 heads on one, bfloat16": Case("", (129, 64), q_heads=71, kv_heads=1, dtype="bfloat16"),
}
# Each tuning and each case once; the other pairs in `make test-slow`.
PAIRS = (
    ("long beside short", "many cuts"),
    ("window, sink tokens, sinks, padding", "more items than work"),
    ("71 heads on one, bfloat16", "one cut"),
)


@pytest.mark.parametrize(
    ("case", "tuning"),
    [
        pytest.param(TUNED[case], TUNINGS[tuning], marks=marks, id=f"{case}-{tuning}")
        for case in TUNED
        for tuning in TUNINGS
        for marks in ([()] if (case, tuning) in PAIRS else [pytest.mark.slow])
    ],
)
def test_any_tuning_is_right(case, tuning):
    arguments = make(case)
    interpret = jax.default_backend() != "gpu"
    got = attend(
        *arguments.arrays,
        layer=1,
        return_lse=True,
        backend="triton",
        interpret=interpret,
        tuning=tuning,
        **arguments.options,
    )
    want = expected(case, arguments)
    assert_close(got[0], want[0], case.dtype)
    assert_close(got[1], want[1], "float32")


# Few queries and many, in one class of tiles and in two; a run of joint tiles before another sequence.
NEIGHBOURS = [
    Case("short chunks", (3, 9, 5, 0, 6), (3, 1, 2, 0, 2), padding_rows=2),
    Case("a chunk among single tokens", (9, 40, 12, *[20] * 30), (1, 35, 3, *[1] * 30), q_heads=2),
    Case(
        "joint tiles",
        (40, 38, 20),
        (2, 3, 2),
        page_size=16,
        begins_like={1: (0, 2)},
        options={"shared_prefix": True},
    ),
]


@backends
@pytest.mark.parametrize("case", NEIGHBOURS, ids=lambda case: case.name)
@pytest.mark.parametrize("of", ["q", "k_pages", "v_pages"])
def test_what_is_not_finite_stays_in_its_sequence(backend, case, of):
    """An infinity or a NaN among a sequence's keys, values or queries reaches no row of another."""
    clean = make(case)
    run = partial(attend, layer=case.layer, return_lse=True, **on(backend), **clean.options)
    want = run(*clean.arrays)
    for poison in (np.inf, np.nan):
        for seq, length in enumerate(case.lengths):
            if not length:
                continue
            array = getattr(clean, of).copy()
            if of == "q":
                array[clean.query_starts[seq]] = poison
            else:
                # Its last token, on a page that no other sequence has.
                page = clean.page_table[seq, (length - 1) // case.page_size]
                array[case.layer, page, :, (length - 1) % case.page_size] = poison
            got = run(*replace(clean, **{of: array}).arrays)
            others = np.ones(len(clean.q), bool)
            others[clean.query_starts[seq] : clean.query_starts[seq + 1]] = False
            for part, whole in zip(got, want, strict=True):
                np.testing.assert_array_equal(np.asarray(part)[others], np.asarray(whole)[others])


@backends
@pytest.mark.parametrize("score", [-2e30, -3e38], ids=str)
@pytest.mark.parametrize(
    ("shared", "scale"), [(False, 1.0), (False, 0.3), (True, 0.3)], ids=["alone", "alone, scaled", "shared"]
)
def test_the_greatest_score_weighs_one_however_low_it_is(backend, shared, score, scale):
    """Rows of two sequences with the same 32 keys; an empty one between them sees nothing."""
    k_pages = np.full((1, 3, 1, 32, 16), 0.0, np.float32)
    k_pages[..., 0] = score / 1e19
    k_pages[0, 1, 0, 5, 0] *= 0.875
    v_pages = np.random.default_rng(0).normal(size=k_pages.shape).astype(np.float32)
    q = np.zeros((2, 1, 16), np.float32)
    q[..., 0] = 1e19
    k_pages, v_pages, q = map(jnp.asarray, (k_pages, v_pages, q))
    table = jnp.array([[1, 0], [2, 2], [1, 2]], jnp.int32)
    lengths, starts = jnp.array([64, 0, 64], jnp.int32), jnp.array([0, 1, 1, 2], jnp.int32)
    rows = table, lengths, starts
    out, lse = attend(
        q, k_pages, v_pages, *rows, scale=scale, shared_prefix=shared, return_lse=True, **on(backend)
    )
    np.testing.assert_allclose(out[:, 0], jnp.stack([v_pages[0, 1, 0, 5]] * 2), rtol=1e-6)
    want = float(q[0, 0, 0]) * float(k_pages[0, 1, 0, 5, 0]) * scale
    np.testing.assert_allclose(lse, jnp.full((2, 1), want), rtol=1e-6)
    mass = mass_of(q, k_pages, *rows, lse, scale=scale, **on(backend))
    np.testing.assert_array_equal(np.flatnonzero(mass), [5, 2 * 64 + 5])
    np.testing.assert_array_equal(mass.sum(axis=(1, 2)), [1, 0, 1])


@backends
@pytest.mark.parametrize(
    "tuning",
    [None, Tuning(query_tile=1, key_tile=16, num_warps=4, num_stages=1, programs=200)],
    ids=["whole", "cut"],
)
def test_a_lone_key_weighs_one_and_scores_of_minus_infinity_weigh_nothing(backend, tuning):
    k_pages = jnp.zeros((1, 1, 1, 1, 16)).at[..., 0].set(-3e38)
    v_pages = jnp.ones_like(k_pages)
    one = jnp.array([[0]]), jnp.array([1]), jnp.array([0, 1])
    for query, out_want, lse_want in ((1.0, 1.0, -3e38), (1e10, 0.0, -np.inf)):
        q = jnp.full((1, 1, 16), query)
        out, lse = attend(q, k_pages, v_pages, *one, scale=1.0, return_lse=True, tuning=tuning, **on(backend))
        np.testing.assert_array_equal(out, jnp.full_like(out, out_want))
        np.testing.assert_allclose(lse, jnp.full_like(lse, lse_want), rtol=1e-6)
        mass = mass_of(q, k_pages, *one, lse, scale=1.0, **on(backend))
        np.testing.assert_array_equal(mass, jnp.full_like(mass, out_want))


@backends
def test_the_mass_of_a_huge_score_from_codes_is_one(backend):
    k_pages = jnp.zeros((1, 1, 1, 16, 16), jnp.float32).at[..., 0, :].set(-100).astype(jnp.int8)
    scales = jnp.full((1, 1, 1, 16), 1e14, jnp.float32)
    q = jnp.full((1, 2, 16), 1e16, jnp.float32)
    rows = jnp.array([[0]]), jnp.array([1]), jnp.array([0, 1])
    codes = {"k_scales": scales}
    _, lse = attend(q, k_pages, k_pages, *rows, **codes, v_scales=scales, return_lse=True, **on(backend))
    mass = mass_of(q, k_pages, *rows, lse, **codes, **on(backend))
    np.testing.assert_array_equal(mass[0, 0], np.eye(16)[0] * 2)
