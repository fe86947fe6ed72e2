"""Trains a model: `python -m patchwave_jax.train --config=configs/demo.py --workdir=DIR`.

A working directory that holds checkpoints is resumed. SIGTERM and Ctrl-C save and stop.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from patchwave_jax import checkpoint_metadata, expected
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config, PatchWaveConfig
from patchwave_jax.data import quantisers
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import Split, open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.data.windows import Windows, batches, clips
from patchwave_jax.errors import UserError, exits_cleanly, names_file
from patchwave_jax.evaluation import classical, measure, protocol, reference
from patchwave_jax.flags import parse
from patchwave_jax.generation import preview
from patchwave_jax.generation.prompts import CONTINUATION
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.models.sashimi import SaShiMiConfig
from patchwave_jax.models.wavenet import WaveNetConfig
from patchwave_jax.runtime import distributed, profiler
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.runtime.profiler import StepProfiler
from patchwave_jax.runtime.signals import stop_requested
from patchwave_jax.runtime.storage import Lock
from patchwave_jax.runtime.workdir import Workdir, clips_of
from patchwave_jax.training.metrics_writer import MetricsWriter
from patchwave_jax.training.nonfinite_guard import NonFiniteGuard
from patchwave_jax.training.optimizer import make_schedule
from patchwave_jax.training.step import (
    LN2,
    State,
    Step,
    count_parameters,
    keep_compilations,
    make_step,
)

PAPER_PARAMETERS: dict[type, str] = {
    PatchWaveConfig: "3.14M",
    WaveNetConfig: "4.24M",
    SampleRNNConfig: "35.03M",
    SaShiMiConfig: "4.05M with 8 layers, 3.13M with 6",
}


def train(
    config: Config, workdir: str | os.PathLike[str], profile_steps: profiler.Steps | None = None
) -> bool:
    """Trains `config` in `workdir`, going on from its newest checkpoint if there is one.

    Returns:
      Whether training came to its end; False if a signal stopped it.

    Raises:
      UserError: if the configuration contradicts the checkpoint's model, the data is not there,
        the loss stays without a number, the disk is full or broken, or another process trains
        there; the last good checkpoint is kept.
    """
    data_dir = config.data.data_dir or default_data_dir()
    if distributed.is_first():  # others find it, or build one of their host's
        ensure_built(config.data.dataset, data_dir)
    distributed.wait_for_all("data")
    ensure_built(config.data.dataset, data_dir)
    train_split = open_split(data_dir, config.data.dataset, "train", config.data.skip_damaged)
    validation_split = open_split(data_dir, config.data.dataset, "validation")
    mesh, windows = make_mesh(config.run.context_devices), make_windows(config, train_split)
    own = distributed.own_rows(mesh, config.train.batch_size)
    step = make_step(config, mesh)
    evaluator = protocol.Evaluator(config, mesh)
    targets = measure.choose_targets(config, validation_split, max_targets=config.run.eval_targets)
    known = expected.matching(config, train_split.manifest_hash)
    schedule, run = make_schedule(config), config.run
    num_steps, targets_per_step = config.train.num_steps, step_targets(config)
    paper = PAPER_PARAMETERS[type(config.model)]
    print(
        f"{count_parameters(step.abstract_state['params']):,} parameters (the paper: "
        f"{paper}), objective {config.objective}, context {config.context_samples:,} "
        f"samples, {targets_per_step:,} targets a step, {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind}"
        + (f" in {count} processes" if (count := jax.process_count()) > 1 else ""),
        flush=True,
    )

    with (
        names_file(workdir, then=". The last good checkpoint is kept: the same command goes on"),
        Workdir(workdir) as files,
        Lock(files.folder, "--workdir") if distributed.is_first() else contextlib.nullcontext(),
        finds_nans(config.run.debug_nans),
        Checkpoints(workdir, keep=run.keep_checkpoints) as checkpoints,
        stop_requested(shared=jax.process_count() > 1) as stopping,
    ):
        state, best, flat = restore_or_init(config, step, checkpoints, train_split)
        done = int(state["step"])
        if distributed.is_first():
            write_config(config, files.folder)
        data = batches(make_windows(config, train_split, own), done)

        with (
            MetricsWriter(files.folder, done, num_steps) as log,
            StepProfiler(profile_steps, files.folder, done, num_steps) as traced,
        ):
            watch = NonFiniteGuard(windows, files.folder, log.say)
            clock, timed, evaluating, saving, stop = time.monotonic(), done, False, False, False
            while done < num_steps and not exhausted(config, flat):
                batch = next(data)
                state, metrics = traced.run(done + 1, step.update, state, batch["codes"])
                done += 1
                watch.add(done, metrics, int(batch["redrawn"].sum()))
                log.advance()
                stop = stop or distributed.stop_agreed(done, stopping)
                last = done == num_steps
                evaluating |= done % run.eval_every_steps == 0 or last
                saving |= done % run.save_every_steps == 0 or evaluating or stop
                if done % run.log_every_steps == 0 or saving:
                    read = watch.read()
                    watch.require_finite(last, checkpoints.latest)
                    seconds = (time.monotonic() - clock) / (done - timed)
                    values = {
                        **read,
                        "nll_bits": read["nll_nats"] / LN2,
                        "learning_rate": float(jax.device_get(schedule(done - 1))),
                        "seconds_per_step": seconds,
                        "targets_per_second": targets_per_step / seconds,
                        "targets": done * targets_per_step,
                    }
                    log.write(done, "train", values)
                    clock, timed = time.monotonic(), done
                if watch.in_a_row:
                    continue  # what is due waits for a finite loss: it tells that the state is good
                validation = None
                if evaluating:  # though it is to stop: the next start could not make up for it
                    tally = measure.measure(evaluator, step.whole(state["params"]), targets)
                    result = measure.result(tally, targets)
                    log.write(done, "validation", dataclasses.asdict(result))
                    validation = result.nll_nats
                    if distributed.is_first():
                        yards = reference.classical_on(targets, train_split, files.folder)
                        log.say(reference.verdict(validation, yards))
                    distributed.wait_for_all("yardsticks")
                    if known and (words := expected.compare(known, done, result.nll_bits)):
                        log.say(words)
                    improved = best is None or validation < best
                    best = validation if improved else best
                    flat = flat + 1 if not improved and done > config.train.decay_steps else 0
                if saving:
                    files.publish()  # first: what is logged reaches as far as what is saved
                    checkpoints.save(
                        done,
                        state,
                        config=config,
                        manifest_hash=train_split.manifest_hash,
                        best_nats=best,
                        flat_evals=flat,
                        validation_nats=validation,
                    )
                sampling = run.sample_every_steps > 0 and done % run.sample_every_steps == 0
                if sampling and not stop:
                    params = step.whole(state["params"])
                    if distributed.is_first():
                        log.clips(done, preview.make(config, params, files.folder, done, stopping))
                if saving or sampling:
                    clock, timed = time.monotonic(), done
                evaluating, saving = False, False
                if stop:
                    log.say(f"stopped by a signal; saved step {done}. The same command goes on.")
                    return False
        checkpoints.wait()
        print(closing_words(config, workdir, done, checkpoints.best, best), flush=True)
    return True


def make_windows(config: Config, split: Split, rows: Sequence[int] | None = None) -> Windows:
    """The training windows of `split` that `config` asks for; of `rows` of the batch, or all."""
    data = config.data
    return Windows(
        split,
        window_samples=config.window_samples,
        batch_size=config.train.batch_size,
        quantiser=data.quantiser,
        seed=config.seed,
        rows=rows,
        segments=config.segments,
        silent_samples=config.silent_samples,
        distinct_positions=data.distinct_positions or None,
        gain_db=data.gain_db,
        pitch_semitones=data.pitch_semitones,
    )


def step_targets(config: Config) -> int:
    """Targets of one step."""
    return config.train.batch_size * config.targets_per_row


def exhausted(config: Config, flat_evals: int) -> bool:
    """Whether the validation NLL has been flat for as long as the recipe waits."""
    return 0 < config.train.patience_evals <= flat_evals


def restore_or_init(
    config: Config, step: Step, checkpoints: Checkpoints, split: Split
) -> tuple[State, float | None, int]:
    """The state to go on from, the best validation NLL so far, and how long it has been flat."""

    def check(record: checkpoint_metadata.Record) -> None:
        checkpoint_metadata.check_continues(config, split.manifest_hash, record)
        for change in checkpoint_metadata.changes(config, record.config):
            logging.warning("changed since the checkpoint: %s", change)

    resumed = checkpoints.resume(step.abstract_state, check)
    if resumed is None:
        state = step.init()
        if not config.is_baseline and config.patch_model.head == "logistic_mixture":
            state["params"] = start_from_linear_prediction(config, step, state["params"], split)
        return state, None, 0
    state, record = resumed
    print(f"resumed from step {checkpoints.latest}", flush=True)
    return state, record.best_nats, record.flat_evals


def start_from_linear_prediction(config: Config, step: Step, params: Any, split: Split) -> Any:
    """Parameters whose mixture starts from the train split's least-squares linear prediction."""
    quantiser = quantisers.get(config.data.quantiser)
    stretches = list(clips(split, 2**15, drop_last=False))
    chosen = stretches[:: max(1, len(stretches) // 64)]
    audio = split.excerpts((c.recording, c.start, c.length) for c in chosen)
    excerpts = [quantiser.encode(pcm) for pcm in audio]
    taps, scale = classical.fit_linear(excerpts, quantiser, config.patch_model.predictor_taps)

    def started(params: Any) -> Any:
        model = nnx.merge(step.graphdef, params)
        model.head.start_from(taps, scale)
        return nnx.state(model)

    shardings = jax.tree.map(lambda x: x.sharding, step.abstract_state["params"])
    return jax.jit(started, out_shardings=shardings)(params)


@contextlib.contextmanager
def finds_nans(wanted: bool) -> Iterator[None]:
    """Within it, if wanted, the first NaN ends the run by a `UserError` that says where it is."""
    try:
        with jax.debug_nans(wanted):
            yield
    except FloatingPointError as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(__file__).parent in Path(f.filename).parents]
        place = f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}: {own[-1].line}"
        raise UserError(f"{place}: {str(error).splitlines()[0]}") from error


