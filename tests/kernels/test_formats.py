"""What a storage format says of itself is what it does; who offers formats offers all of them."""

import jax
import jax.numpy as jnp
import pytest

from jaxkv import CacheConfig
from jaxkv.cli.options import KV_DTYPES
from jaxkv.planner import ModelShape, kv_cache_bytes
from pallas_kernels import formats
from pallas_kernels.formats import FORMATS

each = pytest.mark.parametrize("storage", FORMATS.values(), ids=FORMATS)


@each
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_a_tokens_arrays_have_the_shapes_and_bytes_that_are_said(storage, head_dim):
    token = jax.ShapeDtypeStruct((3, head_dim), jnp.float32)
    pages, scales = (3, storage.row_size(head_dim)), storage.scale_shapes((3, storage.row_size(head_dim)))
    stored = jax.eval_shape(storage.encode_pair, token, token)
    assert [array.shape for array in stored] == [pages, pages, *scales]
    assert {array.dtype.name for array in stored[:2]} == {storage.storage_dtype}
    assert all(array.dtype == storage.scale_dtype for array in stored[2:])
    assert bool(scales) == storage.quantized
    assert sum(array.size * array.dtype.itemsize for array in stored) == storage.token_bytes(3, head_dim)
    assert storage.head_dim(pages[-1]) == head_dim
    assert storage.bits * head_dim == 8 * pages[-1] * jnp.dtype(storage.storage_dtype).itemsize


@each
def test_a_format_is_found_by_its_dtype_and_name_and_offered_everywhere(storage):
    assert formats.of(storage.storage_dtype, storage.name) is formats.named(storage.name) is storage
    dtype, quantization = KV_DTYPES[storage.short or storage.name]
    assert storage.name in (dtype, quantization)
    sizes = dict(num_layers=1, num_kv_heads=8, head_dim=128, num_pages=2, page_size=16)
    config = CacheConfig(**sizes, dtype=dtype or "bfloat16", quantization=quantization)
    assert config.storage is storage
    shape = ModelShape.from_config("llama-3.1-8b")
    assert kv_cache_bytes(shape, 16, kv_dtype=storage.name).paged == shape.num_layers * config.page_bytes


def test_a_name_that_does_not_fit_the_pages_says_what_would():
    with pytest.raises(ValueError, match="pages of fp8 are uint8, not int8"):
        formats.of("int8", "fp8")
    with pytest.raises(ValueError, match=r"'int3' is not known; known: float32, .*int4"):
        formats.of("int8", "int3")


@each
def test_a_latent_vector_takes_its_elements_and_a_scale_of_its_own(storage):
    shape = ModelShape.from_config("deepseek-v3")
    planned = kv_cache_bytes(shape, 16, kv_dtype=storage.name)
    assert (planned.scales > 0) == storage.quantized
    assert planned.paged == planned.exact + planned.scales
