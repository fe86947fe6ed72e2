"""The paper's Table 1, replayed: every system on the same data for the same time.

    python -m benchmarks.table1 --budget_minutes=30 --dataset=audio_folder --data_dir=DIR --out=DIR

Trains the paper's `last` objective, ours, and the baselines one after another, each in a process of
its own and for the same minutes of training; compiling and measuring are not counted.
All are measured on the same targets: stretches of 2,000 samples drawn from clips of 131,072, with
the context that each system has there. Writes OUT/NAME.json for each, whose checkpoint is in
OUT/NAME, then OUT/table1.md and OUT/table1.png. A system whose JSON is there is not run again.

The networks are full-size but ours, which is `configs/laptop.py`. Steps are sized for two CPU
cores: few rows (`--batch wavenet=4` for others) and for WaveNet, SaShiMi and MEGABYTE windows of
16,384 instead of 131,072. With `--full` all steps, and our network, are as in `configs/`. Learning
rates are each recipe's own; they fall over as many steps as a short trial says will fit. Samples a
second are those of one stream in the middle of a window, without slides.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from patchwave_jax import recipes, train
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config, DataConfig
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import Split, open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.data.windows import batches
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.evaluation import measure, protocol
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation.sampler import CHUNK_SAMPLES, Sampler
from patchwave_jax.models.base import count_parameters
from patchwave_jax.models.megabyte import MegabyteConfig
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.models.sashimi import SaShiMiConfig
from patchwave_jax.models.wavenet import WaveNetConfig
from patchwave_jax.reporting import figures
from patchwave_jax.runtime.distributed import keep_compilations
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import Step, make_step

SPAN_SAMPLES = 2_000  # whole patches of all systems, so that windows share their ends
TRIAL_SECONDS = 20.0
GENERATION_SECONDS = 10.0
SYSTEMS = ("paper-last", "ours", "wavenet", "samplernn", "sashimi", "megabyte")


def configuration(name: str, full: bool) -> Config:
    """A system's recipe, with steps that suit two cores unless `full`."""
    if name == "paper-last":
        return sized(recipes.paper(128_000), full, batch_size=8)
    if name == "ours":
        return recipes.dense(128_000) if full else recipes.small(DataConfig(), 500, 10)
    if name == "wavenet":
        config = recipes.baseline(WaveNetConfig(), learning_rate=1e-3)
        return sized(config, full, context_samples=16_384, batch_size=2)
    if name == "sashimi":
        config = recipes.baseline(SaShiMiConfig(num_layers=6), learning_rate=4e-3)
        return sized(config, full, context_samples=16_384, batch_size=2)
    if name == "megabyte":
        config = recipes.baseline(MegabyteConfig(), learning_rate=2e-4, clip_norm=0.5)
        return sized(config, full, context_samples=16_384, batch_size=2)
    config = recipes.baseline(
        SampleRNNConfig(), learning_rate=1e-3, batch_size=128, micro_batch_size=0, clip_norm=1.0
    )
    return sized(config, full, batch_size=16)


def sized(config: Config, full: bool, batch_size: int, context_samples: int = 0) -> Config:
    if full:
        return config
    return dataclasses.replace(
        config,
        context_samples=context_samples or config.context_samples,
        train=dataclasses.replace(config.train, batch_size=batch_size),
    )


