"""A parser for the text of a compiled XLA program (`compiled.as_text()`)."""

import dataclasses
import math
import re
from collections.abc import Iterable

Shape = tuple[str, tuple[int, ...], bool]  # dtype, dimensions, whether in main memory

_BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str  # of the line, after the operands
    text: str  # of the operands
    root: bool


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    entry, computations, current = "", {}, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            root, name, rest = match.groups()
            end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
            start = rest.index("(", end)
            stop = _close(rest, start)
            operands = rest[start + 1 : stop - 1]
            current[name] = Instruction(
                name=name,
                opcode=rest[end:start].strip(),
                shapes=_shapes(rest[:end]),
                operands=tuple(re.findall(r"%([\w.-]+)", operands)),
                rest=rest[stop:],
                text=operands,
                root=bool(root),
            )
    return entry, computations


def _close(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place + 1
    raise ValueError(f"unbalanced: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        (kind, tuple(map(int, filter(None, dims.split(",")))), not re.search(r"S\([1-9]", layout))
        for kind, dims, layout in _SHAPE.findall(text)
    )


def attribute(rest: str, name: str) -> str:
    match = re.search(rf"\b{name}=%?([\w.-]+)", rest)
    return match[1] if match else ""


def called(rest: str) -> list[str]:
    names = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if names:
        return re.findall(r"%?([\w.-]+)", names[1])
    keys = ("to_apply", "calls", "true_computation", "false_computation")
    return [name for key in keys if (name := attribute(rest, key))]


def operand_shapes(i: Instruction, computation: Computation) -> list[Shape]:
    return [s for name in i.operands if name in computation for s in computation[name].shapes]


def size(shapes: Iterable[Shape], main: bool = True) -> int:
    """Bytes of `shapes`; with `main` only of those in main memory."""
    return sum(
        math.prod(dims) * _BYTES.get(kind, max(1, int(re.sub(r"\D.*", "", kind[1:]) or 8) // 8))
        for kind, dims, in_main in shapes
        if in_main or not main
    )
