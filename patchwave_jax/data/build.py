"""Builds a dataset: `python -m patchwave_jax.data.build --dataset=piano_demo`.

A dataset is built in a staging folder and renamed, so it is complete or absent.
"""

import argparse
import contextlib
import io
import os
import shutil
from pathlib import Path

import tensorflow_datasets as tfds

from patchwave_jax.data import audio, builder, manifest
from patchwave_jax.data.audio_folder import audio_folder_dataset_builder
from patchwave_jax.data.maestro import maestro_dataset_builder
from patchwave_jax.data.manifest import Manifest
from patchwave_jax.data.piano_demo import piano_demo_dataset_builder
from patchwave_jax.data.youtube_mix import youtube_mix_dataset_builder
from patchwave_jax.errors import UserError, exits_cleanly, listed, printable
from patchwave_jax.runtime.storage import Lock, is_url

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
    """Builds `dataset` from the folder `source` under `data_dir`, if it is not built already.

    Args:
      dataset: One of `manifest.DATASETS`.
      source: The folder with the audio; None for `piano_demo`, which is part of the package.
      data_dir: The root of all built datasets.
      skip_bad: Skip files that can't be used, and list them in the manifest.
      overwrite: Replace a dataset that was built from different files.

    Raises:
      UserError: naming every stray, missing or unusable file; the differences, if the dataset was
        built from different files; or the space needed, if there is too little.
    """
    if is_url(data_dir):
        raise UserError(f"{data_dir} is not a folder; build in a folder, then copy it there")
    target = manifest.dataset_dir(data_dir, dataset)
    kind = _BUILDERS[dataset]
    source = kind.SOURCE or _source_folder(dataset, source)
    with Lock(target.parent, "--data_dir", wait=True):
        _recover(target)
        if target.exists() and not overwrite:
            built, _ = manifest.load(data_dir, dataset)
            if difference := _difference(built, kind.plan(source)):
                raise UserError(
                    f"{target} was built from other files than {source} has now: {difference}; "
                    "give --overwrite to replace it, or another --data_dir"
                )
            return built
        staging = target.parent / "incomplete"
        try:
            fresh = _build_in(kind, source, staging, skip_bad)
            if target.exists():
                target.rename(_replaced(target))
            fresh.rename(target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(_replaced(target), ignore_errors=True)
    return manifest.load(data_dir, dataset)[0]


def _build_in(
    kind: type[builder.AudioBuilder], source: Path, staging: Path, skip_bad: bool
) -> Path:
    """Builds in `staging` and returns the folder of the dataset."""
    tfds_builder = kind(data_dir=staging, skip_bad=skip_bad)
    config = tfds.download.DownloadConfig(
        manual_dir=source, compute_stats=tfds.download.ComputeStatsMode.SKIP, try_download_gcs=False
    )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints that it downloads
            tfds_builder.download_and_prepare(download_config=config)
    except (OSError, RuntimeError) as error:
        cause = " ".join(str(error).split())
        raise UserError(
            f"can't write the dataset to {staging.parent}: {cause}; it takes up to "
            f"{tfds_builder.needed_bytes / 2**20:.0f} MiB"
        ) from error
    return Path(tfds_builder.data_path)


def _source_folder(dataset: str, source: str | os.PathLike[str] | None) -> Path:
    if source is None:
        raise UserError(f"{dataset} needs --source=DIR, the folder with its audio")
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"--source={source} is not a folder")
    if not any(path.iterdir()):
        raise UserError(f"--source={source} has no files")
    return path


def _replaced(target: Path) -> Path:
    return target.with_name(f"replaced-{target.name}")


def _recover(target: Path) -> None:
    """Removes what a killed build left, and restores what it was about to replace."""
    shutil.rmtree(target.parent / "incomplete", ignore_errors=True)
    if _replaced(target).exists() and not target.exists():
        _replaced(target).rename(target)
    shutil.rmtree(_replaced(target), ignore_errors=True)


def _difference(built: Manifest, planned: list[builder.Planned]) -> str:
    """How the files differ from those that were built from; empty if they don't."""
    before = {entry.name: entry.sha256 for entry in (*built.files, *built.skipped)}
    now = {file.name: file for file in planned}
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
    return "; ".join(f"{kind}: {listed(names, 5)}" for kind, names in changed.items() if names)


def report(built: Manifest, data_dir: str | os.PathLike[str]) -> str:
    """A table of the splits, warnings, and the command to run next."""
    lines = [f"{built.dataset} {built.version} in {manifest.dataset_dir(data_dir, built.dataset)}"]
    lines.append(f"{'split':<12}{'files':>7}{'recordings':>12}{'minutes':>10}")
    for split in built.splits:
        files = [entry for entry in built.files if entry.split == split]
        recordings = sum(entry.split == split for entry in built.recordings)
        minutes = sum(entry.num_samples for entry in files) / audio.SAMPLE_RATE / 60
        lines.append(f"{split:<12}{len(files):>7}{recordings:>12}{minutes:>10.1f}")
    if built.skipped:
        lines.append(f"{len(built.skipped)} files skipped:")
        lines += [f"  {printable(entry.name)}: {entry.reason}" for entry in built.skipped]
    total = len(built.files) + len(built.skipped)
    expected = youtube_mix_dataset_builder.NUM_FILES
    if built.dataset == "youtube_mix" and total != expected:
        lines.append(f"note: {total} files, but the published set has {expected}")
    first: dict[str, str] = {}
    for entry in built.files:
        if first.setdefault(entry.sha256, entry.split) != entry.split:
            lines.append(f"warning: {printable(entry.name)} is also in {first[entry.sha256]}")
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
            f"{name}: {kind.MANUAL_DOWNLOAD_INSTRUCTIONS or 'Part of the package.'}"
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
        "--skip_bad", action="store_true", help="skip files that can't be used, and list them"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset that was built from other files"
    )
    flags = parser.parse_args(argv)
    options = {"skip_bad": flags.skip_bad, "overwrite": flags.overwrite}
    built = build(flags.dataset, flags.source, flags.data_dir, **options)
    print(report(built, flags.data_dir))


if __name__ == "__main__":
    main()
