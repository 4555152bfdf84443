"""What attention each place received, against NumPy float64, in the cases of attention itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention_mass
from tests.kernels import reference
from tests.kernels.cases import PAGED_ATTENTION, TOLERANCE, make

BACKENDS = ("xla", "triton")

mass_of = jax.jit(
    attention_mass, static_argnames=("scale", "window", "sink_tokens", "softcap", "backend", "interpret")
)


def on(backend):
    """The arguments that run a backend here: its kernels interpreted where there is no GPU."""
    return {"backend": backend, "interpret": backend != "xla" and jax.default_backend() != "gpu"}


def received(case, arguments, backend):
    """Mass, given the log-sum-exp of float64."""
    q, k_pages, _, *rows = arguments.arrays
    options = dict(arguments.options)
    pages = arguments.k_pages, arguments.v_pages
    lengths = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    _, lse = reference.paged_attention(arguments.q, *pages, *lengths, layer=case.layer, **options)
    for name in ("v_scales", "sinks", "shared_prefix"):
        options.pop(name, None)
    lse = jnp.asarray(lse, jnp.float32)
    return mass_of(q, k_pages, *rows, lse, layer=jnp.int32(case.layer), **options, **on(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PAGED_ATTENTION, ids=str)
def test_mass_is_that_of_float64(case, backend):
    arguments = make(case)
    mass = received(case, arguments, backend)
    lengths = arguments.page_table, arguments.kv_lengths, arguments.query_starts
    want = reference.attention_mass(
        arguments.q, arguments.k_pages, *lengths, layer=case.layer, **arguments.options
    )
    assert mass.dtype == jnp.float32
    assert mass.shape == want.shape
    # Of many queries the weights, and their rounding, add up. So does that of large scores.
    most = max(1.0, want.max()) * max(1.0, case.magnitude)
    np.testing.assert_allclose(mass, want, rtol=1e-5, atol=TOLERANCE["float32"] * most)
    assert not np.asarray(mass)[want == 0].any()
    if not case.sinks:
        asked = [
            queries if length else 0 for length, queries in zip(case.lengths, case.num_queries, strict=True)
        ]
        np.testing.assert_allclose(mass.sum(axis=(1, 2)), case.q_heads * np.array(asked), rtol=1e-5)
