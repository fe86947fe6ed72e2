"""What an accelerator computes, and how fast: `python -m benchmarks.accelerator --out=DIR`.

Every part runs in a process of its own under a time limit, its share of `--minutes`, the most
telling first. A part that crashes goes on after the case that crashed. Each case is one line of
DIR/PART.jsonl as soon as it is measured; a run into the same DIR replaces the cases that it
measures again and keeps the others, and finds the programs that are compiled already, which is what
a GPU spends most of the time on. The table is of all that is in DIR.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchwave_jax.errors import UserError, exits_cleanly

# Share of the time of each part, in the order in which they run.
PARTS = {
    "device": 2, "correctness": 5, "convolutions": 3, "predictors": 2, "steps": 8, "generation": 4,
    "pipeline": 1, "parity": 2,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
UNTIMED = ("correctness", "parity")
FAST_COMPILATION = "--xla_gpu_autotune_level=0"  # a GPU would try every algorithm


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The newest line of each case; a case without one crashed or was cut off."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        found.pop(row["case"], None)
        found[row["case"]] = row
    return found


def run_part(part: str, seconds: float, path: Path, small: bool) -> str:
    """Runs the cases of a part, and says how it ended."""
    environment = dict(os.environ)
    if part in UNTIMED:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"
    end, fresh = time.monotonic() + seconds, path.with_suffix(".new.jsonl")
    fresh.unlink(missing_ok=True)
    ended = "done"
    while True:
        begun = read(fresh)
        command = [sys.executable, "-m", "benchmarks.accelerator.part", part, str(fresh)]
        command += ["--small"] if small else []
        command += [f"--skip={name}" for name in begun]
        try:
            with path.with_suffix(".log").open("a") as log:
                left = max(1, end - time.monotonic())
                code = subprocess.run(
                    command, timeout=left, stdout=log, stderr=log, env=environment, cwd=ROOT
                ).returncode
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds:.0f} s"
            break
        if code == 0:
            break
        ended = f"a process ended with {code}"
        if len(read(fresh)) == len(begun):  # not even one more case
            break
    rows = read(path)
    rows |= {
        name: row for name, row in read(fresh).items() if name not in rows or "error" not in row
    }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    fresh.unlink(missing_ok=True)
    return ended


def table(folder: Path) -> Iterator[str]:
    """All that is in `folder`, as Markdown."""
    for part in PARTS:
        rows = list(read(folder / f"{part}.jsonl").values())
        if not rows:
            continue
        names = list(dict.fromkeys(name for row in rows for name in row))
        yield f"\n{part}\n"
        yield "| " + " | ".join(names) + " |"
        yield "|---" * len(names) + "|"
        for row in rows:
            yield "| " + " | ".join(shown(row.get(name, "")) for name in names) + " |"


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Runs the parts and prints the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=6.0, help="in all (default: 6)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="small sizes, to rehearse on a CPU")
    args = parser.parse_args(argv)
    if args.minutes <= 0:
        raise UserError(f"--minutes must be above 0, got {args.minutes}")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.out / "compiled"))
    end, ended = time.monotonic() + 60 * args.minutes, {}
    for i, part in enumerate(args.parts):
        share = PARTS[part] / sum(PARTS[p] for p in args.parts[i:])  # of the time that is left
        start = time.monotonic()
        seconds = share * (end - start)
        ended[part] = run_part(part, seconds, args.out / f"{part}.jsonl", args.small)
        spent = time.monotonic() - start
        print(f"{part}: {ended[part]}, {spent:.0f} of {seconds:.0f} s", flush=True)
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "ended": ended}
    with (args.out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(about) + "\n")
    text = "\n".join(table(args.out))
    (args.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
