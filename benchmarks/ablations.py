"""What each part of our model is worth: `python -m benchmarks.ablations --out=DIR`.

Trains the small recipe, and the same with one part taken away, on the same batches for the same
number of targets, and compares what `train` measures on the same 500,000 targets of the validation
split. Prints JSON and a Markdown table. The last column is the loss of the last validation before
the time at which the fastest variant was done. Runs that are already in `--out` are not trained
again; one that was stopped goes on.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from patchwave_jax import recipes, train
from patchwave_jax.config import Config, DataConfig
from patchwave_jax.errors import exits_cleanly

NO_ADAPTIVE: dict[str, Any] = {"adaptive_taps": (), "adaptive_windows": ()}
ONE_PREDICTOR: dict[str, Any] = {"adaptive_taps": (256,), "adaptive_windows": (6_144,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "one adaptive predictor, 256 taps": ONE_PREDICTOR,
    "no adaptive predictors": NO_ADAPTIVE,
    "no adaptive predictors, softmax": {**NO_ADAPTIVE, "head": "softmax"},
    "no skip connections": {"skip_connections": False},
    "waveform, no embedding": {"input": "waveform"},
    "no Transformer": {"num_layers": 0},
}


def make_config(variant: dict[str, Any], args: argparse.Namespace, seed: int) -> Config:
    data = DataConfig(dataset=args.dataset, data_dir=args.data_dir or "")
    config = recipes.small(data, num_steps=args.steps, evals=3)
    return dataclasses.replace(
        config,
        seed=seed,
        model=dataclasses.replace(config.model, **variant),
        run=dataclasses.replace(config.run, sample_every_steps=0),
    )


def run(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Trains, and gives the validations on the way."""
    train.train(config, workdir)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "validation"]


def at_minutes(rows: list[dict[str, Any]], minutes: float) -> float:
    """Bits of the last validation before so many minutes."""
    return [row["nll_bits"] for row in rows if row["minutes"] <= minutes + 1e-6][-1]


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, trains, prints."""
    parser = argparse.ArgumentParser("python -m benchmarks.ablations", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the runs live")
    parser.add_argument("--dataset", default="piano_demo")
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--steps", type=int, default=120, help="of 32,000 targets")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="names of variants")
    args = parser.parse_args(argv)

    found: dict[str, list[list[dict[str, Any]]]] = {}
    for name in args.only:
        for seed in range(args.seeds):
            workdir = args.out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            runs = found.setdefault(name, [])
            runs.append(run(make_config(VARIANTS[name], args, seed), workdir))
    soonest = min(rows[-1]["minutes"] for runs in found.values() for rows in runs)
    table = []
    for name, runs in found.items():
        first = runs[0][-1]
        table.append(
            {
                "variant": name,
                "bits": [round(rows[-1]["nll_bits"], 4) for rows in runs],
                "bits_low": first["bits_low"],
                "bits_high": first["bits_high"],
                "minutes": [round(rows[-1]["minutes"], 2) for rows in runs],
                "bits_at_equal_time": [round(at_minutes(rows, soonest), 4) for rows in runs],
                "targets_trained": args.steps * 32_000,
                "quantiser": first["quantiser"],
                "context_max": first["context_max"],
            }
        )
    print(json.dumps(table, indent=1))
    print(
        f"\n| variant | bits per sample | 95% interval | minutes | bits after {soonest:.1f} min |"
    )
    print("|---|--:|--:|--:|--:|")
    for row in table:
        bits, same = np.mean(row["bits"]), np.mean(row["bits_at_equal_time"])
        low, high = row["bits_low"], row["bits_high"]
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        minutes = np.mean(row["minutes"])
        print(f"| {row['variant']} | {bits:.3f} | {interval} | {minutes:.1f} | {same:.3f} |")


if __name__ == "__main__":
    main()
