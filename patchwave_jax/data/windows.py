"""Training windows and evaluation clips of a split.

A step's batch is a pure function of (seed, step, row): the same whatever the number of
processes, and resumable from the step number alone.
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

# What a key is for, so that streams under one seed are unrelated.
_EPOCH, _POSITIONS, _AUGMENT, _REDRAW = 0, 1, 2, 3
_MAX_REDRAWS = 100  # for one row; then hardly anything is left to train on


class Windows:
    """A grain data source whose elements are the batches of successive steps.

    The starts of all windows that lie within a recording are the positions. Training takes them
    without replacement, in a new order every epoch, from all of them or from `distinct_positions`
    that are spread uniformly over them and fixed by the seed (the paper trains on 10 million).
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
          split: Where to draw from.
          window_samples: Length of a window.
          batch_size: Rows of the global batch.
          quantiser: One of `quantisers.NAMES`.
          seed: Non-negative; decides the order, the distinct positions and the augmentation.
          distinct_positions: How many positions to train on; None for all.
          rows: This process' rows of the global batch; None for all.
          segments: So many steps in a row read the same windows, one such part of them after the
            other: for networks that carry a state along.
          silent_samples: So many at the start of every other row become silence.
          gain_db: Each row is made louder or softer by up to this, uniformly in dB.
          pitch_semitones: Each row is resampled by up to this, uniformly in semitones. Near the
            end of a recording a row that needs a longer stretch starts earlier than its position.

        Raises:
          UserError: if no recording is as long as a window, or an argument is out of range.
        """
        for name, value, least in (
            ("window_samples", window_samples, 1),
            ("batch_size", batch_size, 1),
            ("segments", segments, 1),
            ("seed", seed, 0),
            ("distinct_positions", 1 if distinct_positions is None else distinct_positions, 1),
            ("gain_db", gain_db, 0),
            ("pitch_semitones", pitch_semitones, 0),
        ):
            if value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        self.split, self.window_samples, self.batch_size = split, window_samples, batch_size
        self.rows = range(batch_size) if rows is None else rows
        if any(not 0 <= row < batch_size for row in self.rows):
            raise UserError(f"rows {self.rows} reach beyond batch_size {batch_size}")
        self._segments, self._silent_samples = segments, silent_samples
        self._quantiser, self._seed = quantisers.get(quantiser), seed
        self._gain_db, self._pitch_semitones = gain_db, pitch_semitones
        self._damages: set[str] = set()  # that were told

        lengths = np.array([recording.num_samples for recording in split.recordings], np.int64)
        counts = np.maximum(lengths - window_samples + 1, 0)
        self._lengths, self._first_positions = lengths, np.concatenate([[0], np.cumsum(counts)])
        self.num_positions = int(counts.sum())
        if self.num_positions == 0:
            raise UserError(
                f"no recording of {split.dataset} {split.name} holds a window of "
                f"window_samples={window_samples}: the longest has {lengths.max()} samples; "
                "lower config.context_samples or use longer recordings"
            )
        if short := int((counts == 0).sum()):
            logging.info(
                "%d of %d recordings of %s %s are shorter than a window of %d samples: unused",
                *(short, len(lengths), split.dataset, split.name, window_samples),
            )
        if distinct_positions is not None and distinct_positions > self.num_positions:
            logging.warning(
                "distinct_positions=%d, but %s %s has %d positions: using all of them",
                *(distinct_positions, split.dataset, split.name, self.num_positions),
            )
        self.epoch_positions = min(distinct_positions or self.num_positions, self.num_positions)

    def __len__(self) -> int:
        """Steps on end: training never runs out of epochs."""
        return MAX_SIZE // self.batch_size

    def __repr__(self) -> str:
        return f"Windows({self.split!r}, window_samples={self.window_samples})"

    def locate(self, step: int, row: int) -> tuple[int, int]:
        """Recording and start of one row's window in its recording."""
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
          start: int64 [rows], where in its recording the row's audio begins.
          redrawn: int32 [rows], windows that were damaged, and another drawn in their place.

        Raises:
          UserError: naming the shard, if it is damaged and the split does not skip that.
        """
        index, segment = divmod(index, self._segments)
        recordings, starts = self._locate(index, self.rows)
        codes = np.empty((len(self.rows), self.window_samples), np.uint8)
        redrawn = np.zeros(len(self.rows), np.int32)
        for i, row in enumerate(self.rows):
            while True:
                try:
                    pcm, start = self._pcm(index, row, int(recordings[i]), int(starts[i]))
                    break
                except DamagedShardError as error:
                    if not self.split.skip_damaged or redrawn[i] == _MAX_REDRAWS:
                        raise
                    if str(error) not in self._damages:
                        self._damages.add(str(error))
                        logging.warning("skipped: %s", error)
                    key = _REDRAW, self._seed, index, row, int(redrawn[i])
                    position = random_bits(1, *key) % np.uint64(self.num_positions)
                    recordings[i : i + 1], starts[i : i + 1] = self._place(position)
                    redrawn[i] += 1
            codes[i], starts[i] = self._quantiser.encode(pcm), start
            if (index * self.batch_size + row) % 2:
                codes[i, : self._silent_samples] = quantisers.SILENCE
        size = self.window_samples // self._segments
        return {
            "codes": codes[:, segment * size : (segment + 1) * size],
            "recording": recordings.astype(np.int32),
            "start": starts + segment * size,
            "redrawn": redrawn,
        }

    def _pcm(
        self, step: int, row: int, recording: int, start: int
    ) -> tuple[Int16[np.ndarray, " T"], int]:
        """A window's PCM, augmented, and where in the recording it was read."""
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


def batches(
    windows: Windows, first_step: int, num_steps: int | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `first_step` and on, read ahead by two threads; without end by default."""
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    iterator: Any = iter(grain.MapDataset.source(windows).to_iter_dataset(options))
    iterator.set_state({"next_index": first_step})
    return itertools.islice(iterator, num_steps)


class Clip(NamedTuple):
    """A stretch of a recording to evaluate on. `start` counts from the recording's start."""

    recording: int
    file: str
    start: int
    length: int


def clips(
    split: Split, clip_samples: int | None, drop_last: bool, per_file: bool = False
) -> Iterator[Clip]:
    """Consecutive clips that don't overlap, from the start of each recording.

    Args:
      split: What to cut up.
      clip_samples: Length of a clip; None for one clip per recording (per file, with `per_file`).
      drop_last: Leave out what remains at the end and is shorter than a clip.
      per_file: Start anew at each source file, as SaShiMi's protocol does.
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
