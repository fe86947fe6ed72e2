"""Guards against steps that are not finite: they are skipped, counted, and their rows kept.

The device itself skips such a step (see `step.py`). The metrics of all steps stay on the device
until they are read together, so that the guard never makes it wait.
"""

import collections
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from patchwave_jax.data.windows import Windows
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.runtime.distributed import is_first, to_host

MOST_IN_A_ROW = 10  # skipped steps; then the run ends
MOST_KEPT = 20  # batches, of those that were not finite
SPIKE_HISTORY = 100  # steps that a loss is compared with
SPIKE_DEVIATIONS = 8.0  # above their median, in normalised median absolute deviations
SPIKE_NATS = 0.1  # and at least


class NonFiniteGuard:
    """The guard of one run, which keeps rows in `folder`. `say` prints a line for the user."""

    def __init__(self, windows: Windows, folder: Path, say: Callable[[str], None]):
        self._windows, self._directory, self._say = windows, folder / "nonfinite", say
        self._pending: list[tuple[int, dict[str, Any], int]] = []
        self._history: collections.deque[float] = collections.deque(maxlen=SPIKE_HISTORY)
        self.in_a_row = 0  # skipped steps, up to the newest one read

    def add(self, step: int, metrics: dict[str, Any], redrawn: int) -> None:
        """Keeps the metrics of step `step`; `redrawn` counts its damaged windows."""
        self._pending.append((step, metrics, redrawn))

    def read(self) -> dict[str, float]:
        """The newest step's loss and gradient norm, and the steps skipped since the last read."""
        steps = [step for step, _, _ in self._pending]
        measured = to_host([metrics for _, metrics, _ in self._pending])
        redrawn = sum(count for _, _, count in self._pending)
        self._pending.clear()
        skipped, nats, norm = 0, math.nan, math.nan
        for step, metrics in zip(steps, measured, strict=True):
            nats, norm = float(metrics["nll_nats"]), float(metrics["gradient_norm"])
            row_nats = np.stack(metrics["row_nats"], 1).reshape(-1)  # in the batch's order
            if math.isfinite(nats) and math.isfinite(norm):
                self.in_a_row = 0
                self._look_for_spike(step, nats, row_nats)
            else:
                self.in_a_row, skipped = self.in_a_row + 1, skipped + 1
                self._keep(step, nats, norm, row_nats)
        return {
            "nll_nats": nats,
            "gradient_norm": norm,
            "skipped_steps": skipped,
            "redrawn_windows": redrawn,
        }

    def require_finite(self, ended: bool, latest: int | None) -> None:
        """Raises `UserError` if too many steps in a row, or the run's last step, were skipped."""
        if self.in_a_row < (1 if ended else MOST_IN_A_ROW):
            return
        kept = "no checkpoint is there" if latest is None else f"step {latest} is the last good one"
        raise UserError(
            f"the last {self.in_a_row} steps had a loss or a gradient that is not finite; {kept}. "
            f"Their rows are in {self._directory.name} of --workdir. Lower "
            "config.train.learning_rate or set config.train.clip_norm, and start again from there; "
            "--config.run.debug_nans=True finds the operation"
        )

    def _places(self, batch: dict[str, np.ndarray], rows: Int64[np.ndarray, " n"]) -> str:
        recordings = self._windows.split.recordings
        places = [
            f"{recordings[batch['recording'][row]].name} from sample {batch['start'][row]}"
            for row in rows[:5]
        ]
        return ", ".join(places) + (f" and {rows.size - 5} more" if rows.size > 5 else "")

    def _keep(self, step: int, nats: float, norm: float, row_nats: Float[np.ndarray, " B"]) -> None:
        if not is_first():
            return
        batch = self._windows[step - 1]  # the same batch again: it is a function of the step
        finite = np.isfinite(row_nats)
        bad = np.arange(finite.size) if finite.all() else np.flatnonzero(~finite)
        self._directory.mkdir(exist_ok=True)
        path = self._directory / f"step-{step}.npz"
        if full := len(list(self._directory.iterdir())) >= MOST_KEPT:
            path = self._directory
        else:
            kept = {"row": bad, **{k: v[bad] for k, v in batch.items()}}
            np.savez(path, allow_pickle=False, **kept)
        place = path.relative_to(self._directory.parent)
        self._say(
            f"step {step} skipped: its loss is {nats}, its gradient's norm {norm}; rows: "
            f"{self._places(batch, bad)}; {'enough' if full else 'kept'} in {place} of --workdir"
        )

    def _look_for_spike(self, step: int, nats: float, row_nats: Float[np.ndarray, " B"]) -> None:
        if len(self._history) == SPIKE_HISTORY:
            median = statistics.median(self._history)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self._history)
            if nats > median + max(SPIKE_NATS, SPIKE_DEVIATIONS * spread):
                batch = self._windows[step - 1]
                most = np.array([row_nats.argmax()])
                self._say(
                    f"step {step}: the loss spiked to {nats / LN2:.3f} bits, from a median "
                    f"of {median / LN2:.3f} over {SPIKE_HISTORY} steps; most of it from "
                    f"{self._places(batch, most)}"
                )
        self._history.append(nats)
