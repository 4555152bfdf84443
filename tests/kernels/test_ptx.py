"""The assembly that turns codes into numbers, followed instruction by instruction: a CPU cannot run it."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import formats
from pallas_kernels.paged_attention.triton import ptx

CODES = np.arange(256, dtype=np.uint32)
HALVES = {"f16x2": jnp.float16, "bf16x2": jnp.bfloat16}


def followed(assembly: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What is left in the result's register, `[words]`."""
    registers = {"$1": first, "$2": second}

    def value(operand):
        found = registers.get(operand)
        return np.full_like(first, int(operand, 0)) if found is None else found

    for instruction in filter(None, map(str.strip, assembly.strip("{} ").split(";"))):
        name, rest = instruction.split(maxsplit=1)
        if name == ".reg":
            continue
        into, *operands = map(str.strip, rest.split(","))
        registers[into] = run(name, [value(operand) for operand in operands])
    return registers["$0"]


def run(name: str, operands: list[np.ndarray]) -> np.ndarray:
    a, *rest = operands
    if name == "mov.b32":
        return a
    if name == "and.b32":
        return a & rest[0]
    if name == "shr.b32":
        return a >> rest[0]
    if name == "prmt.b32":
        b, selector = rest
        bytes_ = np.concatenate([word.view(np.uint8).reshape(-1, 4) for word in (a, b)], axis=1)
        chosen = [(selector >> (4 * nth)) & 7 for nth in range(4)]
        rows = np.arange(len(a))
        return np.stack([bytes_[rows, one] for one in chosen], axis=1).copy().view(np.uint32)[:, 0]
    if name == "lop3.b32":
        b, c, table = rest
        bits = np.zeros_like(a)
        for case in range(8):
            same = [word if case >> place & 1 else ~word for word, place in ((a, 2), (b, 1), (c, 0))]
            bits |= np.where((table >> case) & 1, same[0] & same[1] & same[2], 0).astype(np.uint32)
        return bits
    kind = HALVES[name.rsplit(".", 1)[1]]
    a, b, *c = (np.ascontiguousarray(word).view(jnp.dtype(kind)).astype(np.float64) for word in operands)
    exact = a * b + c[0] if name.startswith("fma.rn.") else a + b
    # Every code is exact: nothing was rounded.
    assert np.array_equal(exact.astype(kind).astype(np.float64), exact)
    return exact.astype(kind).view(np.uint32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("codes", ["int8", "uint8"])
def test_every_code_becomes_its_number(monkeypatch, codes, dtype):
    storage, written = formats.of(codes), []

    def one(assembly, *, args, **options):
        written.append(assembly)
        return args

    monkeypatch.setattr(ptx.plgpu, "elementwise_inline_asm", one)
    ptx.values(jnp.zeros(2, jnp.int32), storage.assembly[dtype], dtype)
    assert len(written) == 4
    # NaN is never stored.
    stored = CODES if codes == "int8" else CODES[(CODES & 0x7F) != 0x7F]
    want = np.asarray(storage.widen(jnp.asarray(stored, jnp.uint8).view(codes)), np.float64)
    other = np.roll(stored, 1)
    for place, assembly in enumerate(written):
        # The other bytes of the words are the worst there are.
        around = np.uint32(0xFFFFFFFF) ^ np.uint32(0xFF << 8 * place)
        words = [(around | (one << np.uint32(8 * place))).astype(np.uint32) for one in (stored, other)]
        got = followed(assembly, *words).view(jnp.dtype(dtype)).reshape(-1, 2).astype(np.float64)
        np.testing.assert_array_equal(got, np.stack([want, np.roll(want, 1)], axis=1))


def test_what_has_no_assembly_is_known():
    assert (
        "float32" not in formats.named("int8").assembly and "bfloat16" not in formats.named("int4").assembly
    )
