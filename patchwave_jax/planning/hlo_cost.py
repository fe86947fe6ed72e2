"""The cost of a compiled program, counted from its text: FLOPs, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and returns nothing
for an absent GPU. Here a loop's body counts as often as the loop runs, where the text says so
(`lax.scan` and `fori_loop`), and every number is for one device.

FLOPs are those of matrix products and convolutions, without products with padding. Bytes are those
that instructions read and write in main memory: a fusion counts as one instruction, and a TPU's
on-chip memory (marked S(1) and up) does not count.
"""

import dataclasses
import math
import re
from collections import Counter
from typing import Any

import numpy as np

from patchwave_jax.planning.hlo_text import (
    Computation,
    Instruction,
    attribute,
    called,
    operand_shapes,
    parse,
    size,
)

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between devices."""

    kind: str
    bytes_each: int  # of one device's operands; of an all-gather's result
    group: int  # participating devices
    times: int  # in one run of the program


@dataclasses.dataclass
class Counts:
    """Costs on one device, in one run of the program."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0  # loops of unknown length, counted once


def count(text: str) -> Counts:
    """The counts of a compiled module's text (`compiled.as_text()`)."""
    entry, computations = parse(text)
    counts, seen = Counts(), Counter()
    _walk(computations, entry, 1, counts, seen)
    counts.collectives = tuple(
        Collective(kind, held, group, times) for (kind, held, group), times in seen.items()
    )
    return counts


def _walk(
    computations: dict[str, Computation], name: str, times: int, counts: Counts, seen: Counter
) -> None:
    computation = computations[name]
    for i in computation.values():
        if i.opcode == "while":
            trips = _trips(computations, computation, i)
            counts.unknown_loops += trips is None
            for part in ("body", "condition"):
                part_name = attribute(i.rest, part)
                _walk(
                    computations, part_name, times * (1 if trips is None else trips), counts, seen
                )
        elif i.opcode in ("call", "conditional", "async-start"):
            for name in called(i.rest):
                _walk(computations, name, times, counts, seen)
        elif i.opcode == "fusion":
            for inner in _inside(computations, attribute(i.rest, "calls")):
                counts.flops += times * _flops(*inner)
        else:
            counts.flops += times * _flops(i, computation)
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            held = size(operand_shapes(i, computation), main=False)
            if kind == "all-gather":
                held = size(i.shapes, main=False) - (held if i.opcode != kind else 0)
            seen[kind, held, _group(i.rest)] += times
        counts.bytes += times * _traffic(computations, computation, i)


def _inside(computations: dict[str, Computation], fusion: str) -> list[tuple[Any, Computation]]:
    """All instructions of a fusion, with the computation each is in."""
    found = []
    for i in computations[fusion].values():
        found.append((i, computations[fusion]))
        if i.opcode in ("fusion", "call"):
            found += [x for name in called(i.rest) for x in _inside(computations, name)]
    return found


