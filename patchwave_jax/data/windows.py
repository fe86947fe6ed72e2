"""Training windows and evaluation clips of a split.

A row of a batch is a pure function of (seed, step, row): it does not depend on the number of
processes, and training resumes from the step number alone.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import soxr
from absl import logging
from jaxtyping import Int16, Int64

from patchwave_jax.data import quantisers
from patchwave_jax.data.index import DamagedShardError, Split
from patchwave_jax.data.permutation import MAX_SIZE, permute, random_bits
from patchwave_jax.errors import UserError

# Purposes of random keys, so that streams with the same seed are unrelated.
_EPOCH, _POSITIONS, _AUGMENT, _REDRAW = 0, 1, 2, 3
_MAX_REDRAWS = 100  # of one row, which means that almost all of the data is damaged


class Windows:
    """A grain data source whose elements are the batches of successive steps.

    A position is a start of a window that lies within one recording. Training takes positions
    without replacement, in a new order every epoch, from all of them or from `distinct_positions`
    that are sampled uniformly and fixed by the seed (the paper trains on 10 million).
    """

    def __init__(
        self,
        split: Split,
        *,
        window_samples: int,
        batch_size: int,
        quantiser: str,
        seed: int,
        distinct_positions: int | None = None,
        rows: Sequence[int] | None = None,
        segments: int = 1,
        silent_samples: int = 0,
        gain_db: float = 0.0,
        pitch_semitones: float = 0.0,
    ):
        """Windows of `split`.

        Args:
          split: The audio.
          window_samples: Length of a window.
          batch_size: Rows of the global batch.
          quantiser: One of `quantisers.NAMES`.
          seed: Non-negative; determines the order, the distinct positions and the augmentation.
          distinct_positions: How many positions to train on; None for all.
          rows: This process' rows of the global batch; None for all.
          segments: Consecutive steps that read the same windows, each its own part of them in
            order: for networks that carry a state from step to step.
          silent_samples: Samples zeroed at the start of every second row.
          gain_db: Maximum change of a row's level in either direction, uniform in dB.
          pitch_semitones: Maximum change of a row's pitch in either direction by resampling,
            uniform in semitones. Near the end of a recording a row that needs more audio than is
            left starts before its position.

        Raises:
          UserError: if no recording is as long as a window, or an argument is out of range.
        """
        _check_minimum(1, window_samples=window_samples, batch_size=batch_size, segments=segments)
        _check_minimum(0, seed=seed, gain_db=gain_db, pitch_semitones=pitch_semitones)
        if distinct_positions is not None:
            _check_minimum(1, distinct_positions=distinct_positions)
        self.split, self.window_samples, self.batch_size = split, window_samples, batch_size
        self.rows = range(batch_size) if rows is None else rows
        if any(not 0 <= row < batch_size for row in self.rows):
            raise UserError(f"rows {self.rows} exceed batch_size {batch_size}")
        self._segments, self._silent_samples = segments, silent_samples
        self._quantiser, self._seed = quantisers.get(quantiser), seed
        self._gain_db, self._pitch_semitones = gain_db, pitch_semitones
        self._logged_damage: set[str] = set()
        self._count_positions()
        if distinct_positions is not None and distinct_positions > self.num_positions:
            logging.warning(
                "distinct_positions=%d, but %s %s has %d positions: using all of them",
                *(distinct_positions, split.dataset, split.name, self.num_positions),
            )
        self.epoch_positions = min(distinct_positions or self.num_positions, self.num_positions)

    def _count_positions(self) -> None:
        """Sets the number of positions and the first one of each recording."""
        split, size = self.split, self.window_samples
        lengths = np.array([recording.num_samples for recording in split.recordings], np.int64)
        counts = np.maximum(lengths - size + 1, 0)
        self._lengths, self._first_positions = lengths, np.concatenate([[0], np.cumsum(counts)])
        self.num_positions = int(counts.sum())
        if self.num_positions == 0:
            raise UserError(
                f"no recording of {split.dataset} {split.name} is as long as a window of "
                f"window_samples={size}: the longest has {lengths.max()} samples; "
                "lower config.context_samples or use longer recordings"
            )
        if short := int((counts == 0).sum()):
            logging.info(
                "%d of %d recordings of %s %s are shorter than a window of %d samples: unused",
                *(short, len(lengths), split.dataset, split.name, size),
            )

    def __len__(self) -> int:
        """Practically infinite: epochs follow one another."""
        return MAX_SIZE // self.batch_size

    def locate(self, step: int, row: int) -> tuple[int, int]:
        """The recording of one row's window and the window's start in it."""
        recordings, starts = self._locate(step // self._segments, range(row, row + 1))
        return int(recordings[0]), int(starts[0])

    def _locate(
        self, step: int, rows: Sequence[int]
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        draws = step * self.batch_size + np.asarray(rows, np.int64)
        epochs, within = np.divmod(draws, self.epoch_positions)
        position = np.empty_like(draws)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            key = (_EPOCH, self._seed, int(epoch))
            position[at] = permute(within[at], self.epoch_positions, *key)
        if self.epoch_positions < self.num_positions:
            position = permute(position, self.num_positions, _POSITIONS, self._seed)
        return self._place(position)

    def _place(
        self, position: Int64[np.ndarray, " rows"]
    ) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Recordings and starts of positions."""
        position = position.astype(np.int64)
        recordings = np.searchsorted(self._first_positions, position, side="right") - 1
        return recordings, position - self._first_positions[recordings]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """This process' rows of the batch of step `index`.

        Returns:
          codes: uint8 [rows, window_samples / segments].
          recording: int32 [rows], index of each row's recording.
          start: int64 [rows], start of each row's audio in its recording.
          redrawn: int32 [rows], how many damaged windows were replaced by another draw.

        Raises:
          UserError: naming the shard, if it is damaged and the split does not skip that.
        """
        step, segment = divmod(index, self._segments)
        recordings, starts = self._locate(step, self.rows)
        codes = np.empty((len(self.rows), self.window_samples), np.uint8)
        redrawn = np.zeros(len(self.rows), np.int32)
        for i, row in enumerate(self.rows):
            place = int(recordings[i]), int(starts[i])
            pcm, recordings[i], starts[i], redrawn[i] = self._read(step, row, *place)
            codes[i] = self._quantiser.encode(pcm)
            if (step * self.batch_size + row) % 2:
                codes[i, : self._silent_samples] = quantisers.SILENCE
        size = self.window_samples // self._segments
        return {
            "codes": codes[:, segment * size : (segment + 1) * size],
            "recording": recordings.astype(np.int32),
            "start": starts + segment * size,
            "redrawn": redrawn,
        }

    def _read(
        self, step: int, row: int, recording: int, start: int
    ) -> tuple[Int16[np.ndarray, " T"], int, int, int]:
        """A window's PCM, its recording and start, and the number of damaged windows before it."""
        redrawn = 0
        while True:
            try:
                pcm, begin = self._augmented(step, row, recording, start)
                return pcm, recording, begin, redrawn
            except DamagedShardError as error:
                if not self.split.skip_damaged or redrawn == _MAX_REDRAWS:
                    raise
                if str(error) not in self._logged_damage:
                    self._logged_damage.add(str(error))
                    logging.warning("skipped: %s", error)
            bits = random_bits(1, _REDRAW, self._seed, step, row, redrawn)
            recordings, starts = self._place(bits % np.uint64(self.num_positions))
            recording, start = int(recordings[0]), int(starts[0])
            redrawn += 1

    def _augmented(
        self, step: int, row: int, recording: int, start: int
    ) -> tuple[Int16[np.ndarray, " T"], int]:
        """A window's PCM after augmentation, and the start of what was read."""
        size = self.window_samples
        if not self._gain_db and not self._pitch_semitones:
            return self.split.read(recording, start, size), start
        bits = random_bits(2, _AUGMENT, self._seed, step, row)
        gain, pitch = bits / 2.0**63 - 1  # uniform in [-1, 1]
        factor = 2.0 ** (pitch * self._pitch_semitones / 12)
        count = min(max(round(size * factor), 1), int(self._lengths[recording]))
        start = min(start, int(self._lengths[recording]) - count)
        pcm = self.split.read(recording, start, count).astype(np.float64)
        if count != size:
            pcm = soxr.resample(pcm, count, size)
        pcm *= 10.0 ** (gain * self._gain_db / 20)
        return np.clip(np.round(pcm), -32768, 32767).astype(np.int16), start