def write_config(config: Config, folder: Path) -> None:
    """Puts the configuration beside the checkpoints, for people to read."""
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    aside = folder / "config.tmp"
    aside.write_text(text)
    aside.replace(aside.with_suffix(".json"))


def closing_words(
    config: Config, workdir: str | os.PathLike[str], done: int, best_step: int | None, best: Any
) -> str:
    """The result and the commands to go on with."""
    lines = [f"trained to step {done}, {done * step_targets(config):,} targets"]
    if best is not None:
        lines.append(
            f"best validation (step {best_step}): {best / LN2:.4f} bits ({best:.4f} nats) per "
            f"sample, quantiser {config.data.quantiser}, context up to {config.context_samples:,}"
        )
    lines += [
        f"checkpoints:  {workdir}/checkpoints",
        f"metrics:      {workdir}/metrics.jsonl and {workdir}/tensorboard",
        "go on with:",
        f"  python -m patchwave_jax.evaluate --workdir={workdir} --split=test --yardsticks",
        f"  python -m patchwave_jax.generate --workdir={workdir} {CONTINUATION} "
        f"--out={clips_of(workdir)}",
        f"  python -m patchwave_jax.report --workdir={workdir}   # one page: curves, tables, audio",
    ]
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """`argv` holds the flags only, as for the other commands."""
    logging.set_verbosity(logging.WARNING)  # orbax tells a lot
    given = sys.argv[1:] if argv is None else argv
    train(*parse([sys.argv[0], *given], __doc__))


if __name__ == "__main__":
    keep_compilations()
    distributed.run(main, agrees_to_stop=True)
