"""What each part of our model is worth: `python -m benchmarks.ablations --out=DIR`.

Trains the small recipe, and the same with one thing changed, and compares what `train` measures at
the end on the same 500,000 targets of the validation split: after the same number of targets, on
the same batches, and after the same time (the changed variant gets as many steps as fit into the
time that the recipe's own took). Prints JSON and a Markdown table. Runs that are already in `--out`
are not trained again; one that was stopped goes on.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from patchwave_jax import recipes, train
from patchwave_jax.config import Config, DataConfig
from patchwave_jax.config_dict import from_config_dict, to_config_dict
from patchwave_jax.errors import UserError, exits_cleanly

NO_ADAPTIVE: dict[str, Any] = {"model.adaptive_taps": (), "model.adaptive_windows": ()}
BFLOAT16: dict[str, Any] = {"model.compute_dtype": "bfloat16"}
RECIPE = "all parts"
PARTS: dict[str, dict[str, Any]] = {
    RECIPE: {},
    "one adaptive predictor, 256 taps": {
        "model.adaptive_taps": (256,),
        "model.adaptive_windows": (6_144,),
    },
    "no denoiser": {"model.denoiser_taps": 0, "model.denoiser_window": 0},
    "no adaptive predictors": NO_ADAPTIVE,
    "no adaptive predictors, softmax": {**NO_ADAPTIVE, "model.head": "softmax"},
    "no skip connections": {"model.skip_connections": False},
    "waveform, no embedding": {"model.input": "waveform"},
    "no Transformer": {"model.num_layers": 0},
    "no adaptive predictors, no skip connections": {
        **NO_ADAPTIVE,
        "model.skip_connections": False,
    },
    "no adaptive predictors, waveform": {**NO_ADAPTIVE, "model.input": "waveform"},
    "no adaptive predictors, no Transformer": {**NO_ADAPTIVE, "model.num_layers": 0},
    "bfloat16": BFLOAT16,
    "no adaptive predictors, bfloat16": {**NO_ADAPTIVE, **BFLOAT16},
}
CHOICES: dict[str, dict[str, Any]] = {
    "five predictors, 16 to 512 taps": {
        "model.adaptive_taps": (16, 32, 128, 256, 512),
        "model.adaptive_windows": (640, 1536, 3072, 6144, 12_288),
    },
    "learning rate 2e-3": {"train.learning_rate": 2e-3, "train.final_learning_rate": 2e-5},
    "learning rate 8e-3": {"train.learning_rate": 8e-3, "train.final_learning_rate": 8e-5},
    "constant learning rate": {"train.schedule": "drop", "train.decay_steps": 10**6},
    "weight decay 0.1": {"train.weight_decay": 0.1},
    "half the filters, twice the readout": {
        "model.filters": (32, 32, 32, 32),
        "model.readout_width": 512,
    },
    "one layer, heads of 16": {"model.num_layers": 1, "model.head_size": 16},
}
VARIANTS = PARTS | CHOICES


def make_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """The flags that say what to train on, for how long, and where runs live."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("--out", type=Path, required=True, help="where the runs live")
    parser.add_argument("--dataset", default="piano_demo")
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--steps", type=int, default=60, help="of 32,000 targets")
    return parser


def make_folder(args: argparse.Namespace, name: str) -> Path:
    """Where the runs of a variant live."""
    return args.out / name.replace(", ", "-").replace(" ", "_")


def make_config(
    changes: dict[str, Any], args: argparse.Namespace, seed: int, steps: int | None = None
) -> Config:
    """The small recipe with `changes`, on the data and for the steps of the command line."""
    data = DataConfig(dataset=args.dataset, data_dir=args.data_dir or "")
    tree = to_config_dict(recipes.small(data, num_steps=steps or args.steps, evals=1))
    tree.update_from_flattened_dict({**changes, "seed": seed, "run.sample_every_steps": 0})
    return from_config_dict(tree.to_dict())


def run(config: Config, workdir: Path) -> tuple[dict[str, Any], float]:
    """Trains; gives the last validation, and the minutes that the steps took."""
    train.train(config, workdir)
    rows = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    seconds = statistics.median(r["seconds_per_step"] for r in rows if r["kind"] == "train")
    return rows[-1], seconds * config.train.num_steps / 60


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, trains, prints."""
    parser = make_parser("python -m benchmarks.ablations", __doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(PARTS), help="names of variants")
    parser.add_argument(
        "--choices", action="store_const", dest="only", const=list(CHOICES),
        help="what was tried and not kept, instead of the parts",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(VARIANTS):
        raise UserError(f"--only: {unknown.pop()!r} is none of {', '.join(VARIANTS)}")

    table, time_of_recipe = [], None
    for name in [RECIPE, *(name for name in args.only if name != RECIPE)]:
        folder = make_folder(args, name)
        runs = [
            run(make_config(VARIANTS[name], args, seed), folder / f"seed{seed}")
            for seed in range(args.seeds)
        ]
        minutes = statistics.median(minutes for _, minutes in runs)
        time_of_recipe = time_of_recipe or minutes
        steps, equal = round(args.steps * time_of_recipe / minutes), runs[0]
        if abs(steps - args.steps) > 0.05 * args.steps:
            equal = run(make_config(VARIANTS[name], args, 0, steps), folder / f"{steps}steps")
        last = runs[0][0]
        table.append(
            {
                "variant": name,
                "bits": [row["nll_bits"] for row, _ in runs],
                "bits_low": last["bits_low"],
                "bits_high": last["bits_high"],
                "minutes": round(minutes, 2),
                "bits_at_equal_time": equal[0]["nll_bits"],
                "steps_at_equal_time": steps,
                "quantiser": last["quantiser"],
                "context_max": last["context_max"],
            }
        )
    print(json.dumps(table, indent=1))
    targets = args.steps * 32_000
    print(f"\n| variant | bits after {targets:,} targets | 95% interval | minutes ", end="")
    print(f"| bits after {time_of_recipe:.1f} min |\n|---|--:|--:|--:|--:|")
    for row in table:
        low, high = row["bits_low"], row["bits_high"]
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        bits = ", ".join(f"{x:.3f}" for x in row["bits"])
        equal = f"{row['bits_at_equal_time']:.3f}"
        print(f"| {row['variant']} | {bits} | {interval} | {row['minutes']:.1f} | {equal} |")


if __name__ == "__main__":
    main()
