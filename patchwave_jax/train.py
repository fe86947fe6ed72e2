"""Trains a model: `python -m patchwave_jax.train --config=configs/demo.py --workdir=DIR`.

A working directory that holds checkpoints is resumed. SIGTERM and Ctrl-C save and stop.
With `config.train.max_minutes` the run ends after that much time, with its learning rate decayed to
the end. The time counts over restarts, with compilation, validations and saves. Such a run is not
reproducible bit for bit, as its learning rate depends on the clock.
`--print_config` prints the configuration as it would be trained, and exits.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from flax import nnx

from patchwave_jax import checkpoint_metadata, expected
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import Split, open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.data.windows import Windows, batches, clips
from patchwave_jax.errors import UserError, exits_cleanly, names_file
from patchwave_jax.evaluation import classical, classical_cache, measure
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.measure import Targets
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.flags import parse
from patchwave_jax.generation import preview
from patchwave_jax.generation.prompts import CONTINUATION
from patchwave_jax.models.base import count_parameters
from patchwave_jax.runtime import distributed, profiler
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.runtime.profiler import StepProfiler
from patchwave_jax.runtime.signals import stop_requested
from patchwave_jax.runtime.storage import Lock, write_atomically
from patchwave_jax.runtime.workdir import Workdir, clips_of
from patchwave_jax.training.metrics_writer import MetricsWriter
from patchwave_jax.training.nonfinite_guard import NonFiniteGuard
from patchwave_jax.training.optimizer import make_schedule
from patchwave_jax.training.step import State, Step, make_step


def train(
    config: Config, workdir: str | os.PathLike[str], profile_steps: profiler.Steps | None = None
) -> bool:
    """Trains `config` in `workdir`, resuming its newest checkpoint if there is one.

    Returns:
      Whether training came to its end; False if a signal stopped it.

    Raises:
      UserError: if the configuration contradicts the checkpoint's model, the data is not there,
        the loss stays non-finite, the disk is full or broken, or another process trains there; the
        last good checkpoint is kept.
    """
    train_split, validation_split = open_splits(config)
    step = make_step(config, make_mesh(config.run.context_devices))
    validator = Validator(config, step, train_split, validation_split)
    print(about(config, step), flush=True)
    with (
        names_file(workdir, then=". The last good checkpoint is kept: the same command goes on"),
        Workdir(workdir) as files,
        Lock(files.folder, "--workdir") if distributed.is_first() else contextlib.nullcontext(),
        finds_nans(config.run.debug_nans),
        Checkpoints(workdir, keep=config.run.keep_checkpoints) as checkpoints,
        stop_requested(shared=jax.process_count() > 1) as stopping,
    ):
        run = restore_or_init(config, step, checkpoints, train_split)
        if distributed.is_first():
            write_config(config, files.folder)
        steps = config.train.num_steps
        with (
            MetricsWriter(files.folder, run.done, steps, config.train.max_minutes) as metrics,
            StepProfiler(profile_steps, files.folder, run.done, steps) as profiled,
        ):
            ended = run_steps(
                config, step, run, train_split, validator, checkpoints, files, metrics, profiled,
                stopping,
            )  # fmt: skip
        if ended:
            checkpoints.wait()
            print(closing_words(config, workdir, run, checkpoints.best), flush=True)
    return ended


def run_steps(
    config: Config, step: Step, run: "Run", split: Split, validator: "Validator",
    checkpoints: Checkpoints, files: Workdir, metrics: MetricsWriter, profiled: StepProfiler,
    stopping: Callable[[], bool],
) -> bool:  # fmt: skip
    """The training loop.

    `Step.update` computes the loss, `Model.loss`, and its gradient, and makes no update where one
    is not finite; `NonFiniteGuard` counts these steps and stops the run if they go on.

    Returns:
      Whether training came to its end; False if a signal stopped it.
    """
    data = batches(make_windows(config, split, step), run.done)
    guard = NonFiniteGuard(make_windows(config, split), files.folder, metrics.say)
    pace = Pace(config, run.done)
    while not (run.is_last(config) or run.flat(config)):
        batch = next(data)
        run.read_clock(config)
        run.state, measured = profiled.run(
            run.done + 1, step.update, run.state, batch["codes"], run.spent
        )
        run.done += 1
        guard.add(run.done, measured, int(batch["redrawn"].sum()))
        metrics.advance()
        run.find_due(config, distributed.stop_agreed(run.done, stopping))
        if run.logging:
            read = guard.read()
            guard.require_finite(run.is_last(config), checkpoints.latest)
            metrics.write(run.done, "train", pace.values(run.done, run.spent, read))
        if guard.in_a_row:
            continue  # what is due waits for a finite loss, which shows that the state is good
        validation = None
        if run.evaluating:  # even if it is to stop: the next start could not make up for it
            validation = validator.validate(run, metrics, files.folder)
        if run.saving:
            files.publish()  # first: metrics then reach at least as far as checkpoints
            run.save(checkpoints, config, split, validation)
        if run.sampling and distributed.is_first():
            params = run.state["params"]
            made = preview.make(config, params, files.folder, run.done, stopping)
            metrics.clips(run.done, made)
        if run.saving or run.sampling:
            pace.restart(run.done)
        if run.stopping:
            metrics.say(f"stopped by a signal; saved step {run.done}. The same command goes on.")
            return False
        run.evaluating = run.saving = run.sampling = False
    return True


@dataclasses.dataclass
class Run:
    """Where a run stands: the training state, the stopping rule, and what is due after a step."""

    state: State
    done: int  # completed steps
    best_nats: float | None = None  # lowest validation NLL so far
    flat_evals: int = 0  # validations since then, past `train.decay_steps`
    began: float = dataclasses.field(default_factory=time.monotonic)  # less time between restarts
    spent: float | None = None  # share of `train.max_minutes`; None without a limit
    logging: bool = False
    evaluating: bool = False  # stays due until it is done, as do saving and sampling
    saving: bool = False
    sampling: bool = False
    stopping: bool = False

    def flat(self, config: Config) -> bool:
        """Whether the validation NLL has been flat for as long as the recipe waits."""
        return 0 < config.train.patience_evals <= self.flat_evals

    def out_of_time(self) -> bool:
        """Whether the newest step was begun after the end of `train.max_minutes`.

        The run ends with that step, which had the final learning rate.
        """
        return self.spent is not None and self.spent >= 1

    def is_last(self, config: Config) -> bool:
        """Whether the run ends with step `done`, by its steps or its time."""
        return self.done >= config.train.num_steps or self.out_of_time()

    def read_clock(self, config: Config) -> None:
        """With `train.max_minutes`, waits for the steps begun so far and sets `spent`."""
        if config.train.max_minutes:
            jax.block_until_ready(self.state["step"])
            self.set_seconds(config, distributed.from_first(time.monotonic() - self.began))

    def set_seconds(self, config: Config, seconds: float) -> None:
        """Sets `spent`, after `seconds` of training."""
        limit = config.train.max_minutes * 60
        self.spent = seconds / limit if limit else None

    def find_due(self, config: Config, stop: bool) -> None:
        """What is due after step `done`, of which `stop` says whether it is to be the last."""
        run, done, last = config.run, self.done, self.is_last(config)
        self.stopping |= stop
        self.evaluating |= done % run.eval_every_steps == 0 or last
        self.saving |= done % run.save_every_steps == 0 or self.evaluating or self.stopping
        self.logging = done % run.log_every_steps == 0 or self.saving
        if run.sample_every_steps > 0:
            self.sampling |= done % run.sample_every_steps == 0 or self.out_of_time()
        self.sampling &= not self.stopping

    def note_validation(self, config: Config, nats: float) -> None:
        """Counts a validation for the stopping rule."""
        improved = self.best_nats is None or nats < self.best_nats
        self.best_nats = nats if improved else self.best_nats
        past_decay = self.done > config.train.decay_steps
        self.flat_evals = self.flat_evals + 1 if not improved and past_decay else 0

    def save(
        self, checkpoints: Checkpoints, config: Config, split: Split, validation: float | None
    ) -> None:
        checkpoints.save(
            self.done,
            self.state,
            config=config,
            manifest_hash=split.manifest_hash,
            best_nats=self.best_nats,
            flat_evals=self.flat_evals,
            validation_nats=validation,
            seconds=time.monotonic() - self.began,
        )


class Validator:
    """Validations of a run, beside classical baselines and the run of a known recipe."""

    def __init__(self, config: Config, step: Step, train_split: Split, split: Split):
        self._config, self._train_split = config, train_split
        self._evaluator = Evaluator(config, step.mesh)
        self._targets: Targets = measure.choose_targets(
            config, split, max_targets=config.run.eval_targets
        )
        self._known = expected.matching(config, train_split.manifest_hash)

    def validate(self, run: Run, metrics: MetricsWriter, folder: Path) -> float:
        """The validation NLL in nats after a step; prints, logs and records it in `run`."""
        nll = measure.measure(self._evaluator, run.state["params"], self._targets)
        result = measure.result(nll, self._targets)
        metrics.write(run.done, "validation", dataclasses.asdict(result))
        if distributed.is_first():
            nats = classical_cache.classical_on(self._targets, self._train_split, folder)
            metrics.say(classical_cache.verdict(result.nll_nats, nats))
        distributed.wait_for_all("classical baselines")
        known = self._known
        if known and (words := expected.compare(known, run.done, result.nll_bits)):
            metrics.say(words)
        run.note_validation(self._config, result.nll_nats)
        return result.nll_nats


class Pace:
    """Speed of the steps, without validations, saves and clips."""

    def __init__(self, config: Config, done: int):
        self._config, self._targets = config, config.targets_per_step
        self.restart(done)

    def restart(self, done: int) -> None:
        """Measures from here on."""
        self._clock, self._first = time.monotonic(), done

    def values(self, done: int, spent: float | None, read: dict[str, float]) -> dict[str, float]:
        """What is logged after step `done`; `read` is what the guard read."""
        learning_rate = make_schedule(self._config, spent)(done - 1)
        seconds = (time.monotonic() - self._clock) / (done - self._first)
        self.restart(done)
        return {
            **read,
            "nll_bits": read["nll_nats"] / LN2,
            "learning_rate": float(jax.device_get(learning_rate)),
            "seconds_per_step": seconds,
            "targets_per_second": self._targets / seconds,
            "targets": done * self._targets,
        }


def open_splits(config: Config) -> tuple[Split, Split]:
    """The train and the validation split; a dataset that comes with the package is built first."""
    data_dir, dataset = config.data.data_dir or default_data_dir(), config.data.dataset
    if distributed.is_first():  # others find it, or build one on their host
        ensure_built(dataset, data_dir)
    distributed.wait_for_all("data")
    ensure_built(dataset, data_dir)
    train_split = open_split(data_dir, dataset, "train", config.data.skip_damaged)
    return train_split, open_split(data_dir, dataset, "validation")


def about(config: Config, step: Step) -> str:
    """What is about to be trained, in one line."""
    parameters = count_parameters(step.abstract_state["params"])
    published = ""
    if config.model == type(config.model)():
        published = f" (published: {config.model.published_parameters})"
    processes = f" in {count} processes" if (count := jax.process_count()) > 1 else ""
    return (
        f"{config.model.kind}: {parameters:,} parameters{published}, objective "
        f"{config.objective}, context {config.context_samples:,} samples, "
        f"{config.targets_per_step:,} targets a step, {step.mesh.size} x "
        f"{step.mesh.devices.flat[0].device_kind}{processes}"
    )


def make_windows(config: Config, split: Split, step: Step | None = None) -> Windows:
    """The training windows of `split`: whole batches, or this process' rows of a step's."""
    data, rows = config.data, None
    if step is not None:
        rows = distributed.own_rows(step.mesh, config.train.batch_size)
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


def restore_or_init(config: Config, step: Step, checkpoints: Checkpoints, split: Split) -> Run:
    """The run resumed from the newest undamaged checkpoint, or a new one."""

    def check(stored: checkpoint_metadata.Record) -> None:
        checkpoint_metadata.check_continues(config, split.manifest_hash, stored)
        for change in checkpoint_metadata.changes(config, stored.config):
            logging.warning("changed since the checkpoint: %s", change)

    began = time.monotonic()
    resumed = checkpoints.resume(step.abstract_state, check)
    if resumed is None:
        state = step.init()
        if config.model.linear_taps:
            state["params"] = start_from_linear_prediction(config, step, state["params"], split)
        return Run(state, done=0, began=began)
    state, stored = resumed
    print(f"resumed from step {checkpoints.latest}", flush=True)
    run = Run(
        state, int(state["step"]), stored.best_nats, stored.flat_evals, began - stored.seconds
    )
    run.set_seconds(config, stored.seconds)
    return run


def start_from_linear_prediction(config: Config, step: Step, params: Any, split: Split) -> Any:
    """Parameters that start from the train split's least-squares linear prediction."""
    quantiser = quantisers.get(config.data.quantiser)
    stretches = list(clips(split, 2**15, drop_last=False))
    chosen = stretches[:: max(1, len(stretches) // 64)]
    audio = split.excerpts((c.recording, c.start, c.length) for c in chosen)
    excerpts = [quantiser.encode(pcm) for pcm in audio]
    taps, scale = classical.fit_linear(excerpts, quantiser, config.model.linear_taps)

    def started(params: Any) -> Any:
        model = nnx.merge(step.graphdef, params)
        model.start_from(taps, scale)
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
    write_atomically(folder / "config.json", config_text(config))


def config_text(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def closing_words(
    config: Config, workdir: str | os.PathLike[str], run: Run, best_step: int | None
) -> str:
    """The result and the commands to go on with."""
    lines = [f"trained to step {run.done}, {run.done * config.targets_per_step:,} targets"]
    if run.out_of_time():
        lines[0] += f"; config.train.max_minutes={config.train.max_minutes:g} ended it"
    if (best := run.best_nats) is not None:
        lines.append(
            f"best validation (step {best_step}): {best / LN2:.4f} bits ({best:.4f} nats) per "
            f"sample, quantiser {config.data.quantiser}, context up to {config.context_samples:,}"
        )
    lines += [
        f"checkpoints:  {workdir}/checkpoints",
        f"metrics:      {workdir}/metrics.jsonl and {workdir}/tensorboard",
        "go on with:",
        f"  python -m patchwave_jax.evaluate --workdir={workdir} --split=test --classical",
        f"  python -m patchwave_jax.generate --workdir={workdir} {CONTINUATION} "
        f"--out={clips_of(workdir)}",
        f"  python -m patchwave_jax.report --workdir={workdir}   # one page: curves, tables, audio",
    ]
    return "\n".join(lines)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """`argv` holds the flags only, as for the other commands."""
    logging.set_verbosity(logging.WARNING)  # orbax logs a lot
    given = sys.argv[1:] if argv is None else argv
    command = parse([sys.argv[0], *given], __doc__)
    if command.print_config:
        print(config_text(command.config), end="")
        return
    train(command.config, command.workdir, command.profile_steps)


if __name__ == "__main__":
    distributed.run(main, agrees_to_stop=True)
