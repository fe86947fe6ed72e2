"""What a training step needs on a machine that isn't here, and how fast it can be.

    python -m patchwave_jax.plan --config=configs/ctx1m.py:dense --topology=v5e:4x4

compiles the programs of the step that `train` runs for the machine's devices and reads off
what they need. Every field of the configuration can be set as for `train`. Every number is of one
device and of one optimizer step, unless it says otherwise. Times are what the chip's public peaks
allow at best (`patchwave_jax/planning/hardware.py`): no step will be faster, and real ones are
slower.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from patchwave_jax.config import Config
from patchwave_jax.errors import UserError, check_output, exits_cleanly
from patchwave_jax.flags import argument_parser, parse
from patchwave_jax.planning import hardware
from patchwave_jax.planning.aot_compile import (
    DoesNotFitError,
    Program,
    compile_programs,
    memory_by_kind,
    roofline,
)
from patchwave_jax.planning.hardware import GIB
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.runtime.storage import write_atomically
from patchwave_jax.training.step import make_step

MOST_ROWS = 4096  # that `--fit` tries


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs, and its lower bounds."""

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    rows_at_once: int  # on each device, or group of devices that shares rows
    phase_chunk: int | None
    encode_chunk_patches: int | None
    targets_per_step: int
    memory_bytes: dict[str, int]  # by kind
    has_bytes: float | None
    useful_flops: float | None  # not counted for a baseline
    flops: float
    bytes: float
    collectives: list[dict[str, Any]]
    programs: list[Program]
    seconds: dict[str, float] | None  # by bound; `step` is the whole step's
    bound: str | None
    targets_per_second: float | None
    run_hours: float | None


def plan(config: Config, topology: str, name: str = "") -> Plan:
    """Compiles the step of `config` for `topology` and counts its costs.

    Raises:
      DoesNotFitError: if a device has too little memory.
      UserError: if the machine is unknown, its compiler is missing, or the batch can't be split.
    """
    chip, devices = hardware.machine(topology)
    step = make_step(config, make_mesh(config.run.context_devices, devices))
    programs = compile_programs(step)
    memory = memory_by_kind(step, programs)
    has = chip and chip.memory_bytes * chip.usable
    if has and sum(memory.values()) > has:
        raise DoesNotFitError(sum(memory.values()), has)
    collectives = [
        {"program": p.name, **dataclasses.asdict(c), "times": c.times * p.times}
        for p in programs
        for c in p.counts.collectives
    ]
    targets = config.targets_per_step
    rows_each = config.train.batch_size / len(devices)
    useful = config.model.useful_flops(config.context_samples, config.causal)
    seconds = roofline(chip, programs, config.model.compute_dtype) if chip else None
    return Plan(
        config=name,
        topology=topology,
        devices=len(devices),
        mesh=dict(step.mesh.shape),
        batch_size=config.train.batch_size,
        rows_at_once=step.micro.rows_each,
        phase_chunk=step.execution.phase_chunk,
        encode_chunk_patches=step.execution.encode_chunk_patches,
        targets_per_step=targets,
        memory_bytes=memory,
        has_bytes=has,
        useful_flops=useful and useful * rows_each,
        flops=sum(p.times * p.counts.flops for p in programs),
        bytes=sum(p.times * p.counts.bytes for p in programs),
        collectives=collectives,
        programs=programs,
        seconds=seconds,
        bound=max(list(seconds)[:-1], key=seconds.__getitem__) if seconds else None,
        targets_per_second=targets / seconds["step"] if seconds else None,
        run_hours=config.train.num_steps * seconds["step"] / 3600 if seconds else None,
    )


def fit(
    config: Config, topology: str, name: str, say: Callable[[str], None]
) -> tuple[Config, Plan]:
    """The largest batch that the devices can compute at once, by bisection, and its plan.

    A step may have a larger batch, in micro-batches of that size.

    Raises:
      DoesNotFitError: if one row per device is too much.
    """
    groups = len(hardware.machine(topology)[1]) // config.run.context_devices

    def attempt(rows: int) -> tuple[Config, Plan]:
        sized = dataclasses.replace(config.train, batch_size=rows * groups, micro_batch_size=rows)
        tried = dataclasses.replace(config, train=sized)
        try:
            found = plan(tried, topology, name)
        except DoesNotFitError as error:
            say(f"{rows} rows on each device: {error}")
            raise
        say(f"{rows} rows on each device: fits")
        return tried, found

    best, good, bad = attempt(1), 1, MOST_ROWS + 1
    while bad - good > 1:
        rows = min(2 * good, bad - 1) if bad > MOST_ROWS else (good + bad) // 2
        try:
            best, good = attempt(rows), rows
        except DoesNotFitError:
            bad = rows
    return best


