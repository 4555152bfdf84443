"""What attention each place received, against NumPy float64, in some of attention's own cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_mass, reference
from pallas_kernels.paged_attention.triton.tuning import Tuning
from pallas_kernels.reference.cases import PAGED_ATTENTION, TOLERANCE, Case, make

BACKENDS = ("xla", "triton")
# A kernel for them there is not: `tuning.lacks_mass`.
FOUR_BITS = "decode of int4, float16", "a large page of int4, head_dim 96"
CHOSEN = (
    "decode with GQA, float32",
    "decode with MQA, bfloat16",
    "prefill with head_dim 80",
    "live sequences without queries",
    "a long prompt",
    "large scores",
    "sinks",
    "prefill of int8, float16",
    "all options, bfloat16",
    "sink tokens over tiles",
    "sink tokens up to the window, pages of 3",
    "sink tokens in a large page of int8",
    "sink tokens of fp8, and all options",
    "a chunk past its window, float32, 2 KV heads",
    "a chunk past its window, int8, 2 KV heads",
    *FOUR_BITS,
)
CASES = [case for case in PAGED_ATTENTION if case.name in CHOSEN]

mass_of = jax.jit(
    attention_mass,
    static_argnames=("scale", "window", "sink_tokens", "softcap", "backend", "interpret", "tuning"),
)


def received(case, arguments, backend, **tuning):
    """Mass, given the log-sum-exp of float64. Where there is no GPU its kernel is interpreted."""
    q, k_pages, _, *rows = arguments.arrays
    pages = arguments.q, arguments.k_pages, arguments.v_pages
    lengths = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    _, lse = reference.paged_attention(*pages, *lengths, layer=case.layer, **arguments.options)
    others = ("v_scales", "sink_logits", "shared_prefix")
    options = {name: value for name, value in arguments.options.items() if name not in others}
    interpret = backend != "xla" and jax.default_backend() != "gpu"
    where = {"backend": backend, "interpret": interpret, "layer": jnp.int32(case.layer)}
    return mass_of(q, k_pages, *rows, jnp.asarray(lse, jnp.float32), **options, **where, **tuning)


def assert_right(mass, case, arguments):
    lengths = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    want = reference.attention_mass(
        arguments.q, arguments.k_pages, *lengths, layer=case.layer, **arguments.options
    )
    assert mass.dtype == jnp.float32
    assert mass.shape == want.shape
    # The rounding of a weight grows with its score, and that of a place with its weights.
    most = max(1.0, want.max()) * max(1.0, case.magnitude)
    np.testing.assert_allclose(mass, want, rtol=1e-5, atol=TOLERANCE["float32"] * most)
    assert not np.asarray(mass)[want == 0].any()
    if not case.sinks:
        asked = [
            number if length else 0 for length, number in zip(case.lengths, case.num_queries, strict=True)
        ]
        np.testing.assert_allclose(mass.sum(axis=(1, 2)), case.q_heads * np.array(asked), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mass_is_that_of_float64(case, backend):
    assert len(CASES) == len(CHOSEN)
    arguments = make(case)
    if backend == "triton" and case.name in FOUR_BITS:
        with pytest.raises(NotImplementedError, match="four-bit keys"):
            received(case, arguments, backend)
        return
    assert_right(received(case, arguments, backend), case, arguments)


@pytest.mark.parametrize("programs", [1, 40])
def test_any_number_of_programs_is_right(programs):
    case = Case("", (300, 90, 7), (5, 1, 7), options={"window": 33, "sink_tokens": 20})
    tuning = Tuning(query_tile=2, key_tile=16, num_warps=4, num_stages=1, programs=programs)
    arguments = make(case)
    assert_right(received(case, arguments, "triton", tuning=tuning), case, arguments)


@pytest.mark.usefixtures("no_shape_checks")
def test_log_sums_must_be_those_of_the_queries():
    q, k_pages, _, *rows = make(Case("", (5,))).arrays
    with pytest.raises(ValueError, match=r"lse must be float32\[1, 4\]"):
        attention_mass(q, k_pages, *rows, q[:, :2, 0])
