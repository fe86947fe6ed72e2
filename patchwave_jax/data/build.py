"""Builds a dataset: `python -m patchwave_jax.data.build --dataset=piano_demo`.

A build happens aside and is renamed into place, so a dataset is there whole or not at all.
"""

import argparse
import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from patchwave_jax.data import audio, builder, manifest, remote
from patchwave_jax.data.audio_folder import audio_folder_dataset_builder
from patchwave_jax.data.maestro import maestro_dataset_builder
from patchwave_jax.data.manifest import Manifest
from patchwave_jax.data.piano_demo import piano_demo_dataset_builder
from patchwave_jax.data.youtube_mix import youtube_mix_dataset_builder
from patchwave_jax.errors import UserError, exits_cleanly, shown

_BUILDERS: dict[str, type[builder.AudioBuilder]] = {
    "piano_demo": piano_demo_dataset_builder.Builder,
    "youtube_mix": youtube_mix_dataset_builder.Builder,
    "maestro": maestro_dataset_builder.Builder,
    "audio_folder": audio_folder_dataset_builder.Builder,
}


def ensure_built(dataset: str, data_dir: str | os.PathLike[str]) -> None:
    """Builds `piano_demo` if it is absent.

    Raises:
      UserError: with the command that builds it, if another dataset is absent.
    """
    if dataset == "piano_demo" and not manifest.dataset_dir(data_dir, dataset).exists():
        build(dataset, None, data_dir)
    manifest.load(data_dir, dataset)


