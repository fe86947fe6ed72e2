"""Random access to a built split: `open_split(...).read(recording, start, count)`."""

import dataclasses
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from jaxtyping import Int16

from patchwave_jax.data import manifest
from patchwave_jax.data.manifest import Manifest
from patchwave_jax.errors import UserError


class DamagedShardError(UserError):
    """A shard that can't be read, or is not the one that was built."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One of a recording's files; its length is at 16 kHz."""

    name: str
    num_samples: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """A stretch of audio without a break: its files, one after the other."""

    name: str
    files: tuple[SourceFile, ...]

    @property
    def num_samples(self) -> int:
        """Length in samples at 16 kHz."""
        return sum(file.num_samples for file in self.files)


class Split:
    """One split of a built dataset. Shards are opened at the first read; can be pickled.

    Attributes:
      name: "train", "validation" or "test".
      dataset: The dataset's name.
      recordings: In the order of their indices.
      manifest_hash: SHA-256 of the dataset's manifest, which pins every source file.
      skip_damaged: Whether those who need not read all of it pass by what is damaged.
    """

    def __init__(
        self,
        directory: Path,
        built: Manifest,
        manifest_hash: str,
        name: str,
        skip_damaged: bool = False,
    ):
        """Of the dataset in `directory`, described by `built`. Use `open_split`."""
        self.skip_damaged = skip_damaged
        self.name, self.dataset, self.manifest_hash = name, built.dataset, manifest_hash
        entries = [entry for entry in built.recordings if entry.split == name]
        self.recordings = tuple(
            Recording(
                entry.name,
                tuple(
                    SourceFile(file.name, file.num_samples)
                    for file in built.files
                    if file.split == name and file.recording == entry.name
                ),
            )
            for entry in entries
        )
        self._lengths = [entry.num_samples for entry in entries]
        self._first_records = [entry.first_record for entry in entries]
        self._record_samples = built.record_samples
        self._directory = directory
        self._records: Sequence[Any] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Split({self.dataset!r}, {self.name!r}, manifest {self.manifest_hash[:12]})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, recording: int, start: int, count: int) -> Int16[np.ndarray, " count"]:
        """PCM of `count` samples from `start` of a recording. Threads may read at once.

        Raises:
          IndexError: if the recording doesn't hold these samples.
          UserError: naming the shard, if it is damaged.
        """
        if start < 0 or count < 0 or start + count > self._lengths[recording]:
            raise IndexError(
                f"samples {start} to {start + count} of recording {recording}, which has "
                f"{self._lengths[recording]}"
            )
        pcm, size = np.empty(count, np.int16), self._record_samples
        for number in range(start // size, -(-(start + count) // size)):
            record = self._read_record(recording, number)
            low, high = max(start, number * size), min(start + count, number * size + record.size)
            pcm[low - start : high - start] = record[low - number * size : high - number * size]
        return pcm

    def excerpts(
        self, stretches: Iterable[tuple[int, int, int]]
    ) -> Iterator[Int16[np.ndarray, " _"]]:
        """PCM of each `(recording, start, count)`, without the damaged ones if they may be skipped.

        Raises:
          UserError: as `read`; or if nothing is left.
        """
        found, last = 0, None
        for recording, start, count in stretches:
            try:
                pcm = self.read(recording, start, count)
            except DamagedShardError as error:
                if not self.skip_damaged:
                    raise
                logging.warning("passed by: %s", error)
                last = error
                continue
            found += 1
            yield pcm
        if not found:
            raise UserError(f"nothing of {self!r} can be read: {last}")

    def _read_record(self, recording: int, number: int) -> Int16[np.ndarray, " _"]:
        key = self._first_records[recording] + number
        try:
            record = self._open()[key]
        except Exception as error:  # array_record, riegeli and protobuf each have their own kinds
            raise DamagedShardError(
                f"{self._shard_of(key)} is damaged: {_first_line(error)}; build the dataset again "
                "with --overwrite, or train without that part: --config.data.skip_damaged=True"
            ) from error
        begin = number * self._record_samples
        expected = min(self._record_samples, self._lengths[recording] - begin)
        if record["start"] != begin or record["audio"].size != expected:
            raise DamagedShardError(
                f"{self._shard_of(key)} does not belong to its manifest; "
                "build the dataset again with --overwrite"
            )
        return record["audio"]

    def _open(self) -> Sequence[Any]:
        with self._lock:
            records = self._records
            if records is None:
                records = _tfds_builder(self._directory).as_data_source(split=self.name)
                self._records = records
            return records

    def _shard_of(self, key: int) -> str:
        """The path of the shard that holds record `key`."""
        info = _tfds_builder(self._directory).info.splits[self.name]
        ends = itertools.accumulate(info.shard_lengths)
        return next(
            (os.fspath(path) for path, end in zip(info.filepaths, ends, strict=True) if key < end),
            os.fspath(self._directory),
        )


def open_split(
    data_dir: str | os.PathLike[str], dataset: str, split: str, skip_damaged: bool = False
) -> Split:
    """The named split of a built dataset.

    Raises:
      UserError: if the dataset is unknown or not built (with the command that builds it), or
        has no such split (with those it has).
    """
    built, manifest_hash = manifest.load(data_dir, dataset)
    if split not in built.splits:
        raise UserError(f"{dataset} has no split {split!r}; it has {', '.join(built.splits)}")
    directory = manifest.dataset_dir(data_dir, dataset)
    return Split(directory, built, manifest_hash, split, skip_damaged)


def _tfds_builder(directory: Path) -> Any:
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:
        raise UserError(
            f"{directory} can't be opened ({_first_line(error)}); "
            "build the dataset again with --overwrite"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
