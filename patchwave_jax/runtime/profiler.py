"""A profiler's trace of some training steps, for TensorBoard's profile plugin and XProf."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import is_first

MOST_STEPS = 100  # a trace holds every operation of every step
Steps = tuple[int, int]  # the first and the last, counted from 1


def parse(asked: str) -> Steps:
    """The steps of `--profile_steps=FIRST:LAST`. Raises `UserError` if that is no range."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", asked)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last < first + MOST_STEPS:
        raise UserError(
            f"--profile_steps={asked} is no range of 1 to {MOST_STEPS} steps; 10:13 are four"
        )
    return first, last


class StepProfiler:
    """Runs steps, and traces those that were asked for. A context manager.

    The trace is in WORKDIR/profile, each step in it annotated with its number. Of several
    processes the first one's devices are traced.
    """

    def __init__(self, steps: Steps | None, folder: Path, done: int, num_steps: int):
        """For a run from step `done` to `num_steps`; `steps` is None for no trace.

        Raises:
          UserError: if the run has no such steps.
        """
        if steps and not done < steps[0] <= steps[1] <= num_steps:
            raise UserError(
                f"--profile_steps={steps[0]}:{steps[1]}, but this run's steps are {done + 1} to "
                f"{num_steps} (config.train.num_steps)"
            )
        self._steps = steps if steps and is_first() else (0, 0)
        self._directory, self._running = folder / "profile", False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()

    def run(self, number: int, update: Callable[..., Any], *args: Any) -> Any:
        """`update(*args)`, which is step `number`."""
        if number == self._steps[0]:
            jax.block_until_ready(args)
            jax.profiler.start_trace(self._directory)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = update(*args)
        if number == self._steps[1]:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            self._running = False
            print(
                f"steps {self._steps[0]} to {number} are traced in profile of --workdir", flush=True
            )
        return result
