"""Reading optimized HLO: which instructions write a new buffer, and what each was traced as."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

_ELEMENT_BYTES = {"pred": 1, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
# These name, group or pass on buffers that others wrote.
_PASS_ON = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all"),
    *("while", "conditional", "call", "copy-done", "async-update", "async-done"),
}
_UPDATES = ("dynamic-update-slice", "scatter")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_KERNEL_NAME = re.compile(r', name = "(\w+)", num_stages')
_MODULE = re.compile(r"HloModule ([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line of HLO. `rest` is what follows the opening parenthesis."""

    is_root: bool
    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands, in order."""
        return _OPERAND.findall(self.rest.split("), ")[0])


Computation = dict[str, Instruction]


def copies_of(hlo: str, shapes: Collection[tuple[int, ...]]) -> Iterator[str]:
    """The lines of instructions that copy an array of one of these shapes."""
    for body in _parse(hlo).values():
        for instruction in body.values():
            found = [_dims(shape) for _, shape in _ARRAY.findall(instruction.shape)]
            if instruction.opcode in ("copy", "copy-start") and not set(found).isdisjoint(shapes):
                yield f"{instruction.name} = {instruction.shape} {instruction.opcode}({instruction.rest}"


def new_buffers(hlo: str, at_least: int) -> Iterator[str]:
    """Instructions that write a new buffer of `at_least` bytes, as `opcode dtype[shape]`.

    An update (`dynamic-update-slice`, `scatter`) of a buffer writes into it: where that is not
    allowed the compiler has put a `copy` before it. A fusion that returns nothing but updates of its
    parameters does the same, and so does a custom call that says which outputs are its operands.

    Args:
      hlo: text of an optimized module.
      at_least: bytes; smaller buffers are passed over.
    """
    computations = _parse(hlo)
    fused = {name for body in computations.values() for i in body.values() for name in _fused(i)}
    for name, body in computations.items():
        if name in fused:
            continue
        for instruction in body.values():
            if instruction.opcode in _PASS_ON or _in_place(instruction, computations):
                continue
            for dtype, shape in _ARRAY.findall(instruction.shape):
                if _size(dtype, shape) >= at_least:
                    yield f"{instruction.opcode} {dtype}[{shape}]"


def launches(hlo: str) -> Iterator[str]:
    """What the entry computation launches on the device: names of Pallas kernels, opcodes of the rest."""
    entry = hlo[hlo.index("\nENTRY ") + 1 :]
    for instruction in next(iter(_parse(entry).values())).values():
        if instruction.opcode == "custom-call" and (name := _KERNEL_NAME.search(instruction.rest)):
            yield name[1]
        elif instruction.opcode not in _PASS_ON:
            yield instruction.opcode


@dataclass(frozen=True, slots=True)
class Kernels:
    """The instructions of a module that run as kernels, by name, and what they were traced as.

    Attributes:
      module: its name.
      op_names: of each instruction the scopes and the primitive; of a fusion, those of its result.
      op_names_inside: of a fusion, those of all it computes; of others, their own.
      by_kernel: instructions by the name that their kernel may have.
    """

    module: str
    op_names: Mapping[str, str | None]
    op_names_inside: Mapping[str, frozenset[str]]
    by_kernel: Mapping[str, str]

    @classmethod
    def of(cls, hlo: str) -> "Kernels":
        """Reads the text of an optimized module."""
        computations = _parse(hlo)
        own: dict[str, str | None] = {}
        inside: dict[str, frozenset[str]] = {}
        by_kernel: dict[str, str] = {}
        for body in computations.values():
            for name, instruction in body.items():
                named = [_op_name(instruction), *_fused_op_names(instruction, computations)]
                own[name] = next((op_name for op_name in named if op_name), None)
                inside[name] = frozenset(op_name for op_name in named[1:] or named if op_name)
                by_kernel[name.replace(".", "_").replace("-", "_")] = name
        # A Pallas kernel is called by its own name, whatever the instruction's: all of one name are alike.
        for body in computations.values():
            for name, instruction in body.items():
                if kernel := _KERNEL_NAME.search(instruction.rest):
                    by_kernel[kernel[1]] = name
        found = _MODULE.search(hlo)
        return cls(found[1] if found else "", own, inside, by_kernel)

    def find(self, hlo_op: str | None, kernel: str) -> str | None:
        """The instruction of a profiler's event, by what it says of it or by the kernel's name."""
        if hlo_op in self.op_names:
            return hlo_op
        return self.by_kernel.get(kernel)


def _op_name(instruction: Instruction) -> str | None:
    found = _OP_NAME.search(instruction.rest)
    return found[1] if found else None


def _fused_op_names(instruction: Instruction, computations: dict[str, Computation]) -> list[str | None]:
    """Of all that a fusion computes, its result first."""
    bodies = [computations[name] for name in _fused(instruction)]
    within = sorted((i for body in bodies for i in body.values()), key=lambda i: not i.is_root)
    return [_op_name(i) for i in within if i.opcode not in _PASS_ON or i.is_root]


def _parse(hlo: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    body: Computation = {}
    for line in hlo.splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = match.groups()
            body[name] = Instruction(bool(root), name, shape, opcode, rest)
        elif match := _COMPUTATION.match(line):
            body = computations[match[1]] = {}
    return computations


def _fused(instruction: Instruction) -> list[str]:
    return _FUSED.findall(instruction.rest) if instruction.opcode == "fusion" else []


def _in_place(instruction: Instruction, computations: dict[str, Computation]) -> bool:
    if instruction.opcode == "custom-call":
        return "output_to_operand_aliasing" in instruction.rest
    if instruction.opcode in _UPDATES:
        return True
    return any(_only_updates(computations[name]) for name in _fused(instruction))


def _only_updates(body: Computation) -> bool:
    (root,) = (i for i in body.values() if i.is_root)
    results = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return all(_updates_a_parameter(result, body) for result in results)


def _updates_a_parameter(instruction: Instruction, body: Computation) -> bool:
    instruction = _behind_bitcasts(instruction, body)
    if instruction.opcode not in _UPDATES:
        return False
    # A scatter into several arrays names them first; each is a buffer of its own.
    updated = _behind_bitcasts(body[instruction.operands[0]], body)
    return updated.opcode == "parameter" or _updates_a_parameter(updated, body)


def _behind_bitcasts(instruction: Instruction, body: Computation) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction


def _size(dtype: str, shape: str) -> int:
    return prod(_dims(shape)) * _ELEMENT_BYTES.get(dtype, 1)


def _dims(shape: str) -> tuple[int, ...]:
    return tuple(int(size) for size in shape.split(",") if size)
