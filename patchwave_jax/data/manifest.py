"""The manifest of a dataset: what was built, from which files, and how to index it.

A *recording* is one uninterrupted stretch of audio: a file, or several consecutive files that
were cut from one track. A record is a piece of 2**17 samples of a recording (its last one may be
shorter), so a window of a million samples reads eight or nine records.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec

from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError, names_file
from patchwave_jax.runtime.storage import is_url, names_url, replacing

VERSION = "1.0.0"  # of all datasets, which share one format
RECORD_SAMPLES = 2**17
SPLITS = ("train", "validation", "test")
DATASETS = ("piano_demo", "youtube_mix", "maestro", "audio_folder")
FILENAME = "manifest.json"


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One source file. `num_samples` is at 16 kHz; rate and channels are the source's own."""

    name: str
    sha256: str
    num_samples: int
    source_rate: int
    source_channels: int
    split: str
    recording: str


@dataclasses.dataclass(frozen=True)
class RecordingEntry:
    """One recording and its records, numbered from 0 within the split."""

    name: str
    split: str
    num_samples: int
    first_record: int
    num_records: int


@dataclasses.dataclass(frozen=True)
class SkippedEntry:
    """A source file that was skipped, and why. A missing file has an empty hash."""

    name: str
    sha256: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a built dataset, so that its shards need not be opened.

    `files` and `recordings` have the order of the records, split by split.
    """

    dataset: str
    files: tuple[FileEntry, ...]
    recordings: tuple[RecordingEntry, ...]
    skipped: tuple[SkippedEntry, ...]
    version: str = VERSION
    sample_rate: int = SAMPLE_RATE
    record_samples: int = RECORD_SAMPLES

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits with audio, in the order of `SPLITS`."""
        return tuple(split for split in SPLITS if any(r.split == split for r in self.recordings))

    def to_json(self) -> str:
        """The text of the file, deterministic."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n"


def make(dataset: str, files: list[FileEntry], skipped: list[SkippedEntry]) -> Manifest:
    """The manifest of `files`, which are in the order in which they will be stored."""
    files = sorted(files, key=lambda entry: SPLITS.index(entry.split))  # stable
    lengths: dict[tuple[str, str], int] = {}
    for entry in files:
        key = entry.split, entry.recording
        lengths[key] = lengths.get(key, 0) + entry.num_samples
    recordings: list[RecordingEntry] = []
    records: dict[str, int] = dict.fromkeys(SPLITS, 0)
    for (split, name), num_samples in lengths.items():
        num_records = -(-num_samples // RECORD_SAMPLES)
        recordings.append(RecordingEntry(name, split, num_samples, records[split], num_records))
        records[split] += num_records
    return Manifest(dataset, tuple(files), tuple(recordings), tuple(skipped))


def default_data_dir() -> Path:
    """`$PATCHWAVE_DATA_DIR`, or `~/.cache/patchwave_jax/data`."""
    given = os.environ.get("PATCHWAVE_DATA_DIR")
    return Path(given).expanduser() if given else Path.home() / ".cache/patchwave_jax/data"


def dataset_dir(data_dir: str | os.PathLike[str], dataset: str) -> Path:
    """The folder of `dataset`'s shards and manifest; a local copy if `data_dir` is a URL."""
    if dataset not in DATASETS:
        raise UserError(f"dataset {dataset!r} is unknown; use one of {', '.join(DATASETS)}")
    if is_url(data_dir):
        url = f"{os.fspath(data_dir).rstrip('/')}/{dataset}/{VERSION}"
        return local_copy(url, dataset, default_data_dir() / "remote")
    return Path(data_dir).expanduser() / dataset / VERSION


@functools.cache
def local_copy(url: str, dataset: str, cache: Path) -> Path:
    """The copy, in `cache`, of the built dataset whose files are at `url`.

    Any file system that fsspec supports will do. The copy is named by the manifest's hash, so
    another dataset at the same URL is another copy.

    Raises:
      UserError: if it can't be read, with the cause, or the disk is full.
    """
    with names_url(url):
        system, root = fsspec.core.url_to_fs(url)
        try:
            content = system.cat_file(f"{root}/{FILENAME}")
        except FileNotFoundError:
            raise UserError(
                f"{url} holds no dataset; build {dataset} on a disk and copy its folder there: "
                f"gcloud storage cp -r DATA_DIR/{dataset} {url.rsplit('/', 2)[0]}/"
            ) from None
    target = cache / hashlib.sha256(content).hexdigest()[:16]
    if target.exists():
        return target
    print(f"copying {url} to {target}", flush=True)
    with names_file(target), replacing(target) as copy:
        copy.mkdir(parents=True)
        with names_url(url):
            for name in system.find(root):
                path = copy / os.path.relpath(name, root)
                with names_file(path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(name, str(path))
    return target


def load(data_dir: str | os.PathLike[str], dataset: str) -> tuple[Manifest, str]:
    """A built dataset's manifest and the SHA-256 of its file.

    Raises:
      UserError: with the command that builds it, if it is not built or its manifest is damaged.
    """
    path = dataset_dir(data_dir, dataset) / FILENAME
    source = "" if dataset == "piano_demo" else " --source=DIR"
    command = (
        f"python -m patchwave_jax.data.build --dataset={dataset}{source} --data_dir={data_dir}"
    )
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{dataset} is not built in {data_dir}; build it: {command}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    try:
        manifest = _from_json(json.loads(content))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); rebuild: {command} --overwrite") from error
    return manifest, hashlib.sha256(content).hexdigest()


def _from_json(fields: dict[str, Any]) -> Manifest:
    fields = dict(fields)
    files = tuple(FileEntry(**entry) for entry in fields.pop("files"))
    recordings = tuple(RecordingEntry(**entry) for entry in fields.pop("recordings"))
    skipped = tuple(SkippedEntry(**entry) for entry in fields.pop("skipped"))
    return Manifest(files=files, recordings=recordings, skipped=skipped, **fields)