def _check_minimum(minimum: int, **values: float) -> None:
    for name, value in values.items():
        if value < minimum:
            raise UserError(f"{name} is {value}; it must be at least {minimum}")


def batches(
    windows: Windows, first_step: int, num_steps: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from `first_step` on, prefetched by two threads; infinite by default."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator: Any = iter(grain.MapDataset.source(windows).to_iter_dataset(options))
    iterator.set_state({"next_index": first_step})
    return itertools.islice(iterator, num_steps)


class Clip(NamedTuple):
    """A part of a recording to evaluate on. `start` counts from the recording's start."""

    recording: int
    file: str
    start: int
    length: int


def clips(
    split: Split, clip_samples: int | None, drop_last: bool, per_file: bool = False
) -> Iterator[Clip]:
    """Consecutive, non-overlapping clips from the start of each recording.

    Args:
      split: The recordings.
      clip_samples: Length of a clip; None for one clip per recording (per file, with `per_file`).
      drop_last: Leave out a last clip that is shorter than the others.
      per_file: Start a new clip at each source file, as SaShiMi's protocol does.
    """
    if clip_samples is not None and clip_samples < 1:
        raise UserError(f"clip_samples is {clip_samples}; it must be at least 1")
    for index, recording in enumerate(split.recordings):
        ends = list(itertools.accumulate(file.num_samples for file in recording.files))
        begins = [0, *ends[:-1]]
        stretches = (
            list(zip(begins, ends, strict=True)) if per_file else [(0, recording.num_samples)]
        )
        for begin, end in stretches:
            step = clip_samples or end - begin
            for start in range(begin, end, step):
                length = min(step, end - start)
                if length == step or not drop_last:
                    name = recording.files[bisect.bisect_right(ends, start)].name
                    yield Clip(index, name, start, length)
