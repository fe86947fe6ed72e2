"""Recorded runs: the validation bits to expect after each number of steps.

    python -m patchwave_jax.expected                             # tables of all records
    python -m patchwave_jax.expected --workdir=DIR --name=demo   # records a run

Records are part of the package, in `expected_runs/NAME.json`. A run is compared with a record if
network, recipe, data and manifest are the same.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np

import patchwave_jax
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.flags import argument_parser
from patchwave_jax.runtime.storage import write_atomically
from patchwave_jax.runtime.workdir import Workdir

FOLDER = "expected_runs"
ROWS = 8  # of the table for each run, at most
TOLERANCE_BITS = 0.05  # runs of one recipe on different machines differ by less


@dataclasses.dataclass(frozen=True)
class Expected:
    """A recorded run with its validations in order."""

    name: str
    hardware: str
    code_version: str
    manifest_hash: str
    config: dict[str, Any]  # see `fingerprint`
    steps: tuple[int, ...]
    minutes: tuple[float, ...]
    validation_bits: tuple[float, ...]
    quantiser: str

    def at(self, step: int) -> float | None:
        """Bits after `step`, interpolated linearly between validations."""
        if not self.steps[0] <= step <= self.steps[-1]:
            return None
        return float(np.interp(step, self.steps, self.validation_bits))


def fingerprint(config: Config) -> dict[str, Any]:
    """All of a configuration that determines the loss curve."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    del tree["run"], tree["data"]["data_dir"], tree["train"]["micro_batch_size"]
    return tree


def history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of metrics.jsonl by their kind."""
    path, rows = folder / "metrics.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows.setdefault(row["kind"], []).append(row)
        except (ValueError, KeyError):  # truncated by a kill
            continue
    return rows


def this_machine() -> str:
    """The devices that JAX uses here."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"{os.cpu_count()} CPU cores"
    return f"{jax.device_count()} x {device.device_kind}"


def record(workdir: str | os.PathLike[str], name: str) -> Expected:
    """The record of the run in `workdir`.

    Raises:
      UserError: if it holds no checkpoints or was never validated.
    """
    with Checkpoints(workdir) as checkpoints:
        stored = checkpoints.record(checkpoints.choose(None))
    with Workdir(workdir) as files:
        rows = history(files.folder).get("validation")
    if not rows:
        raise UserError(
            f"{workdir}/metrics.jsonl holds no validation; train with a lower run.eval_every_steps"
        )
    return Expected(
        name=name,
        hardware=this_machine(),
        code_version=patchwave_jax.__version__,
        manifest_hash=stored.manifest_hash,
        config=fingerprint(stored.config),
        steps=tuple(row["step"] for row in rows),
        minutes=tuple(round(row["minutes"], 2) for row in rows),
        validation_bits=tuple(round(row["nll_bits"], 4) for row in rows),
        quantiser=stored.config.data.quantiser,
    )


def records(folder: Path | None = None) -> list[Expected]:
    """All records that come with the package, by name."""
    place = folder or resources.files("patchwave_jax") / FOLDER
    if not place.is_dir():
        return []
    files = sorted((f for f in place.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    found = []
    for file in files:
        fields = json.loads(file.read_text())
        for name in ("steps", "minutes", "validation_bits"):
            fields[name] = tuple(fields[name])
        found.append(Expected(**fields))
    return found


def matching(
    config: Config, manifest_hash: str, known: Sequence[Expected] | None = None
) -> Expected | None:
    """The record of a run with this configuration on this data, if there is one."""
    for expected in records() if known is None else known:
        if expected.manifest_hash == manifest_hash and expected.config == fingerprint(config):
            return expected
    return None


def compare(expected: Expected, step: int, bits: float) -> str | None:
    """One sentence that compares a validation with the record; None if it has no such step."""
    known = expected.at(step)
    if known is None:
        return None
    words = f"expected after step {step}: {known:.4f} bits ({expected.name})"
    if abs(bits - known) <= TOLERANCE_BITS:
        return f"{words}; this run is on track with {bits:.4f}"
    worse = bits > known
    return (
        f"{words}; this run has {bits:.4f}, {abs(bits - known):.2f} bits "
        f"{'WORSE: something is different' if worse else 'better'}"
    )


def table(expected: Expected) -> str:
    """Markdown: validation bits by step and minutes, and all that they depend on."""
    config, count = expected.config, len(expected.steps)
    lines = [
        f"**{expected.name}**: {config['data']['dataset']}, objective {config['objective']}, "
        f"quantiser {expected.quantiser}, context up to {config['context_samples']:,} samples; "
        f"{expected.hardware}",
        "",
        "| step | minutes | validation, bits per sample |",
        "|--:|--:|--:|",
    ]
    chosen = sorted({round(i * (count - 1) / (ROWS - 1)) for i in range(ROWS)})
    for i in chosen:
        lines.append(
            f"| {expected.steps[i]:,} | {expected.minutes[i]:.1f} "
            f"| {expected.validation_bits[i]:.3f} |"
        )
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Records a run, or prints the tables of all records."""
    parser = argument_parser("expected", __doc__)
    parser.add_argument("--workdir", help="a finished run to record")
    parser.add_argument("--name", help="name of the record")
    parser.add_argument("--hardware", help="what it was trained on; default: this machine")
    parser.add_argument("--out", type=Path, help="folder of records; default: the package's")
    parser.add_argument("--overwrite", action="store_true", help="replace a record")
    args = parser.parse_args(argv)
    folder = args.out or Path(str(resources.files("patchwave_jax") / FOLDER))
    if args.workdir is None:
        print("\n\n".join(map(table, records(args.out))) or "no records yet")
        return
    if not args.name:
        raise UserError("--name is missing: what the record is called")
    path = folder / f"{args.name}.json"
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists; give --overwrite to replace it, or another --name")
    made = record(args.workdir, args.name)
    if args.hardware:
        made = dataclasses.replace(made, hardware=args.hardware)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dataclasses.asdict(made), indent=1) + "\n")
    print(f"wrote {path}\n\n{table(made)}")


if __name__ == "__main__":
    main()