def _trips(
    computations: dict[str, Computation], computation: Computation, loop: Instruction
) -> int | None:
    if known := re.search(r'known_trip_count"?[:=]\s*\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations[attribute(loop.rest, "condition")]
    root = next(i for i in condition.values() if i.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    left, right = (condition[name] for name in root.operands)
    if left.opcode != "get-tuple-element" or right.opcode != "constant":
        return None
    # A loop not made by `scan` may start at another index than 0.
    index = int(re.search(r"index=(\d+)", left.rest)[1])  # pyright: ignore
    first = computation[computation[loop.operands[0]].operands[index]]
    while first.opcode in ("copy", "bitcast"):
        first = computation[first.operands[0]]
    begin = int(first.text) if first.opcode == "constant" else 0
    return max(0, int(right.text) - begin)


def _group(rest: str) -> int:
    """The number of devices in a group, from any notation of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(tiled[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        return pairs[1].count("{")
    return 1


# FLOPs.


def _flops(i: Instruction, computation: Computation) -> float:
    operands = [computation[name].shapes[0][1] for name in i.operands[:2] if name in computation]
    target = re.search(r'custom_call_target="([^"]*)"', i.rest)
    gemm = bool(target) and "cublas" in target[1]
    if i.opcode == "dot" or gemm:
        dims = re.search(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]([\d,"]*)', i.rest)
        contracted = re.findall(r"\d+", dims[1]) if dims else []
        out = math.prod(i.shapes[0][1])
        return 2.0 * out * math.prod(operands[0][int(d)] for d in contracted)
    conv = bool(target) and "__cudnn$conv" in target[1]
    if i.opcode != "convolution" and not conv:
        return 0.0
    result = i.shapes[0][1]
    if target and "BackwardInput" in target[1]:
        image, kernel, out = result, operands[1], operands[0]
    elif target and "BackwardFilter" in target[1]:
        image, kernel, out = operands[0], result, operands[1]
    else:
        image, kernel, out = operands[0], operands[1], result
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)
    assert labels, i.rest
    total = 2.0 * kernel[labels[2].index("i")]
    total *= out[labels[3].index("b")] * out[labels[3].index("f")]
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    fields = dict(x.split("=") for x in window[1].split()) if window else {}
    for d in range(len(labels[1]) - 2):
        sizes = (image[labels[1].index(str(d))], out[labels[3].index(str(d))])
        total *= _positions(*sizes, kernel[labels[2].index(str(d))], fields, d)
    return total


def _positions(image: int, out: int, kernel: int, window: dict[str, str], d: int) -> int:
    """Pairs of an output and a kernel element that meet a real input element, along one axis."""

    def field(name: str, default: int) -> int:
        return int(window[name].split("x")[d].split("_")[0]) if name in window else default

    stride, lhs, rhs = field("stride", 1), field("lhs_dilate", 1), field("rhs_dilate", 1)
    begin = field("pad", 0)
    steps = {"out": (out, stride), "kernel": (kernel, rhs)}
    few, many = sorted(steps.values())
    places = np.arange(many[0], dtype=np.int64) * many[1] - begin
    total = 0
    for k in range(few[0]):
        at = places + k * few[1]
        total += int(np.sum((at >= 0) & (at % lhs == 0) & (at // lhs < image)))
    return total


# Bytes.


def _traffic(
    computations: dict[str, Computation], computation: Computation, i: Instruction
) -> float:
    if i.opcode in _FREE or i.opcode.endswith("-done") or i.opcode == "async-update":
        return 0
    inputs = operand_shapes(i, computation)
    if i.opcode.endswith("-start"):
        return size(inputs) + size(i.shapes[:1])
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * size(i.shapes)
    if i.opcode == "dynamic-update-slice":
        return 2 * size(inputs[1:2])
    if i.opcode != "fusion":
        return size(inputs) + size(i.shapes)
    inner = computations[attribute(i.rest, "calls")]
    total = 0
    for index, name in enumerate(i.operands):
        if name not in computation:
            continue
        held = computation[name].shapes
        users = _users(inner, index)
        if users and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in users):
            marked = held[0][2]
            total += marked * sum(size(u.shapes, main=False) for u in users)
        elif not (users and all(_updates(u, inner, index) for u in users)):
            total += size(held)
    root = next(x for x in inner.values() if x.root)
    roots = [inner[n] for n in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(i.shapes):
        return total + size(i.shapes)
    for x, shape in zip(roots, i.shapes, strict=True):
        while x.opcode in ("bitcast", "copy"):
            x = inner[x.operands[0]]
        if x.opcode == "dynamic-update-slice":
            total += shape[2] * size(inner[x.operands[1]].shapes[:1], main=False)
        else:
            total += size([shape])
    return total


def _users(inner: Computation, index: int) -> list[Instruction]:
    """The instructions that read a fusion's parameter, through bitcasts."""
    names = {x.name for x in inner.values() if x.opcode == "parameter" and x.text == str(index)}
    users = []
    for x in inner.values():  # in order: operands come first
        if names & set(x.operands):
            if x.opcode == "bitcast":
                names.add(x.name)
            else:
                users.append(x)
    return users


def _updates(user: Instruction, inner: Computation, index: int) -> bool:
    """Whether `user` only writes a slice into the parameter, in place."""
    if user.opcode != "dynamic-update-slice":
        return False
    x = inner[user.operands[0]]
    while x.opcode == "bitcast":
        x = inner[x.operands[0]]
    return x.opcode == "parameter" and x.text == str(index)
