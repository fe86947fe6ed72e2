"""The metrics of a run: `metrics.jsonl`, TensorBoard, and a progress bar or lines."""

import json
import math
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int16
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import audio, scalar
from tqdm import tqdm

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.runtime.distributed import is_first
from patchwave_jax.runtime.storage import write_atomically

_pb: Any = event_pb2


class MetricsWriter:
    """Metrics of one run. A context manager."""

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        first_step: int,
        num_steps: int,
        max_minutes: float = 0.0,
    ):
        """Opens the logs of `workdir`; rows past `first_step`, which will be repeated, are removed.

        The run ends after `num_steps` or, if that is not 0, `max_minutes`. Of several processes
        only the first writes.
        """
        self._path = Path(workdir) / "metrics.jsonl"
        text = self._path.read_text(errors="replace") if self._path.exists() else ""
        rows = text.splitlines()
        kept = [row for row in rows if _step_of(row) <= first_step]
        first = is_first()
        if first and len(kept) < len(rows):
            write_atomically(self._path, "".join(f"{row}\n" for row in kept))
        self._file = (self._path if first else Path(os.devnull)).open("a")
        # Not tensorboardX's SummaryWriter, whose thread dies silently on a full disk.
        board = Path(workdir) / "tensorboard"
        board.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._board = RecordWriter(str(board / name)) if first else None
        self._record(0, file_version="brain.Event:2")
        # Makes TensorBoard drop what other files hold of the steps from here on.
        restart = _pb.SessionLog(status=_pb.SessionLog.START)
        self._record(first_step + 1, session_log=restart)
        self._flush()
        minutes = [json.loads(row).get("minutes", 0.0) for row in kept[-1:]]
        self._start = time.monotonic() - 60 * (minutes[0] if minutes else 0.0)
        self._max_minutes = max_minutes or math.inf
        self._bar = tqdm(
            initial=first_step,
            total=num_steps,
            disable=not (first and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
        )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._board:
            self._board.close()
        self._file.close()

    @property
    def minutes(self) -> float:
        """Wall-clock minutes of the run, over restarts."""
        return (time.monotonic() - self._start) / 60

    def advance(self) -> None:
        """Advances the progress bar by a step."""
        self._bar.update()

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Records `values` of `kind` ('train' or 'validation') after `step` steps."""
        row = {"step": step, "kind": kind, "minutes": round(self.minutes, 4), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._record(step, summary=scalar(f"{kind}/{name}", value))
        self._flush()
        bits = values["nll_bits"]
        if kind == "train":
            per_second = values["targets_per_second"]
            rate = f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2f}"
            self._bar.set_postfix_str(f"{bits:.3f} bits, {rate} targets/s")
            if self._bar.disable:
                left = (self._bar.total - step) * values["seconds_per_step"] / 60
                left = max(0.0, min(left, self._max_minutes - self.minutes))
                print(
                    f"step {step}/{self._bar.total}: {bits:.3f} bits/sample, "
                    f"{rate} targets/s, {left:.1f} min left",
                    flush=True,
                )
        else:
            self.say(f"step {step}: {kind} {bits:.4f} bits/sample after {self.minutes:.1f} min")

    def clips(self, step: int, pcm: Int16[np.ndarray, "B T"]) -> None:
        """Adds clips made after `step` steps to TensorBoard."""
        for i, clip in enumerate(pcm):
            sound = audio(f"sample/{i}", clip / 2.0**15, sample_rate=SAMPLE_RATE)
            self._record(step, summary=sound)
        self._flush()

    def _record(self, step: int, **what: Any) -> None:
        if self._board:
            event = _pb.Event(wall_time=time.time(), step=step, **what)
            self._board.write(event.SerializeToString())

    def _flush(self) -> None:
        if self._board:
            self._board.flush()

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        tqdm.write(text)
        sys.stdout.flush()


def _step_of(row: str) -> float:
    try:
        return float(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        logging.warning("metrics.jsonl: dropped an incomplete line")
        return float("inf")
