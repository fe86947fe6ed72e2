"""Base of the TFDS builders: scans the sources, writes the manifest, streams the records.

TFDS collects the examples of a generator in a shuffler that spills to disk through TensorFlow from
1000 MiB on. Order matters here and nothing is shuffled, so `_shard_iterators_per_split` passes the
same generators to TFDS' shard-by-shard path instead: memory is bounded by one shard for a split
of any size, and TensorFlow is never needed.
"""

import abc
import dataclasses
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from patchwave_jax.data import audio, manifest
from patchwave_jax.data.manifest import RECORD_SAMPLES, FileEntry, Manifest, SkippedEntry
from patchwave_jax.errors import UserError, listed

_pb: Any = tf_example_pb2
SHARD_RECORDS = 256  # 64 MiB of PCM, which a build holds in memory


class _Ordered(ExampleWriter):
    """Sorts the features of a record; protobuf's own order differs between processes."""

    def write(self, path: Any, examples: Iterable[Any]) -> Any:
        ordered = (
            (key, _pb.Example.FromString(data).SerializeToString(deterministic=True))
            for key, data in examples
        )
        return super().write(path, ordered)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A source file. Consecutive files with the same `track` and split are one recording."""

    path: Path
    name: str
    split: str
    track: str


class AudioBuilder(
    tfds.core.ShardBasedBuilder, tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """Base of the builders. A subclass assigns files to splits and tracks: `plan`."""

    VERSION = tfds.core.Version(manifest.VERSION)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {manifest.VERSION: "First release."}
    SOURCE: ClassVar[Path | None] = None  # of sources that are part of the package

    def __init__(self, *, skip_bad: bool = False, **kwargs: Any):
        """Like TFDS builders. With `skip_bad`, files that can't be used are skipped and listed."""
        super().__init__(**{"file_format": "array_record", **kwargs})
        self._skip_bad = skip_bad
        self.needed_bytes = 0  # an upper bound, set by the scan

    def _example_writer(self) -> ExampleWriter:
        return _Ordered(super()._example_writer().file_format)

    @staticmethod
    @abc.abstractmethod
    def plan(source: Path) -> list[Planned]:
        """The files to build from, in order.

        Raises:
          UserError: naming every stray or missing file.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "audio": tfds.features.Tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
            "recording": tfds.features.Text(),
            "file": tfds.features.Text(),  # the file in which the record starts
            "start": np.int64,  # in samples from the recording's start
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict({"sample_rate": audio.SAMPLE_RATE}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        source = self.SOURCE or Path(dl_manager.manual_dir)
        planned = self.plan(source)
        self._manifest = built = scan(self.name, planned, self._skip_bad)
        self.needed_bytes = sum(2 * entry.num_samples for entry in built.files)
        check_space(self.data_dir_root, self.needed_bytes)
        (Path(self.data_path) / manifest.FILENAME).write_text(built.to_json())
        paths = {file.name: file.path for file in planned}
        progress = tqdm.tqdm(
            desc="Writing", total=len(built.files), unit="file", disable=None, leave=False
        )
        return {
            split: self._generate_examples(
                [entry for entry in built.files if entry.split == split], paths, progress
            )
            for split in built.splits
        }

    def _generate_examples(
        self, entries: Sequence[FileEntry], paths: Mapping[str, Path], progress: tqdm.tqdm
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The records of one split, numbered in order."""
        key = 0
        for recording, group in itertools.groupby(entries, lambda entry: entry.recording):
            start, files = 0, list(group)
            ends = np.cumsum([entry.num_samples for entry in files])
            pieces = itertools.chain.from_iterable(
                _pieces(entry, paths[entry.name], progress) for entry in files
            )
            for pcm in _regrouped(pieces, RECORD_SAMPLES):
                file = files[int(np.searchsorted(ends, start, side="right"))].name
                yield key, {"audio": pcm, "recording": recording, "file": file, "start": start}
                key, start = key + 1, start + pcm.size
        if progress.n == progress.total:
            progress.close()

    def _shard_iterators_per_split(
        self, dl_manager: Any
    ) -> dict[str, list[Callable[[], Iterator[tuple[int, dict]]]]]:
        shards = {}
        for split, examples in self._split_generators(dl_manager).items():
            recordings = [r for r in self._manifest.recordings if r.split == split]
            num_records = sum(r.num_records for r in recordings)
            # TFDS runs these one after the other; each continues the same stream.
            take = functools.partial(itertools.islice, examples, SHARD_RECORDS)
            num_shards = -(-num_records // SHARD_RECORDS)
            shards[split] = [take] * (num_shards - 1) + [functools.partial(iter, examples)]
        return shards


def _pieces(entry: FileEntry, path: Path, progress: tqdm.tqdm) -> Iterator[np.ndarray]:
    """A file's PCM, which must have the same length as when it was scanned."""
    num_samples = 0
    for block in audio.blocks(path):
        num_samples += block.size
        yield block
    if num_samples != entry.num_samples:
        raise UserError(f"{path} changed during the build; run it again when it is complete")
    progress.update()


def _regrouped(pieces: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Splits the concatenated `pieces` into arrays of `size`; the last one may be shorter."""
    pending = np.zeros(0, np.int16)
    for piece in pieces:
        pending = np.concatenate([pending, piece])
        while pending.size >= size:
            yield pending[:size]
            pending = pending[size:]
    if pending.size:
        yield pending


def scan(dataset: str, planned: Sequence[Planned], skip_bad: bool) -> Manifest:
    """Reads every file and returns the manifest.

    Raises:
      UserError: listing every file that can't be used (without `skip_bad`), or the splits without
        a usable file.
    """

    def examine(file: Planned) -> audio.SourceInfo | audio.BadAudioError:
        try:
            file.name.encode()
            return audio.scan(file.path)
        except UnicodeEncodeError:
            return audio.BadAudioError(file.path, "has a name that is not UTF-8; rename it")
        except audio.BadAudioError as error:
            return error

    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = tqdm.tqdm(planned, desc="Reading", unit="file", disable=None, leave=False)
        found = list(zip(progress, pool.map(examine, planned), strict=True))
    bad = [info for _, info in found if isinstance(info, audio.BadAudioError)]
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {len(planned)} files can't be used:\n"
            + "".join(f"  {error}\n" for error in bad)
            + "Repair them, or skip them with --skip_bad"
        )
    skipped, runs = [], {}
    for file, info in found:
        if isinstance(info, audio.BadAudioError):
            sha256 = audio.sha256(file.path) if file.path.is_file() else ""
            skipped.append(SkippedEntry(file.name, sha256, info.reason))
        else:  # a skipped file interrupts the recording
            runs.setdefault((file.split, file.track, len(skipped)), []).append((file, info))
    entries = []
    for (split, _, _), run in runs.items():
        first, last = run[0][0].name, run[-1][0].name
        common = {"split": split, "recording": first if first == last else f"{first}..{last}"}
        for file, info in run:
            entries.append(FileEntry(file.name, **dataclasses.asdict(info), **common))
    if lost := {file.split for file in planned} - {entry.split for entry in entries}:
        names = listed([entry.name for entry in skipped], 5)
        raise UserError(
            f"{dataset} has no usable file in {', '.join(sorted(lost))}; add files, or move "
            f"those that can't be used ({names}) out of the source"
        )
    return manifest.make(dataset, entries, skipped)


def check_space(directory: str | os.PathLike[str], needed_bytes: int) -> None:
    """Raises `UserError` if the disk of `directory` has less than `needed_bytes` left."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise UserError(
            f"the dataset takes up to {needed_bytes / 2**20:.0f} MiB and the disk of {directory} "
            f"has {free / 2**20:.0f} MiB left; make room, or choose another --data_dir"
        )
