"""What the kernels become on a GPU, read off Triton's IR: no GPU is needed for it."""

import re

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import formats
from pallas_kernels.device import Device
from tests.compiled.machine_code.kernel import Kernel
from tests.compiled.machine_code.launches import launches, pretend

H100 = Device("sm_90", 132)


def shape(dims, dtype="int32"):
    return jax.ShapeDtypeStruct(dims, dtype)


def ir_of(operation, pool, device=H100):
    """Triton IR of the first launch of an operation on such a pool."""
    storage = formats.of(pool.dtype)
    kv_heads, head_dim = pool.shape[2], storage.head_dim(pool.shape[4])
    dtype = jnp.bfloat16 if storage.quantized else pool.dtype
    token = shape((4, kv_heads, head_dim), dtype)
    arguments = {
        "paged_attention": (
            shape((4, 2 * kv_heads, head_dim), dtype),
            *(pool, pool, shape((4, 8)), shape((4,)), shape((5,))),
        ),
        "attention_mass": (
            shape((4, 2 * kv_heads, head_dim), dtype),
            *(pool, shape((4, 8)), shape((4,)), shape((5,)), shape((4, 2 * kv_heads), "float32")),
        ),
        "append_kv": (pool, pool, token, token, shape((4,)), shape((4,))),
        "copy_pages": (pool, pool, shape((4,)), shape((4,))),
        "move_pages": (pool, pool, shape((pool.shape[1],))),
    }[operation]
    call = getattr(pallas_kernels, operation)
    pools = 1 if operation == "attention_mass" else 2
    scale_dims = storage.scale_shapes(pool.shape)[:pools]
    scales = tuple(shape(dims, storage.scale_dtype) for dims in scale_dims)

    def run(_, *arrays):
        arrays, scales = arrays[: len(arguments)], arrays[len(arguments) :]
        return call(*arrays, **dict(zip(("k_scales", "v_scales"), scales, strict=False)))

    kernel = Kernel(operation, run, arguments + scales, (operation,), frozenset())
    (launch,) = launches(kernel, device)
    return launch.ir


OPERATIONS = "paged_attention", "attention_mass", "append_kv", "copy_pages", "move_pages"


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pool_beyond_32_bits_is_addressed_in_64(operation, dtype):
    """Offsets are counted in numbers: 2**31 of them are the most that 32 bits address."""
    large = shape((32, 2**17, 8, 16, 128), dtype)
    assert large.size > 2**31
    offsets = re.findall(r"tt\.addptr [^:]*: [^,]*<\w+>[^,]*, (\S+)", ir_of(operation, large))
    wide = [offset for offset in offsets if "i64" in offset]
    assert len(wide) >= (1 if operation == "attention_mass" else 2)  # K and V


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_largest_pool_addressed_in_32_bits_fits_them(operation):
    """Pallas changes to 64 bits over 2**32 bytes: at two bytes a number, exactly where it must."""
    pool = shape((32, 2**12, 8, 16, 128), "bfloat16")
    assert pool.size == 2**31
    offsets = re.findall(r"tt\.addptr [^:]*: [^,]*<\w+>[^,]*, (\S+)", ir_of(operation, pool))
    assert offsets
    assert not [offset for offset in offsets if "i64" in offset]  # the largest is 2**31 - 1


@pytest.mark.parametrize("operation", OPERATIONS[2:])
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


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_codes_that_32_bits_would_not_address_are_addressed_as_words(operation, dtype):
    """Offsets are counted in numbers, and Pallas changes to 64 bits over 2**32 bytes."""
    pool = shape((32, 2**13, 8, 16, 128), dtype)
    assert 2**31 < pool.size <= 2**32
    ir = ir_of(operation, pool)
    assert "!tt.ptr<i32>" in ir
    assert not re.findall(r"!tt\.ptr<(?:i8|f8\w*)>", ir)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "attention_mass"])
def test_words_of_four_bit_codes_are_never_a_pool_of_anything_else(operation):
    pool = shape((32, 2**15, 8, 16, 16), "int32")
    assert pool.size == 2**31
    ir = ir_of(operation, pool)
    assert "!tt.ptr<i32>" in ir
    assert "tt.ptr<i8>" not in ir


def test_rows_of_codes_that_make_no_words_are_left_to_xla():
    assert "by fours" in (formats.named("int8").lacks(H100, row_size=6) or "")
    assert formats.named("bfloat16").lacks(H100, row_size=6) is None
