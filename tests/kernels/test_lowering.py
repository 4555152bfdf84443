"""What the kernels become on a GPU, read off Triton's IR: no GPU is needed for it."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks.check_targets import Kernel, launches, pretend
from pallas_kernels.device import Device, lacks_dtype

H100 = Device("sm_90", 132)


def shape(dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def ir_of(operation, pool, device=H100):
    """Triton IR of the first launch of an operation on such a pool."""
    _, _, kv_heads, _, head_dim = pool.shape
    token = shape((4, kv_heads, head_dim), pool.dtype)
    arguments = {
        "paged_attention": (
            shape((4, 2 * kv_heads, head_dim), pool.dtype),
            *(pool, pool, shape((4, 8)), shape((4,)), shape((5,))),
        ),
        "append_kv": (pool, pool, token, token, shape((4,)), shape((4,))),
        "copy_pages": (pool, pool, shape((4,)), shape((4,))),
        "move_pages": (pool, pool, shape((pool.shape[1],))),
    }[operation]
    call = getattr(pallas_kernels, operation)
    kernel = Kernel(operation, lambda _, *arrays: call(*arrays), arguments, (operation,), frozenset())
    (launch,) = launches(kernel, device)
    return launch.ir


OPERATIONS = "paged_attention", "append_kv", "copy_pages", "move_pages"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pool_beyond_32_bits_is_addressed_in_64(operation, dtype):
    """Offsets are counted in numbers: 2**31 of them are the most that 32 bits address."""
    large = shape((32, 2**17, 8, 16, 128), dtype)
    assert large.size > 2**31
    offsets = re.findall(r"tt\.addptr [^:]*: [^,]*<\w+>[^,]*, (\S+)", ir_of(operation, large))
    wide = [offset for offset in offsets if "i64" in offset]
    assert len(wide) >= 2  # K and V


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_largest_pool_addressed_in_32_bits_fits_them(operation):
    """Pallas changes to 64 bits over 2**32 bytes: at two bytes a number, exactly where it must."""
    pool = shape((32, 2**12, 8, 16, 128), "bfloat16")
    assert pool.size == 2**31
    offsets = re.findall(r"tt\.addptr [^:]*: [^,]*<\w+>[^,]*, (\S+)", ir_of(operation, pool))
    assert offsets
    assert not [offset for offset in offsets if "i64" in offset]  # the largest is 2**31 - 1


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_writes_take_the_pools_own_memory(operation):
    pool, place = shape((2, 16, 2, 16, 64), "bfloat16"), shape((4,))
    token = shape((4, 2, 64), "bfloat16")
    arguments = {
        "append_kv": (pool, pool, token, token, place, place),
        "copy_pages": (pool, pool, place, place),
        "move_pages": (pool, pool, shape((16,))),
    }[operation]
    with pallas_kernels.use_backend("triton"), pretend("cuda"):
        traced = jax.jit(getattr(pallas_kernels, operation)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"#stablehlo.output_operand_alias<", text)) == 2


def test_one_launch_where_one_item_a_tile_is_enough():
    names = []
    for width in (1, 8, 512):
        arguments = (
            shape((4, 8, 64), "bfloat16"),
            *[shape((1, 64, 2, 16, 64), "bfloat16")] * 2,
            *(shape((4, width)), shape((4,)), shape((5,))),
        )
        kernel = Kernel(
            "",
            lambda _, *arrays: pallas_kernels.paged_attention(*arrays),
            arguments,
            ("paged_attention", "paged_attention_merge"),
            frozenset(),
        )
        names.append([launch.name for launch in launches(kernel, H100)])
    both = ["paged_attention", "paged_attention_merge"]
    assert names == [["paged_attention"], ["paged_attention"], both]


def test_a_pool_of_float64_is_refused_by_name_and_left_to_xla_by_auto():
    with jax.enable_x64(True):
        pages = jnp.zeros((1, 2, 1, 4, 8), jnp.float64)
        with pytest.raises(NotImplementedError, match=r"triton.*lacks float64"):
            pallas_kernels.copy_pages(
                pages, pages, jnp.array([0]), jnp.array([1]), backend="triton", interpret=True
            )


@pytest.mark.parametrize("pages", [2**13 // 2 + 1, 2**13])
def test_a_pool_of_codes_that_32_bits_would_not_address_is_left_to_xla(pages):
    """Offsets are counted in numbers, and Pallas changes to 64 bits over 2**32 bytes."""
    pool = shape((32, pages, 8, 16, 128), "int8")
    assert "64-bit offsets" in (lacks_dtype(H100, pool) or "")
    for size in (2**12, 2**13 + 1):
        assert lacks_dtype(H100, shape((32, size, 8, 16, 128), "int8")) is None
