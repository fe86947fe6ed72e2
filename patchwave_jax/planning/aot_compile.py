"""The programs of a step, compiled ahead of time, and what they need on one device."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from patchwave_jax.planning import hlo_cost
from patchwave_jax.planning.hardware import GIB, Chip
from patchwave_jax.runtime.mesh import by_rows, replicated
from patchwave_jax.training.step import Step


class DoesNotFitError(Exception):
    """A program needs more memory than a device has."""

    def __init__(self, needs: float, has: float):
        self.needs, self.has = needs, has
        super().__init__(f"needs {needs / GIB:.1f} of {has / GIB:.1f} GiB")


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program, of one device and one run of it."""

    name: str
    times: int  # in one step
    compile_seconds: float
    arguments: int  # bytes, as are the next three
    outputs: int  # that do not reuse an argument
    temporaries: int
    code: int
    counts: hlo_cost.Counts
    xla_flops: float | None  # from XLA's cost analysis, which counts loops once


def compile_programs(step: Step) -> list[Program]:
    """`accumulate` and `apply`, compiled ahead of time for the devices of the step's mesh."""
    state, config = step.abstract_state, step.config
    rows, count, everywhere = step.micro.rows, step.micro.count, replicated(step.mesh)
    zero = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
    total = (zero, state["params"])
    codes = jax.ShapeDtypeStruct(
        (rows, config.window_samples // config.segments), jnp.uint8, sharding=by_rows(step.mesh)
    )
    carry = state.get("carry", ())
    arguments = total, state["params"], carry, codes, state["step"], 0
    return [
        compile_one("accumulate", count, step.accumulate, *arguments),
        compile_one("apply", 1, step.apply, state, total, carry),
    ]


def compile_one(name: str, times: int, function: Any, *args: Any) -> Program:
    """Compiles a jitted function for abstract arguments whose shardings name the devices.

    Raises:
      DoesNotFitError: if the compiler reports it.
    """
    lowered = function.lower(*args)
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.findall(r"\b([\d.]+)([KMGT])\b", str(error).splitlines()[0])
        if "RESOURCE_EXHAUSTED" not in str(error) or len(sizes) < 2:
            raise
        units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        needs, has = (float(number) * units[unit] for number, unit in sizes[:2])
        raise DoesNotFitError(needs, has) from error
    seconds = time.monotonic() - start
    held, costs = compiled.memory_analysis(), compiled.cost_analysis()
    assert held is not None
    return Program(
        name=name,
        times=times,
        compile_seconds=round(seconds, 1),
        arguments=held.argument_size_in_bytes,
        outputs=held.output_size_in_bytes - held.alias_size_in_bytes,
        temporaries=held.temp_size_in_bytes,
        code=held.generated_code_size_in_bytes,
        counts=hlo_cost.count(compiled.as_text()),
        xla_flops=costs.get("flops") if costs else None,
    )


def memory_by_kind(step: Step, programs: list[Program]) -> dict[str, int]:
    """Bytes on one device while the program that needs the most runs."""
    state = step.abstract_state
    parameters, moments = held_bytes(state["params"]), held_bytes(state["opt_state"])
    resident = {"accumulate": moments, "apply": 0}  # in memory besides the arguments
    largest = max(
        programs, key=lambda p: resident[p.name] + p.arguments + p.outputs + p.temporaries
    )
    rest = resident[largest.name] + largest.arguments - 2 * parameters - moments
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": moments,
        "codes, padding": max(0, rest + largest.outputs),
        "temporaries": largest.temporaries,
        "programs": sum(p.code for p in programs),
    }


def held_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded arrays, abstract or real."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def roofline(chip: Chip, programs: list[Program], dtype: str) -> dict[str, float]:
    """Lower bounds of a step's seconds, by resource; `step` is that of the whole step.

    A ring moves the bytes of an all-reduce out of a device twice and those of other collectives
    once, less the device's own share. In each program computation, memory and network overlap at
    best.
    """
    twice = {"all-reduce": 2.0}
    total: dict[str, float] = {"computation": 0.0, "memory": 0.0, "network": 0.0, "step": 0.0}
    for p in programs:
        sent = sum(
            c.times * c.bytes_each * twice.get(c.kind, 1.0) * (c.group - 1) / c.group
            for c in p.counts.collectives
        )
        bounds = {
            "computation": p.counts.flops / chip.flops[dtype],
            "memory": p.counts.bytes / chip.memory_bandwidth,
            "network": sent / chip.link_bandwidth,
        }
        bounds["step"] = max(bounds.values())
        for name, seconds in bounds.items():
            total[name] += p.times * seconds
    return total
