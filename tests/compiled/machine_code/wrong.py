"""Kernels that are wrong on purpose: each must miss the one requirement that it has."""

from dataclasses import replace
from unittest import mock

from pallas_kernels.paged_attention.triton import rows as attention_rows
from tests.compiled.machine_code.kernel import Kernel, attention, copy


class Swapped(attention_rows.Rows):
    """Neighbours in a row are exchanged: the right values, two bytes at a time."""

    def __init__(self, *arguments, **geometry):
        super().__init__(*arguments, **geometry)
        self.layout = replace(self.layout, word=self.layout.word ^ 1)
        self.dims = [dims ^ len(self.dims) for dims in self.dims]


def wrong_kernels() -> list[Kernel]:
    """All of them."""
    return [
        _swapped(attention("narrow loads", requirements=("wide loads",))),
        _swapped(
            attention("narrow loads of int8", requirements=("wide loads",), dtype="int8", q_dtype="bfloat16")
        ),
        attention("one tile at a time", requirements=("in flight",), retuned={"num_stages": 1}),
        attention("too few threads", requirements=("spills",), retuned={"key_tile": 256, "num_warps": 1}),
        attention(
            "too many stages", requirements=("shared memory",), retuned={"key_tile": 256, "num_stages": 5}
        ),
        replace(copy("no matrix product", dtype="float32", page_size=16), requirements=frozenset({"matrix"})),
    ]


def _swapped(right: Kernel) -> Kernel:
    def call(device, *arrays):
        with mock.patch.object(attention_rows, "Rows", Swapped):
            return right.call(device, *arrays)

    return replace(right, call=call)
