"""Random access to a built split: `open_split(...).read(recording, start, count)`."""

import dataclasses
import itertools
import os
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
    """A shard that can't be read or does not match the manifest."""


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One of the files of a recording. `num_samples` is at 16 kHz."""

    name: str
    num_samples: int


@dataclasses.dataclass(frozen=True)
class Recording:
    """One uninterrupted stretch of audio: the files that follow one another in it."""

    name: str
    files: tuple[SourceFile, ...]

    @property
    def num_samples(self) -> int:
        """Length in samples at 16 kHz."""
        return sum(file.num_samples for file in self.files)


class Split:
    """One split of a built dataset. Shards are opened by the first read. Can be pickled.

    Attributes:
      name: "train", "validation" or "test".
      dataset: The dataset's name.
      recordings: Its recordings, sorted by index.
      manifest_hash: SHA-256 of the dataset's manifest, which identifies every source file.
      skip_damaged: Whether readers that don't need all of it may skip damaged parts.
    """

    def __init__(
        self,
        directory: Path,
        built: Manifest,
        manifest_hash: str,
        name: str,
        skip_damaged: bool = False,
    ):
        """Use `open_split`."""
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
        self._entries, self._record_samples = entries, built.record_samples
        self._directory = directory
        self._records: Sequence[Any] | None = None

    def __repr__(self) -> str:
        return f"Split({self.dataset!r}, {self.name!r}, manifest {self.manifest_hash[:12]})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_records": None}

    def read(self, recording: int, start: int, count: int) -> Int16[np.ndarray, " count"]:
        """PCM of `count` samples of a recording from `start` on. Thread-safe.

        Raises:
          IndexError: if the recording doesn't have these samples.
          UserError: naming the shard, if it is damaged.
        """
        length = self._entries[recording].num_samples
        if start < 0 or count < 0 or start + count > length:
            raise IndexError(
                f"samples {start} to {start + count} of recording {recording}, which has {length}"
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
        """PCM of each `(recording, start, count)`, except damaged ones if `skip_damaged`.

        Raises:
          UserError: as `read`, or if all of them are damaged.
        """
        found, last = 0, None
        for recording, start, count in stretches:
            try:
                pcm = self.read(recording, start, count)
            except DamagedShardError as error:
                if not self.skip_damaged:
                    raise
                logging.warning("skipped: %s", error)
                last = error
                continue
            found += 1
            yield pcm
        if not found:
            raise UserError(f"nothing of {self!r} can be read: {last}")

    def _read_record(self, recording: int, number: int) -> Int16[np.ndarray, " _"]:
        entry = self._entries[recording]
        key = entry.first_record + number
        try:
            records = self._records
            if records is None:  # two threads may both open them, which is harmless
                records = _tfds_builder(self._directory).as_data_source(split=self.name)
                self._records = records
            record = records[key]
        except Exception as error:  # array_record, riegeli and protobuf have their own exceptions
            raise DamagedShardError(
                f"{self._shard_of(key)} is damaged: {_first_line(error)}; rebuild the dataset "
                "with --overwrite, or train without that part: --config.data.skip_damaged=True"
            ) from error
        begin = number * self._record_samples
        expected = min(self._record_samples, entry.num_samples - begin)
        if record["start"] != begin or record["audio"].size != expected:
            raise DamagedShardError(
                f"{self._shard_of(key)} does not match the manifest; "
                "rebuild the dataset with --overwrite"
            )
        return record["audio"]

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
      UserError: if the dataset is unknown, not built (with the command that builds it), or has no
        such split (with those it has).
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
            "rebuild the dataset with --overwrite"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