def remedy(config: Config) -> str:
    """What to try when memory is too small."""
    tries = []
    if config.train.micro_batch_size != 1:
        tries.append("--config.train.micro_batch_size=1")
    if config.model.shared_axes(config.context_samples, config.causal):
        tries.append("smaller --config.run.phase_chunk and --config.run.encode_chunk_patches")
        tries.append(f"--config.run.context_devices={2 * config.run.context_devices}")
    if config.model.compute_dtype == "float32":
        tries.append("--config.model.compute_dtype=bfloat16")
    return ", ".join(tries) or "a chip with more memory"


def table(found: Plan) -> str:
    """The plan as text."""

    def gib(size: float) -> str:
        return f"{size / GIB:.2f}"

    chip = hardware.CHIPS.get(re.split("[:-]", found.topology)[0])
    has = f" of {gib(found.has_bytes)}" if found.has_bytes else ""
    count = found.batch_size // (found.rows_at_once * found.mesh["data"])
    mesh = " x ".join(f"{name} {size}" for name, size in found.mesh.items())
    useful, chunks = "", ""
    if found.useful_flops:  # else it is a baseline
        useful = f"useful {found.useful_flops:.4g}, "
        chunks = f", {found.phase_chunk} phases and {found.encode_chunk_patches} patches at a time"
    lines = [
        f"{found.config} on {found.topology}: {found.devices} devices, mesh {mesh}",
        f"batch {found.batch_size}: {count} micro-batches of {found.rows_at_once} rows at once"
        + chunks,
        f"memory: {gib(sum(found.memory_bytes.values()))}{has} GiB",
        *(f"  {kind:14} {gib(size):>8}" for kind, size in found.memory_bytes.items()),
        f"FLOPs: {useful}compiled {found.flops:.4g}",
        f"bytes of memory moved: {found.bytes:.4g}",
    ]
    for c in found.collectives:
        lines.append(
            f"{c['kind']} in {c['program']}: {c['times']} x {c['bytes_each']:,} bytes "
            f"between {c['group']} devices"
        )
    if loops := sum(p.counts.unknown_loops for p in found.programs):
        lines.append(
            f"{loops} loops of unknown length are counted once: the true numbers are higher"
        )
    compiled = ", ".join(f"{p.name} {p.compile_seconds} s" for p in found.programs)
    lines.append(f"compiled here in: {compiled}")
    if found.seconds and chip:
        bounds = ", ".join(f"{k} {v:.4g} s" for k, v in found.seconds.items() if k != "step")
        lines += [
            f"at {chip.name}'s peaks ({chip.source}): {bounds}",
            f"at best {found.seconds['step']:.4g} s a step, bound by {found.bound}: "
            f"{found.targets_per_second:,.0f} targets a second, "
            f"{found.run_hours:.3g} hours for the whole run",
        ]
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """`argv` holds the flags only, as for the other commands."""
    parser = argument_parser("plan", __doc__, allow_abbrev=False)
    parser.add_argument("--config", help="as for train: configs/ctx128k.py:dense, and its fields")
    parser.add_argument("--topology", help="v5e-16, v5e:4x4, v5p-128, a100:4, h100:8, cpu:8 ...")
    parser.add_argument("--fit", action="store_true", help="find the largest batch that fits")
    parser.add_argument("--json", type=Path, help="write all that was found there")
    parser.add_argument("--overwrite", action="store_true", help="replace --json if it exists")
    args, rest = parser.parse_known_args(argv)
    if not args.topology:
        raise UserError("--topology is missing: the machine to plan for, such as v5e-16")
    check_output(args.json, args.overwrite)
    given = [f"--config={args.config}"] if args.config else []
    config = parse([sys.argv[0], *given, *rest], __doc__).config
    jax.config.update("jax_platforms", "cpu")  # no device here is used, only compilers
    name = " ".join([str(args.config), *(x.removeprefix("--config.") for x in rest)])
    try:
        if args.fit:
            config, found = fit(config, args.topology, name, lambda x: print(x, flush=True))
        else:
            found = plan(config, args.topology, name)
    except DoesNotFitError as error:
        print(f"{name} on {args.topology}: does not fit: {error}: try {remedy(config)}")
        if args.json:
            short = {"config": name, "topology": args.topology, "needs_bytes": error.needs}
            content = {**short, "has_bytes": error.has}
            write_atomically(args.json, json.dumps(content, indent=1) + "\n")
        return
    print(table(found))
    if args.json:
        write_atomically(args.json, json.dumps(dataclasses.asdict(found), indent=1) + "\n")


if __name__ == "__main__":
    main()
