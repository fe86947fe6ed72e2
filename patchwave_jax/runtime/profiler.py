"""Profiler traces of training steps, for TensorBoard's profile plugin and XProf."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from patchwave_jax.errors import UserError
from patchwave_jax.runtime.distributed import is_first

MAX_STEPS = 100  # a trace holds every operation of every step
Steps = tuple[int, int]  # first and last, counted from 1


def parse_steps(flag: str) -> Steps:
    """Parses `--profile_steps=FIRST:LAST`. Raises `UserError` if that is not a valid range."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", flag)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last < first + MAX_STEPS:
        raise UserError(
            f"--profile_steps={flag} must be FIRST:LAST with at most {MAX_STEPS} steps, as in 10:13"
        )
    return first, last


class StepProfiler:
    """Runs steps and traces the requested ones to WORKDIR/profile. A context manager.

    Each step is annotated with its number. Of several processes, only the first is traced.
    """

    def __init__(self, steps: Steps | None, folder: Path, done: int, num_steps: int):
        """For a run that has done `done` of `num_steps` steps; no trace if `steps` is None.

        Raises:
          UserError: if the run doesn't include these steps.
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
        """Returns `update(*args)`, which is step `number`."""
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
            print(f"traced steps {self._steps[0]} to {number} in profile of --workdir", flush=True)
        return result