def build(
    dataset: str,
    source: str | os.PathLike[str] | None,
    data_dir: str | os.PathLike[str],
    *,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> Manifest:
    """Builds `dataset` from the folder `source` under `data_dir`, or finds it built already.

    Args:
      dataset: One of `manifest.DATASETS`.
      source: The folder with the audio; None for `piano_demo`, which comes with the package.
      data_dir: The root of all built datasets.
      skip_bad: Leave out files that can't be used, and list them in the manifest.
      overwrite: Replace a dataset that was built from other files.

    Raises:
      UserError: naming every stray, missing or unusable file; the difference, if what is built
        is not from these files; the space needed, if there is too little.
    """
    if remote.is_address(data_dir):
        raise UserError(f"{data_dir} is no folder; build in one, then copy it there")
    target = manifest.dataset_dir(data_dir, dataset)
    kind = _BUILDERS[dataset]
    source = kind.SOURCE or _source_folder(dataset, source)
    with _locked(target.parent):
        _recover(target)
        if target.exists() and not overwrite:
            built, _ = manifest.load(data_dir, dataset)
            if difference := _difference(built, kind.plan(source)):
                raise UserError(
                    f"{target} was built from other files than {source} holds now: {difference}; "
                    "give --overwrite to replace it, or another --data_dir"
                )
            return built
        staging = target.parent / "incomplete"
        try:
            fresh = _build_aside(kind, source, staging, skip_bad)
            if target.exists():
                target.rename(_replaced(target))
            fresh.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(_replaced(target), ignore_errors=True)
    return manifest.load(data_dir, dataset)[0]


def _build_aside(
    kind: type[builder.AudioBuilder], source: Path, staging: Path, skip_bad: bool
) -> Path:
    """Builds in `staging` and returns the finished directory."""
    tfds_builder = kind(data_dir=staging, skip_bad=skip_bad)
    config = tfds.download.DownloadConfig(
        manual_dir=source, compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download
            tfds_builder.download_and_prepare(download_config=config)
    except (OSError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise UserError(
            f"can't write the dataset to {staging.parent}: {told}; it takes up to "
            f"{tfds_builder.needed_bytes / 2**20:.0f} MiB"
        ) from error
    return Path(tfds_builder.data_path)


def _source_folder(dataset: str, source: str | os.PathLike[str] | None) -> Path:
    if source is None:
        raise UserError(f"{dataset} needs --source=DIR, the folder that holds its audio")
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"--source={source} is not a folder")
    if not any(path.iterdir()):
        raise UserError(f"--source={source} holds no files")
    return path


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time build in `directory`. A killed process holds no lock."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".lock").touch()
    except OSError as error:
        raise UserError(f"can't build in {directory}: {error.strerror}") from error
    with open(directory / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replaced(target: Path) -> Path:
    return target.with_name(f"replaced-{target.name}")


def _recover(target: Path) -> None:
    """Clears away what a killed build left, and puts back what it was about to replace."""
    shutil.rmtree(target.parent / "incomplete", ignore_errors=True)
    if _replaced(target).exists() and not target.exists():
        _replaced(target).rename(target)
    shutil.rmtree(_replaced(target), ignore_errors=True)


def _difference(built: Manifest, planned: list[builder.Planned]) -> str:
    """What sets the files apart from those that were built from, or nothing."""
    before, now = built.hashes(), {file.name: file for file in planned}
    splits = {entry.name: entry.split for entry in built.files}
    changed = {
        "not in the build": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
        "changed": [
            name
            for name, file in now.items()
            if name in before
            and before[name] != (audio.sha256(file.path) if file.path.is_file() else "")
        ],
        "in another split": [
            name for name, file in now.items() if splits.get(name, file.split) != file.split
        ],
    }
    return "; ".join(
        f"{kind}: {shown(', '.join(names[:5]))}{f' and {len(names) - 5} more' if names[5:] else ''}"
        for kind, names in changed.items()
        if names
    )


def report(built: Manifest, data_dir: str | os.PathLike[str]) -> str:
    """A table of the splits, what needs attention, and the command to go on with."""
    lines = [f"{built.dataset} {built.version} in {manifest.dataset_dir(data_dir, built.dataset)}"]
    lines.append(f"{'split':<12}{'files':>7}{'recordings':>12}{'minutes':>10}")
    for split in built.splits:
        files = [entry for entry in built.files if entry.split == split]
        recordings = sum(entry.split == split for entry in built.recordings)
        minutes = sum(entry.num_samples for entry in files) / audio.SAMPLE_RATE / 60
        lines.append(f"{split:<12}{len(files):>7}{recordings:>12}{minutes:>10.1f}")
    if built.skipped:
        lines.append(f"{len(built.skipped)} files left out:")
        lines += [f"  {shown(entry.name)}: {entry.reason}" for entry in built.skipped]
    total = len(built.files) + len(built.skipped)
    expected = youtube_mix_dataset_builder.NUM_FILES
    if built.dataset == "youtube_mix" and total != expected:
        lines.append(f"note: {total} files, where the published set has {expected}")
    first: dict[str, str] = {}
    for entry in built.files:
        if first.setdefault(entry.sha256, entry.split) != entry.split:
            lines.append(f"warning: {shown(entry.name)} also stands in {first[entry.sha256]}")
    lines.append(
        "next: python -m patchwave_jax.train --config=configs/ctx128k.py:dense --workdir=DIR "
        f"--config.data.dataset={built.dataset} --config.data.data_dir={data_dir}"
    )
    return "\n".join(lines)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, builds, and prints the report."""
    parser = argparse.ArgumentParser(
        prog="python -m patchwave_jax.data.build",
        description="Build a dataset: 16 kHz mono PCM in ArrayRecord shards, with a manifest.",
        epilog="\n".join(
            f"{name}: {kind.MANUAL_DOWNLOAD_INSTRUCTIONS or 'Comes with the package.'}"
            for name, kind in _BUILDERS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dataset", required=True, choices=manifest.DATASETS)
    parser.add_argument("--source", metavar="DIR", help="folder with the audio files")
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        default=manifest.default_data_dir(),
        help="root of built datasets (default: $PATCHWAVE_DATA_DIR or ~/.cache/patchwave_jax/data)",
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out files that can't be used, and list them"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what was built from other files"
    )
    flags = parser.parse_args(argv)
    built = build(
        flags.dataset,
        flags.source,
        flags.data_dir,
        skip_bad=flags.skip_bad,
        overwrite=flags.overwrite,
    )
    print(report(built, flags.data_dir))


if __name__ == "__main__":
    main()
