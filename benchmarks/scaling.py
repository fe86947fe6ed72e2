"""The planner's tables for `docs/scaling.md`: `python -m benchmarks.scaling --table=machines`.

Each row is a plan (`python -m patchwave_jax.plan`), made in a process of its own where `--out`
does not hold it yet, and printed from what is there. `--machines` makes only those.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONTEXTS = ("ctx128k", "ctx512k", "ctx1m")
BASELINES = {"wavenet": 1, "samplernn": 32, "sashimi": 1}  # rows of each device
DEVICES = {"a100:4": 4, "v5e-16": 16, "v5p-128": 64, "v6e-256": 256}
Row = tuple[str, str, list[str]]  # configuration, machine, flags


def machines() -> list[Row]:
    """Every configuration on every machine: dense with a row for each device, last with 40 or so.

    A row of a million samples is shared by four devices. The baselines follow.
    """
    rows = []
    for machine, devices in DEVICES.items():
        for context in CONTEXTS:
            share = 4 if context == "ctx1m" else 1
            dense = [f"train.batch_size={devices // share}", f"run.context_devices={share}"]
            rows.append((f"{context}:dense", machine, dense))
            last = [f"train.batch_size={-(-40 // devices) * devices}"]
            rows.append((context, machine, last))
        for name, each in BASELINES.items():
            rows.append((name, machine, [f"train.batch_size={each * devices}"]))
    return rows


def weak() -> list[Row]:
    """A row for each device."""
    return [
        ("ctx128k:dense", f"v5e-{count}", [f"train.batch_size={count}"]) for count in (4, 16, 64)
    ]


def strong() -> list[Row]:
    """Four rows of a million samples on more and more devices."""
    return [
        (
            "ctx1m:dense",
            f"v5e-{4 * share}",
            ["train.batch_size=4", f"run.context_devices={share}"],
        )
        for share in (1, 2, 4)
    ]


TABLES = {"machines": machines, "weak": weak, "strong": strong}
HEADER = (
    "| configuration | machine | batch | mesh | GiB | TFLOP | GB moved | MB reduced "
    "| at best, ms a step | bound by | M targets a second | hours |\n"
    + "|---|---"
    + "|--:" * 10
    + "|"
)


def made(row: Row, folder: Path, wanted: list[str]) -> dict[str, Any] | None:
    """The plan of a row: what the folder holds, else made if its machine is wanted."""
    config, machine, flags = row
    path = folder / ("_".join([config, machine, *flags]).replace(":", "-") + ".json")
    if not path.exists() and (not wanted or machine in wanted):
        command = [sys.executable, "-m", "patchwave_jax.plan", f"--topology={machine}"]
        command += [
            f"--config=configs/{config.replace(':', '.py:') if ':' in config else config + '.py'}"
        ]
        command += [f"--config.{flag}" for flag in flags]
        subprocess.run([*command, f"--json={path}"], check=False, stdout=sys.stderr)
    return json.loads(path.read_text()) if path.exists() else None


def line(row: Row, plan: dict[str, Any] | None) -> str:
    config, machine, flags = row
    start = f"| {config} | {machine} | {flags[0].split('=')[1]} |"
    if plan is None:
        return f"{start} not compiled yet" + " |" * 9
    if "needs_bytes" in plan:
        needs, has = plan["needs_bytes"] / 2**30, plan["has_bytes"] / 2**30
        return f"{start} does not fit: needs {needs:.1f} of {has:.1f} GiB" + " |" * 9
    mesh = " x ".join(str(size) for size in plan["mesh"].values())
    reduced = sum(c["times"] * c["bytes_each"] for c in plan["collectives"])
    return (
        f"{start} {mesh} | {sum(plan['memory_bytes'].values()) / 2**30:.2f} "
        f"| {plan['flops'] / 1e12:.3g} | {plan['bytes'] / 1e9:.3g} | {reduced / 1e6:.3g} "
        f"| {1e3 * plan['seconds']['step']:.3g} | {plan['bound']} "
        f"| {plan['targets_per_second'] / 1e6:.3g} | {plan['run_hours']:.3g} |"
    )


def main() -> None:
    """Makes what is missing and prints a table."""
    parser = argparse.ArgumentParser("python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--table", choices=TABLES, default="machines")
    parser.add_argument("--out", type=Path, default=Path("runs/plans"), help="keeps the plans")
    parser.add_argument("--machines", nargs="*", default=[], help="make only plans for these")
    parser.add_argument("--configs", nargs="*", default=[], help="make only these; none: all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(HEADER)
    for row in TABLES[args.table]():
        wanted = args.machines if not args.configs or row[0] in args.configs else ["none"]
        print(line(row, made(row, args.out, wanted)), flush=True)


if __name__ == "__main__":
    main()
