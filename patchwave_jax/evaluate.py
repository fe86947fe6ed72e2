"""NLL of a trained model on a split: `python -m patchwave_jax.evaluate --workdir=DIR --split=test`.

Prints nats and bits per sample with the quantiser, the number of targets, the context they had and
a 95% interval; then the NLL by context and per source file, with `--classical` also of predictors
without a network. The protocol is that of `patchwave_jax.evaluation.protocol`.

The published YouTube-Mix numbers are clips from scratch, of a model trained on the sashimi
quantiser (--config.data.quantiser=sashimi) with 131,072 samples of context or a little more:

    python -m patchwave_jax.evaluate --workdir=DIR --split=test --quantiser=sashimi \\
        --clip_samples=131072 --drop_last

The value of context, for one or several runs in one figure, each from the start of every clip up
to its own context, on the same targets:

    python -m patchwave_jax.evaluate --workdir=A --workdir=B --clip_samples=LONGEST_CONTEXT \\
        --plot=context.png
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchwave_jax.config import Config
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import Split, open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.errors import UserError, check_output, exits_cleanly
from patchwave_jax.evaluation import classical_cache, measure
from patchwave_jax.evaluation.evaluator import load
from patchwave_jax.evaluation.nll import MODEL, NllAccumulator
from patchwave_jax.flags import argument_parser
from patchwave_jax.reporting import figures
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.storage import write_atomically
from patchwave_jax.runtime.workdir import Workdir


def open_splits(config: Config, data_dir: str | None, name: str) -> tuple[Split, Split]:
    """The split called `name` and the train split of a run's data; `piano_demo` is built."""
    data = config.data
    directory = data_dir or data.data_dir or default_data_dir()
    ensure_built(data.dataset, directory)
    return open_split(directory, data.dataset, name), open_split(directory, data.dataset, "train")


def check_quantiser(asked: str | None, config: Config, workdir: str) -> None:
    """Raises `UserError` if another quantiser is asked for than the model was trained on."""
    if asked is not None and asked != config.data.quantiser:
        raise UserError(
            f"--quantiser={asked}, but {workdir} was trained on {config.data.quantiser}: its codes "
            "stand for other levels, so numbers on them would be meaningless. Omit the flag, or "
            f"train with --config.data.quantiser={asked}"
        )


def as_json(result: measure.Result, nll: NllAccumulator) -> dict[str, Any]:
    """The result and all tables in JSON types."""
    tables = {
        "context": nll.by_context,
        "position": nll.by_position,
        "files": nll.by_file,
    }
    record = dataclasses.asdict(result)
    for axis, table in tables.items():
        record[axis] = [dataclasses.asdict(row) for row in table()]
    baselines = [name for name in nll.names if name != MODEL]
    record["classical"] = {
        name: dataclasses.asdict(nll.total(name))
        | {axis: [row.nll_bits for row in table(name)] for axis, table in tables.items()}
        for name in baselines
    }
    return record


def tables(nll: NllAccumulator) -> str:
    """Bits of the model and the baselines: over all, by context, and per source file."""
    names = nll.names
    heads = "".join(f"{name:>{_wide(name)}}" for name in names)
    lines = [f"{'bits per sample':<30}{'targets':>12}{heads}"]

    def add(label: str, rows: Sequence[Any]) -> None:
        values = "".join(
            f"{row.nll_bits:>{_wide(name)}.4f}" for name, row in zip(names, rows, strict=True)
        )
        short = label if len(label) < 30 else f"...{label[-26:]}"
        lines.append(f"{short:<30}{rows[0].targets:>12,}{values}")

    add("all", [nll.total(name) for name in names])
    for rows in zip(*(nll.by_context(name, coarse=True) for name in names), strict=True):
        add(f"context {rows[0].low:,} to {rows[0].high - 1:,}", rows)
    for rows in zip(*(nll.by_file(name) for name in names), strict=True):
        add(rows[0].file, rows)
    return "\n".join(lines)


def _wide(name: str) -> int:
    return max(len(name) + 2, 10)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, measures, prints and writes results."""
    parser = argument_parser("evaluate", __doc__)
    parser.add_argument(
        "--workdir", required=True, action="append", help="the run's directory; may be repeated"
    )
    parser.add_argument("--split", default="validation", help="train, validation or test")
    parser.add_argument("--step", type=int, help="checkpoint; default: the best on validation")
    parser.add_argument(
        "--stride_patches",
        type=int,
        help="patches a window advances by; default: half the context ('dense'), 1 ('last')",
    )
    parser.add_argument(
        "--clip_samples", type=int, help="cut source files into clips of this length"
    )
    parser.add_argument(
        "--drop_last", action="store_true", help="leave out clips shorter than --clip_samples"
    )
    parser.add_argument("--quantiser", help="fail unless the model was trained on this one")
    parser.add_argument(
        "--max_targets", type=int, default=0, help="about this many targets, spread evenly; 0: all"
    )
    parser.add_argument(
        "--classical",
        action="store_true",
        help="also measure predictors without a network on the same targets",
    )
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument(
        "--plot", type=Path, help="also draw bits against context: .png, .svg, .pdf"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    if args.max_targets < 0:
        raise UserError(f"--max_targets must not be negative, got {args.max_targets}")
    for path in (args.json, args.plot):
        check_output(path, args.overwrite)

    records, nlls = [], {}
    for workdir in args.workdir:
        result, nll, about = measure_workdir(workdir, args)
        print(f"{about['dataset']} {args.split}, step {about['step']}: {result}")
        print(f"\n{tables(nll)}\n", flush=True)
        records.append(as_json(result, nll) | about)
        nlls[f"{workdir}, {about['context_samples']:,} samples"] = nll
    if args.json and distributed.is_first():
        content = records[0] if len(records) == 1 else records
        write_atomically(args.json, json.dumps(content, indent=2) + "\n")
    if args.plot and distributed.is_first():
        figures.save(figures.context_curves(nlls, width=7), args.plot)


def measure_workdir(
    workdir: str, args: argparse.Namespace
) -> tuple[measure.Result, NllAccumulator, dict[str, Any]]:
    """Measures one run: the result, its tables, and what they are of."""
    evaluator, params, step = load(workdir, args.step)
    config = evaluator.config
    check_quantiser(args.quantiser, config, workdir)
    split, train_split = open_splits(config, args.data_dir, args.split)
    targets = measure.choose_targets(
        config,
        split,
        stride_patches=args.stride_patches,
        clip_samples=args.clip_samples,
        drop_last=args.drop_last,
        max_targets=args.max_targets,
    )
    fitted = None
    if args.classical:  # first, so that nothing is measured if they can't be stored
        with Workdir(workdir) as files:
            fitted = classical_cache.fitted(files.folder, train_split, config.data.quantiser)
    nll = measure.measure(evaluator, params, targets)
    if fitted:
        measure.measure_classical(fitted, targets, nll)
    about = {
        "split": args.split,
        "step": step,
        "context_samples": config.context_samples,
        "dataset": split.dataset,
        "manifest_hash": split.manifest_hash,
        "workdir": workdir,
    }
    return measure.result(nll, targets), nll, about


if __name__ == "__main__":
    distributed.run(main)