def timed_schedule(config: Config, steps: int) -> Config:
    """Learning rates that fall over `steps`: the paper's after 4/5 of them, others by cosine."""
    recipe = config.train
    if config.objective == "last":
        changed: dict[str, Any] = {"decay_steps": max(1, steps * 4 // 5)}
    else:
        changed = {
            "schedule": "cosine",
            "decay_steps": max(2, steps),
            "warmup_steps": min(50, steps // 10),
            "final_learning_rate": recipe.learning_rate / 100,
        }
    return dataclasses.replace(
        config, train=dataclasses.replace(recipe, num_steps=max(2, steps), **changed)
    )


Spans = dict[int, tuple[int, int]]  # of a clip, the first sample and the end of its stretch


def draw_spans(split: Split, clip_samples: int, count: int) -> Spans:
    """Stretches of `count` clips that are spread evenly over the split; the same for everyone."""
    chosen = list(measure.clips(split, clip_samples, drop_last=True, per_file=True))
    if not chosen:
        raise UserError(f"--clip_samples={clip_samples} is longer than every file of {split.name}")
    picks = np.unique(np.linspace(0, len(chosen) - 1, count).round().astype(int)).tolist()
    places = np.random.default_rng(0).integers(clip_samples // SPAN_SAMPLES, size=len(chosen))
    return {
        clip: (int(places[clip]) * SPAN_SAMPLES, (int(places[clip]) + 1) * SPAN_SAMPLES)
        for clip in picks
    }


def measure_spans(
    evaluator: Evaluator,
    params: Any,
    split: Split,
    clip_samples: int,
    spans: Spans,
) -> measure.Result:
    """The NLL of the samples in `spans`, each with the context that the model has there."""
    config = evaluator.config
    targets = measure.choose_targets(config, split, clip_samples=clip_samples, drop_last=True)
    windows = [
        piece
        for window in targets.windows
        for piece in protocol.pieces(window, targets.stride_patches, config)
        if piece.clip in spans
        and piece.first < spans[piece.clip][1]
        and piece.end > spans[piece.clip][0]
    ]
    nll = targets.accumulator()
    for window, log_probs, contexts in evaluator.score(params, targets.codes, windows):
        first, end = spans[window.clip]
        low, high = max(first, window.first), min(end, window.end)
        inside = slice(low - window.first, high - window.first)
        nll.add(window.clip, low, contexts[inside], log_probs[inside])
    return measure.result(nll, targets)


def advance(made: Step, state: Any, data: Iterator[Any]) -> tuple[Any, float]:
    """The state after one step, and the seconds it took."""
    begin = time.monotonic()
    state, metrics = made.update(state, next(data)["codes"])
    jax.block_until_ready((metrics, state))
    return state, time.monotonic() - begin


def trial(config: Config, windows: Any) -> float:
    """Seconds of a step, once it is compiled."""
    made, data = make_step(config, make_mesh()), batches(windows, 0)
    state, _ = advance(made, made.init(), data)
    taken: list[float] = []
    while sum(taken) < TRIAL_SECONDS and len(taken) < 20:
        state, seconds = advance(made, state, data)
        taken.append(seconds)
    return float(np.median(taken))


def peak_bytes() -> int:
    """Of this process until now; of its device's memory where that tells."""
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def generation_rate(config: Config, params: Any) -> float:
    """Samples a second of one stream."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sampler = Sampler(config, jax.device_get(params), mesh, num=1)
    taken, made = 0.0, 0
    while taken < GENERATION_SECONDS:
        sampler.fill_dummy_state(config.context_samples - CHUNK_SAMPLES)
        begin = time.monotonic()
        codes, _ = sampler.run()
        if made or taken:
            taken += time.monotonic() - begin
            made += codes.shape[1]
        else:
            taken = 1e-9  # it was compiled
    return made / taken


def open_data(name: str, args: argparse.Namespace) -> tuple[Config, dict[str, Split]]:
    """A system's configuration on the data of the command line, and its splits."""
    data_dir = args.data_dir or default_data_dir()
    ensure_built(args.dataset, data_dir)
    splits = {
        which: open_split(data_dir, args.dataset, which)
        for which in ("train", "validation", "test")
    }
    data = DataConfig(dataset=args.dataset, data_dir=str(data_dir), distinct_positions=0)
    config = dataclasses.replace(configuration(name, args.full), data=data)
    rows = dict(item.split("=") for item in args.batch).get(name, config.train.batch_size)
    recipe = dataclasses.replace(config.train, batch_size=int(rows))
    return dataclasses.replace(config, train=recipe), splits


def run_system(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one system."""
    config, splits = open_data(name, args)
    windows = train.make_windows(config, splits["train"])
    budget = args.budget_minutes * 60
    config = timed_schedule(config, round(budget / trial(config, windows)))
    peak = peak_bytes()  # of training: nothing was measured yet
    made, evaluator = make_step(config, make_mesh()), Evaluator(config, make_mesh())
    spans = draw_spans(splits["validation"], args.clip_samples, args.validation_spans)
    curve: list[dict[str, float]] = []
    trained, done = 0.0, 0

    def validate(params: Any) -> float:
        found = measure_spans(evaluator, params, splits["validation"], args.clip_samples, spans)
        curve.append({"minutes": trained / 60, "step": done, "nll_bits": found.nll_bits})
        print(f"{name}: step {done}, {trained:.0f} s, {found.nll_bits:.4f} bits", flush=True)
        return found.nll_nats

    with Checkpoints(args.out / name, keep=1) as checkpoints:
        state = train.restore_or_init(config, made, checkpoints, splits["train"]).state
        source = batches(windows, 0)
        validate(state["params"])
        state, _ = advance(made, state, source)  # compiles, and is not timed
        done = 1
        while trained < budget:
            state, seconds = advance(made, state, source)
            trained, done = trained + seconds, done + 1
            if trained < budget and trained >= len(curve) * budget / args.validations:
                validate(state["params"])
        nats = validate(state["params"])
        checkpoints.save(
            done,
            state,
            config=config,
            manifest_hash=splits["train"].manifest_hash,
            best_nats=nats,
            flat_evals=0,
            validation_nats=nats,
        )
    spans = draw_spans(splits["test"], args.clip_samples, args.test_spans)
    found = measure_spans(evaluator, state["params"], splits["test"], args.clip_samples, spans)
    return {
        "system": name,
        **dataclasses.asdict(found),
        "split": "test",
        "parameters": count_parameters(state["params"]),
        "steps": done,
        "scheduled_steps": config.train.num_steps,
        "batch_size": config.train.batch_size,
        "targets_seen": done * config.targets_per_step,
        "training_minutes": trained / 60,
        "training_targets_per_second": done * config.targets_per_step / trained,
        "generation_samples_per_second": generation_rate(config, state["params"]),
        "peak_bytes": peak,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "manifest_hash": splits["test"].manifest_hash,
        "validation": curve,
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "system": lambda r: r["system"],
    "parameters": lambda r: f"{r['parameters']:,}",
    "bits": lambda r: f"{r['nll_bits']:.3f}",
    "nats": lambda r: f"{r['nll_nats']:.3f}",
    "95% interval, bits": lambda r: (
        "" if r["bits_low"] is None else f"{r['bits_low']:.3f} to {r['bits_high']:.3f}"
    ),
    "context": lambda r: f"{r['context_min']:,} to {r['context_max']:,}",
    "steps": lambda r: f"{r['steps']:,}",
    "targets seen": lambda r: f"{r['targets_seen']:,}",
    "targets/s": lambda r: f"{r['training_targets_per_second']:,.0f}",
    "generated samples/s": lambda r: f"{r['generation_samples_per_second']:,.0f}",
    "peak memory, GB": lambda r: f"{r['peak_bytes'] / 1e9:.1f}",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, with all that the numbers depend on."""
    first = results[0]
    lines = [
        f"{first['targets']:,} targets of the {first['split']} split, quantiser "
        f"{first['quantiser']}, clips of {first['clip_samples']:,}; "
        f"{first['training_minutes']:.0f} minutes of training each on {first['device']}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    lines += [f"| {' | '.join(show(r) for show in COLUMNS.values())} |" for r in results]
    return "\n".join(lines)


def plot(results: list[dict[str, Any]]) -> Figure:
    """Validation bits against minutes of training."""
    figure, (axes,) = figures.make()
    axes.set(xlabel="minutes of training", ylabel="bits per sample, validation")
    for row in results:
        minutes = [point["minutes"] for point in row["validation"]]
        axes.plot(minutes, [point["nll_bits"] for point in row["validation"]], label=row["system"])
    axes.legend()
    return figure


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, runs what is missing, and writes the table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.table1",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="where results and runs live")
    parser.add_argument("--budget_minutes", type=float, required=True, help="of training, each")
    parser.add_argument("--dataset", default="piano_demo")
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--only", nargs="*", default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--batch", nargs="*", default=[], metavar="NAME=ROWS", help="rows a step")
    parser.add_argument("--full", action="store_true", help="steps as in configs/")
    parser.add_argument("--clip_samples", type=int, default=131_072)
    parser.add_argument("--validations", type=int, default=6, help="while it trains")
    parser.add_argument("--validation_spans", type=int, default=8, help="of 2,000 targets")
    parser.add_argument("--test_spans", type=int, default=40, help="of 2,000 targets")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := sorted({*args.only, *(b.split("=")[0] for b in args.batch)} - set(SYSTEMS)):
        raise UserError(f"{unknown[0]!r} is not a system; the systems are {', '.join(SYSTEMS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        path = args.out / f"{args.only[0]}.json"
        path.write_text(json.dumps(run_system(args.only[0], args), indent=1) + "\n")
        return
    results = []
    for name in args.only:
        path = args.out / f"{name}.json"
        if not path.exists():
            given = sys.argv[1:] if argv is None else argv
            command = [sys.executable, "-m", "benchmarks.table1", *given, "--only", name, "--here"]
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"{name} failed; the same command goes on from there")
        results.append(json.loads(path.read_text()))
    print(json.dumps(results, indent=1))
    words = table(results)
    print(f"\n{words}")
    (args.out / "table1.md").write_text(f"{words}\n")
    figures.save(plot(results), args.out / "table1.png")


if __name__ == "__main__":
    keep_compilations()
    main()
