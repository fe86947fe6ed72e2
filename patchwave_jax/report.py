"""One HTML page about a run: `python -m patchwave_jax.report --workdir=DIR`.

Measures the best checkpoint and the classical baselines, and writes a single file that opens
without a network connection: curves, tables, calibration, held-out audio with the model's surprise,
and the clips in WORKDIR/samples and WORKDIR/generated (or `--generated=DIR`).
"""

import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

import patchwave_jax
from patchwave_jax import expected
from patchwave_jax.config import Config
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.data.index import Split
from patchwave_jax.errors import UserError, check_output, exits_cleanly
from patchwave_jax.evaluate import open_splits
from patchwave_jax.evaluation import classical_cache, measure
from patchwave_jax.evaluation.calibration import calibrate
from patchwave_jax.evaluation.evaluator import load
from patchwave_jax.evaluation.nll import LN2, MODEL, NllAccumulator
from patchwave_jax.flags import argument_parser
from patchwave_jax.generation.prompts import CONTINUATION
from patchwave_jax.models.base import count_parameters
from patchwave_jax.reporting import figures
from patchwave_jax.reporting.panels import (
    calibration_panels,
    context_panels,
    excerpts,
    generated,
    picture,
)
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.storage import write_atomically
from patchwave_jax.runtime.workdir import Workdir, as_path, clips_of

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def file_rows(nll: NllAccumulator) -> list[dict[str, Any]]:
    """The table per source file, all of them first, then the most surprising."""

    def row(name: str, rows: list[Any]) -> dict[str, Any]:
        low, high = rows[0].bits_low, rows[0].bits_high
        return {
            "file": name,
            "minutes": f"{rows[0].targets / SAMPLE_RATE / 60:.2f}",
            "bits": [f"{r.nll_bits:.3f}" for r in rows],
            "interval": "" if low is None else f"{low:.3f} to {high:.3f}",
        }

    each = list(zip(*(nll.by_file(name) for name in nll.names), strict=True))
    each.sort(key=lambda rows: -rows[0].nll_bits)
    everything = row("all", [nll.total(name) for name in nll.names])
    return [everything, *(row(rows[0].file, list(rows)) for rows in each)]


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def page(
    workdir: str | os.PathLike[str],
    folder: Path,
    *,
    split_name: str = "validation",
    step: int | None = None,
    stride_patches: int | None = None,
    max_targets: int = 0,
    data_dir: str | None = None,
    generated_dir: Path | None = None,
) -> str:
    """The whole report of the run at `workdir` as HTML; `folder` has its files."""
    evaluator, params, step = load(workdir, step)
    config = evaluator.config
    split, train_split = open_splits(config, data_dir, split_name)
    targets = measure.choose_targets(
        config, split, stride_patches=stride_patches, max_targets=max_targets
    )
    nll = measure.measure(evaluator, params, targets)
    fitted = classical_cache.fitted(folder, train_split, config.data.quantiser)
    measure.measure_classical(fitted, targets, nll)
    result = measure.result(nll, targets)
    nats = {name: nll.total(name).nll_nats for name in nll.names if name != MODEL}
    grown = measure.choose_targets(
        config, split, stride_patches=config.window_units, max_targets=max_targets
    )
    growing = measure.measure(evaluator, params, grown)
    shortage = measure.context_gain(evaluator, params, grown)
    calibration = calibrate(evaluator, params, targets)
    rows = expected.history(folder)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("patchwave_jax.reporting", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html")
    return template.render(
        title=f"{as_path(workdir).name}: {split.dataset}, {config.objective} objective",
        subtitle=f"{split.name} split, checkpoint of step {step:,}",
        cards=cards(config, result, nats, params, rows),
        verdict=_capital(classical_cache.verdict(result.nll_nats, nats, split_name)),
        good=result.nll_nats < min(nats.values()),
        result=str(result),
        expected=expectation(config, split.manifest_hash, rows),
        training=training_panels(config, train_split, data_dir, folder, rows),
        context=list(context_panels(nll, growing, shortage, config)),
        names=nll.names,
        files=file_rows(nll),
        interval_over=result.interval_over,
        calibration_words=str(calibration),
        calibration=calibration_panels(calibration),
        excerpts=list(excerpts(evaluator, params, targets)),
        generated=generated(folder, generated_dir),
        generate_command=commands(workdir)[-1],
        commands="\n".join(commands(workdir)),
        versions=versions(config, split.manifest_hash),
        config=list(flat(dataclasses.asdict(config))),
    )


def training_panels(
    config: Config,
    train_split: Split,
    data_dir: str | None,
    folder: Path,
    rows: Mapping[str, list[dict[str, Any]]],
) -> list[dict[str, str]]:
    """The figures of the training's metrics; none without them."""
    if not rows.get("train"):
        return []
    split, _ = open_splits(config, data_dir, "validation")
    targets = measure.choose_targets(config, split, max_targets=config.run.eval_targets)
    lines = classical_cache.classical_on(targets, train_split, folder)
    losses = figures.loss_curves(rows["train"], rows.get("validation", []), lines)
    words = "Dashed: predictors without a network, on the targets of the validations."
    return [
        picture(losses, "Loss", words),
        picture(figures.rates(rows["train"]), "Learning rate and throughput"),
    ]


def expectation(
    config: Config, manifest_hash: str, rows: Mapping[str, list[dict[str, Any]]]
) -> str | None:
    """Compares the newest validation with the record of the same configuration and data."""
    known = expected.matching(config, manifest_hash)
    if known is None or not rows.get("validation"):
        return None
    last = rows["validation"][-1]
    words = expected.compare(known, last["step"], last["nll_bits"])
    return words and _capital(words)


def cards(
    config: Config,
    result: measure.Result,
    classical_nats: Mapping[str, float],
    params: Any,
    rows: Mapping[str, list[dict[str, Any]]],
) -> list[tuple[str, str]]:
    """The headline numbers, each with its label."""
    interval = "bits per sample"
    if result.bits_low is not None:
        interval += f", 95% interval {result.bits_low:.3f} to {result.bits_high:.3f}"
    best = min(classical_nats, key=lambda name: classical_nats[name])
    shown = [
        (f"{result.nll_bits:.3f}", interval),
        (f"{result.nll_nats:.3f}", f"nats per sample, quantiser {result.quantiser}"),
        (f"{classical_nats[best] / LN2:.3f}", f"bits of the best classical baseline, {best}"),
        (f"{result.targets:,}", "targets measured"),
        (
            f"{config.context_samples:,}",
            f"samples of context, {config.context_samples / SAMPLE_RATE:.2f} s",
        ),
        (f"{count_parameters(params):,}", "parameters"),
    ]
    if rows.get("train"):
        last = rows["train"][-1]
        shown.append((f"{last['step']:,}", f"steps, {last['targets'] / 1e6:,.1f}M targets"))
        shown.append((f"{last['minutes']:,.1f}", "minutes of training"))
    return shown


def commands(workdir: str | os.PathLike[str]) -> list[str]:
    """The commands that led to these numbers, and the next ones."""
    return [
        f"python -m patchwave_jax.train --config=CONFIG.py --workdir={workdir}",
        f"python -m patchwave_jax.evaluate --workdir={workdir} --split=test --classical",
        f"python -m patchwave_jax.score --workdir={workdir} FILE...",
        f"python -m patchwave_jax.report --workdir={workdir}",
        f"python -m patchwave_jax.generate --workdir={workdir} {CONTINUATION} --num=4 "
        f"--out={clips_of(workdir)}",
    ]


def versions(config: Config, manifest_hash: str) -> list[tuple[str, str]]:
    return [
        ("dataset", config.data.dataset),
        ("manifest", manifest_hash[:16]),
        ("patchwave_jax", patchwave_jax.__version__),
        *((name, importlib.metadata.version(name)) for name in PACKAGES),
        ("Python", platform.python_version()),
        ("measured on", expected.this_machine()),
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, measures, and writes the page."""
    parser = argument_parser("report", __doc__)
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--out", type=Path, help="the page; default: WORKDIR/report.html")
    parser.add_argument("--split", default="validation", help="train, validation or test")
    parser.add_argument("--step", type=int, help="checkpoint; default: the best on validation")
    parser.add_argument("--stride_patches", type=int, help="as for evaluate")
    parser.add_argument(
        "--max_targets",
        type=int,
        default=1_000_000,
        help="about this many targets, spread evenly; 0: all",
    )
    parser.add_argument("--generated", type=Path, metavar="DIR", help="where generated clips are")
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    args = parser.parse_args(argv)
    if args.generated and not args.generated.is_dir():
        raise UserError(f"--generated={args.generated} is not a folder")
    with Workdir(args.workdir) as files:
        out = args.out or files.folder / "report.html"
        if files.folder.is_dir():  # otherwise `load` reports that there are no checkpoints
            check_output(out, args.overwrite)
        html = page(
            args.workdir,
            files.folder,
            split_name=args.split,
            step=args.step,
            stride_patches=args.stride_patches,
            max_targets=args.max_targets,
            data_dir=args.data_dir,
            generated_dir=args.generated,
        )
        if distributed.is_first():
            write_atomically(out, html)
    place = args.out or f"{args.workdir}/report.html"
    print(f"{place}: {len(html) / 1e6:.1f} MB, opens in any browser without a network")


if __name__ == "__main__":
    distributed.run(main)
