"""Building: splits, refused sources, killed builds, and the command."""

import csv
import json
import signal
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import tensorflow_datasets as tfds
from small_run import tree_hashes
from tensorflow_datasets.core import shuffle

from patchwave_jax.data import build as build_lib
from patchwave_jax.data import builder, index, manifest
from patchwave_jax.data.maestro import maestro_dataset_builder
from patchwave_jax.errors import UserError

build = build_lib.build


def noise(seed: int, num_samples: int = 3000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, num_samples).astype(np.int16)


def write(folder: Path, names: list[str], num_samples: int = 3000) -> dict[str, np.ndarray]:
    """Writes files of noise, each with its own seed and length."""
    pcm = {}
    for i, name in enumerate(names):
        pcm[name] = noise(i, num_samples + i)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sf.write(folder / name, pcm[name], 16_000)
    return pcm


def numbered(count: int, suffix: str = "wav") -> list[str]:
    return [f"out{i:03d}.{suffix}" for i in range(count)]


def files_of(built: manifest.Manifest, split: str) -> list[str]:
    return [entry.name for entry in built.files if entry.split == split]


def read_all(data_dir: Path, dataset: str, split: str) -> list[np.ndarray]:
    opened = index.open_split(data_dir, dataset, split)
    return [opened.read(i, 0, r.num_samples) for i, r in enumerate(opened.recordings)]


# --- youtube_mix


@pytest.mark.parametrize(
    ("count", "train", "validation"),
    [(3, 1, 1), (72, 63, 4), (241, 212, 14)],
)
def test_youtube_mix_splits_in_natural_order(tmp_path, count, train, validation):
    for name in numbered(count):  # the plan looks at names only
        (tmp_path / name).touch()
    plan = build_lib._BUILDERS["youtube_mix"].plan(tmp_path)
    assert [file.name for file in plan] == numbered(count)
    test = count - train - validation
    expected = ["train"] * train + ["validation"] * validation + ["test"] * test
    assert [file.split for file in plan] == expected


def test_youtube_mix_is_one_recording_per_split(tmp_path):
    pcm = write(tmp_path / "source", numbered(10, "flac"), 40_000)
    built = build("youtube_mix", tmp_path / "source", tmp_path / "data")
    for split, names in {
        "train": numbered(10, "flac")[:8],
        "validation": ["out008.flac"],
        "test": ["out009.flac"],
    }.items():
        assert files_of(built, split) == names
        (read,) = read_all(tmp_path / "data", "youtube_mix", split)
        np.testing.assert_array_equal(read, np.concatenate([pcm[name] for name in names]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: (s / "out005.wav").unlink(), r"missing: out005\.wav"),
        (lambda s: (s / "out000.wav").unlink(), r"missing: out000\.wav"),
        (
            lambda s: (s / "out003.wav").rename(s / "out3b.wav"),
            r"stray: out3b\.wav; missing: out003",
        ),
        (lambda s: (s / "out20240101.wav").touch(), r"missing: out010\.wav to out20240100\.wav"),
        (lambda s: (s / "raw.wav").touch(), r"stray: raw\.wav"),
        (lambda s: (s / ".DS_Store").touch(), r"stray: \.DS_Store"),
        (lambda s: (s / "out010.flac").touch(), r"stray: out010\.flac"),
        (lambda s: (s / "more").mkdir(), r"stray: more"),
        (lambda s: (s / "out05.wav").touch(), r"duplicates: out005\.wav, out05\.wav"),
    ],
)
def test_youtube_mix_refuses_what_would_shift_the_split(tmp_path, change, message):
    write(tmp_path / "source", numbered(10))
    (tmp_path / "source/README.md").touch()
    change(tmp_path / "source")
    with pytest.raises(UserError, match=message):
        build("youtube_mix", tmp_path / "source", tmp_path / "data")


def test_youtube_mix_keeps_a_split_into_folders(tmp_path):
    names = ["train/out000.wav", "train/out001.wav", "val/out002.wav", "test/out003.wav"]
    pcm = write(tmp_path / "source", names)
    built = build("youtube_mix", tmp_path / "source", tmp_path / "data")
    assert files_of(built, "train") == names[:2]
    assert files_of(built, "validation") == names[2:3]
    (train,) = read_all(tmp_path / "data", "youtube_mix", "train")
    np.testing.assert_array_equal(train, np.concatenate([pcm[name] for name in names[:2]]))


def test_a_skipped_file_interrupts_the_recording_and_shifts_nothing(tmp_path):
    names = numbered(10)
    pcm = write(tmp_path / "source", names)
    sf.write(tmp_path / "source/out003.wav", np.zeros(3000), 16_000)
    (tmp_path / "source/out006.wav").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        build("youtube_mix", tmp_path / "source", tmp_path / "data")
    for part in ("2 of 10", "out003.wav: is silent", "out006.wav: is empty", "--skip_bad"):
        assert part in str(caught.value)

    built = build("youtube_mix", tmp_path / "source", tmp_path / "data", skip_bad=True)
    assert [entry.name for entry in built.skipped] == ["out003.wav", "out006.wav"]
    assert files_of(built, "test") == ["out009.wav"]
    opened = index.open_split(tmp_path / "data", "youtube_mix", "train")
    assert [r.name for r in opened.recordings] == [
        "out000.wav..out002.wav",
        "out004.wav..out005.wav",
        "out007.wav",
    ]
    read = read_all(tmp_path / "data", "youtube_mix", "train")
    for got, group in zip(read, (names[:3], names[4:6], names[7:8]), strict=True):
        np.testing.assert_array_equal(got, np.concatenate([pcm[name] for name in group]))
    report = build_lib.report(built, tmp_path / "data")
    assert "2 files skipped" in report
    assert "out003.wav: is silent" in report


def test_a_split_without_a_usable_file_is_an_error(tmp_path):
    write(tmp_path / "source", numbered(10))
    (tmp_path / "source/out009.wav").write_bytes(b"")
    with pytest.raises(UserError, match="no usable file in test"):
        build("youtube_mix", tmp_path / "source", tmp_path / "data", skip_bad=True)


# --- maestro

COLUMNS = "canonical_composer canonical_title split year midi_filename audio_filename duration"
ROWS = [("2018/a.wav", "train"), ("2018/b.wav", "test"), ("2004/c.wav", "validation")]


def write_table(source: Path, rows: list[tuple[str, str]]) -> None:
    source.mkdir(exist_ok=True)
    with open(source / "maestro-v3.0.0.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS.split())
        for name, split in rows:
            table.writerow(["Liszt", "Études, no. 1", split, 2018, "a.midi", name, 1.5])


def test_maestro_follows_its_table(tmp_path):
    pcm = write(tmp_path / "source", [name for name, _ in ROWS])
    write_table(tmp_path / "source", ROWS)
    sf.write(tmp_path / "source/2018/unlisted.wav", noise(9), 16_000)
    build("maestro", tmp_path / "source", tmp_path / "data")
    for name, split in ROWS:
        (read,) = read_all(tmp_path / "data", "maestro", split)
        np.testing.assert_array_equal(read, pcm[name])


def test_maestro_lists_every_file_that_is_missing(tmp_path):
    write(tmp_path / "source", ["2018/a.wav"])
    write_table(tmp_path / "source", ROWS)
    with pytest.raises(UserError, match=r"(?s)2 of 3.*b\.wav: can't be read: No such.*c\.wav"):
        build("maestro", tmp_path / "source", tmp_path / "data")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ROWS[0]], r"more than once: 2018/a\.wav"),
        ([*ROWS, ("d.wav", "dev")], "unknown splits: dev"),
        ([], "lacks the columns"),
    ],
)
def test_maestro_refuses_an_invalid_table(tmp_path, rows, message):
    write_table(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        maestro_dataset_builder.Builder.plan(tmp_path)


def test_maestro_without_its_table_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"has 0 tables maestro-v\*\.csv"):
        maestro_dataset_builder.Builder.plan(tmp_path)


# --- audio_folder


@pytest.mark.parametrize("count", [3, 20, 100])
def test_audio_folder_splits_by_file(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.wav").touch()
    plan = build_lib._BUILDERS["audio_folder"].plan(tmp_path)
    sizes = {s: sum(file.split == s for file in plan) for s in manifest.SPLITS}
    held_out = max(1, round(0.06 * count))
    assert sizes == {
        "train": count - 2 * held_out,
        "validation": held_out,
        "test": held_out,
    }
    assert plan == build_lib._BUILDERS["audio_folder"].plan(tmp_path)
    splits = [file.split for file in plan]
    assert count < 20 or splits != sorted(splits)  # shuffled


def test_audio_folder_takes_any_depth_format_and_rate(tmp_path):
    source = tmp_path / "source"
    (source / "b/c").mkdir(parents=True)
    t = np.arange(44_100) / 44_100
    stereo = 0.3 * np.stack([np.sin(2760 * t)] * 2, 1)
    for name in ("1.MP3", "b/2.ogg", "b/c/3.flac"):
        sf.write(source / name, stereo, 44_100)
    (source / "b/._2.ogg").write_bytes(b"not audio, and hidden")
    (source / "cover.jpg").touch()
    built = build("audio_folder", source, tmp_path / "data")
    assert {e.name for e in built.files} == {"1.MP3", "b/2.ogg", "b/c/3.flac"}
    assert {(e.source_rate, e.source_channels) for e in built.files} == {(44_100, 2)}
    assert all(abs(e.num_samples - 16_000) <= 1 for e in built.files)


def test_audio_folder_keeps_a_split_into_folders(tmp_path):
    write(tmp_path / "source", ["train/x/1.wav", "train/10.wav", "train/9.wav", "test/1.wav"])
    built = build("audio_folder", tmp_path / "source", tmp_path / "data")
    assert files_of(built, "train") == ["train/9.wav", "train/10.wav", "train/x/1.wav"]
    assert files_of(built, "test") == ["test/1.wav"]
    assert built.splits == ("train", "test")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no files"),
        (["a.aiff"], "has no .wav"),
        (["a.wav", "b.wav"], "three splits need 3"),
        (["train/a.wav", "b.wav"], r"outside them: b\.wav"),
        (["test/a.wav"], "no audio in .*train"),
    ],
)
def test_audio_folder_refuses(tmp_path, names, message):
    tmp_path.joinpath("source").mkdir()
    write(tmp_path / "source", names)
    with pytest.raises(UserError, match=message):
        build("audio_folder", tmp_path / "source", tmp_path / "data")


def test_the_same_file_in_two_splits_is_reported(tmp_path):
    write(tmp_path / "source", ["train/a.wav"])
    (tmp_path / "source/test").mkdir()
    (tmp_path / "source/test/b.wav").write_bytes((tmp_path / "source/train/a.wav").read_bytes())
    built = build("audio_folder", tmp_path / "source", tmp_path / "data")
    assert "test/b.wav is also in train" in build_lib.report(built, tmp_path / "data")


# --- piano_demo


def test_piano_demo_builds_itself(tmp_path):
    build_lib.ensure_built("piano_demo", tmp_path)
    build_lib.ensure_built("piano_demo", tmp_path)
    built, _ = manifest.load(tmp_path, "piano_demo")
    seconds = {
        split: sum(e.num_samples for e in built.files if e.split == split) / 16_000
        for split in manifest.SPLITS
    }
    assert seconds == pytest.approx({"train": 261.3, "validation": 26.0, "test": 57.2}, abs=0.1)


def test_other_datasets_must_be_built_by_command(tmp_path):
    command = f"--dataset=maestro --source=DIR --data_dir={tmp_path}"
    with pytest.raises(UserError, match=command):
        build_lib.ensure_built("maestro", tmp_path)


# --- building again, and being killed


@pytest.fixture(scope="module")
def ten(tmp_path_factory) -> Path:
    """Ten numbered files of noise, which tests must not change."""
    source = tmp_path_factory.mktemp("ten")
    write(source, numbered(10), 40_000)
    return source


def test_building_is_byte_identical(ten, tmp_path):
    build("youtube_mix", ten, tmp_path / "a")
    build("youtube_mix", ten, tmp_path / "b")
    hashes = tree_hashes(tmp_path / "a")
    assert hashes == tree_hashes(tmp_path / "b")
    assert "youtube_mix/1.0.0/manifest.json" in hashes


def test_a_dataset_that_matches_its_source_is_not_rebuilt(ten, tmp_path, monkeypatch):
    first = build("youtube_mix", ten, tmp_path)
    monkeypatch.setattr(builder, "scan", None)  # building would fail
    assert build("youtube_mix", ten, tmp_path) == first


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda s: sf.write(s / "out004.wav", noise(99), 16_000), r"changed: out004\.wav"),
        (lambda s: sf.write(s / "out010.wav", noise(99), 16_000), r"not in the build: out010\.wav"),
        (lambda s: (s / "out009.wav").unlink(), r"missing: out009\.wav"),
    ],
)
def test_a_dataset_that_does_not_match_needs_overwrite(ten, tmp_path, change, difference):
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    for path in ten.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    build("youtube_mix", source, data)
    before = tree_hashes(data)
    change(source)
    with pytest.raises(UserError, match=f"{difference}.*--overwrite"):
        build("youtube_mix", source, data)
    assert tree_hashes(data) == before
    built = build("youtube_mix", source, data, overwrite=True)
    assert {e.name for e in built.files} == {path.name for path in source.iterdir()}
    build("youtube_mix", source, tmp_path / "fresh")
    assert tree_hashes(data) == tree_hashes(tmp_path / "fresh")


def test_a_failing_overwrite_leaves_what_was_there(ten, tmp_path):
    build("youtube_mix", ten, tmp_path / "data")
    before = tree_hashes(tmp_path / "data")
    write(tmp_path / "source", numbered(10))
    (tmp_path / "source/out000.wav").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 10"):
        build("youtube_mix", tmp_path / "source", tmp_path / "data", overwrite=True)
    assert tree_hashes(tmp_path / "data") == before


def killed_build(source: Path, data: Path, where: str, overwrite: bool = False) -> None:
    """Runs a build in a process that kills itself with SIGKILL at `where`."""
    program = f"""
        import os, pathlib, signal
        from patchwave_jax.data import build, builder
        def kill(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        def examples(self, *args):
            yield next(generate(self, *args))
            kill()
        generate = builder.AudioBuilder._generate_examples
        if {where!r} == "writing":
            builder.AudioBuilder._generate_examples = examples
        else:  # between the two renames of an overwrite
            rename = pathlib.Path.rename
            def rename_old_only(self, to):
                return rename(self, to) if "replaced" in to.name else kill()
            pathlib.Path.rename = rename_old_only
        build.build("youtube_mix", {str(source)!r}, {str(data)!r}, overwrite={overwrite})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL


def test_a_killed_build_leaves_nothing_readable_and_a_rerun_cleans_up(ten, tmp_path):
    killed_build(ten, tmp_path / "data", "writing")
    assert list((tmp_path / "data").rglob("incomplete*"))  # it was running
    with pytest.raises(UserError, match="not built"):
        index.open_split(tmp_path / "data", "youtube_mix", "train")
    build("youtube_mix", ten, tmp_path / "data")
    build("youtube_mix", ten, tmp_path / "fresh")
    assert tree_hashes(tmp_path / "data") == tree_hashes(tmp_path / "fresh")
    assert not list((tmp_path / "data").rglob("incomplete*"))


def test_a_kill_between_the_renames_of_an_overwrite_loses_nothing(ten, tmp_path):
    build("youtube_mix", ten, tmp_path / "data")
    before = tree_hashes(tmp_path / "data")
    killed_build(ten, tmp_path / "data", "replacing", overwrite=True)
    build("youtube_mix", ten, tmp_path / "data")
    assert tree_hashes(tmp_path / "data") == before


# --- large splits


def test_a_split_beyond_tfds_memory_limit_streams_to_many_shards(tmp_path, monkeypatch):
    """TFDS' own path would spill to disk through TensorFlow, which is not installed."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1 << 19)
    monkeypatch.setattr(builder, "SHARD_RECORDS", 2)
    pcm = write(tmp_path / "source", ["train/0.wav", "train/1.wav", "test/0.wav"], 700_001)
    build("audio_folder", tmp_path / "source", tmp_path / "data")
    shards = sorted((tmp_path / "data").rglob("*train.array_record*"))
    assert len(shards) == 6  # two recordings of 6 records
    assert shards[0].name == "audio_folder-train.array_record-00000-of-00006"
    read = read_all(tmp_path / "data", "audio_folder", "train")
    for i in range(2):
        np.testing.assert_array_equal(read[i], pcm[f"train/{i}.wav"])
    assert "tensorflow" not in sys.modules


def test_memory_does_not_grow_with_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "SHARD_RECORDS", 4)
    peaks = []
    for megabytes in (8, 32):
        source = tmp_path / f"source{megabytes}"
        write(source, ["train/0.wav", "test/0.wav"], 100_000)
        with sf.SoundFile(source / "train/0.wav", "w", 16_000, 1) as file:
            for seed in range(megabytes):
                file.write(noise(seed, 2**19))
        tracemalloc.start()
        build("audio_folder", source, tmp_path / f"data{megabytes}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]  # of four times the audio


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_file_that_changes_during_the_build_is_an_error(tmp_path, monkeypatch, change):
    write(tmp_path / "source", ["train/a.wav", "test/a.wav"], 2**17)
    scan = builder.scan

    def scan_then_change(*args):
        built = scan(*args)
        write(tmp_path / "source", ["train/a.wav"], 2**17 + change)
        return built

    monkeypatch.setattr(builder, "scan", scan_then_change)
    with pytest.raises(UserError, match=r"train/a\.wav changed during the build"):
        build("audio_folder", tmp_path / "source", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("1.0.0"))


def test_records_carry_their_place(tmp_path):
    write(tmp_path / "source", numbered(10), 40_000)
    built = build("youtube_mix", tmp_path / "source", tmp_path / "data")
    directory = tmp_path / "data/youtube_mix/1.0.0"
    records = list(tfds.builder_from_directory(directory).as_data_source(split="train"))
    assert [r["start"] for r in records] == [0, 2**17, 2**18]
    assert [r["audio"].size for r in records[:2]] == [2**17, 2**17]
    assert [r["file"] for r in records] == [b"out000.wav", b"out003.wav", b"out006.wav"]
    assert {r["recording"].decode() for r in records} == {built.recordings[0].name}
    entries = json.loads((directory / "manifest.json").read_text())
    assert entries["files"][0]["sha256"] == build_lib.audio.sha256(tmp_path / "source/out000.wav")
    assert entries["recordings"][0]["num_records"] == 3


def test_the_builder_works_as_a_tfds_builder(ten, tmp_path):
    kind = build_lib._BUILDERS["youtube_mix"]
    assert issubclass(kind, tfds.core.GeneratorBasedBuilder)
    tfds_builder = kind(data_dir=tmp_path)
    assert tfds_builder.name == "youtube_mix"
    assert "SaShiMi" in tfds_builder.info.description
    tfds_builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=ten))
    assert index.open_split(tmp_path, "youtube_mix", "test").recordings[0].name == "out009.wav"


# --- the command


def test_the_command_reports_and_prints_the_next_command(ten, tmp_path, capsys):
    build_lib.main(["--dataset=youtube_mix", f"--source={ten}", f"--data_dir={tmp_path}"])
    out = capsys.readouterr().out
    assert [line.split()[:3] for line in out.splitlines()[2:5]] == [
        ["train", "8", "1"],
        ["validation", "1", "1"],
        ["test", "1", "1"],
    ]
    assert "10 files, but the published set has 241" in out
    assert "python -m patchwave_jax.train" in out


def test_a_source_is_required(tmp_path):
    with pytest.raises(UserError, match="youtube_mix needs --source=DIR"):
        build("youtube_mix", None, tmp_path)


def test_a_full_disk_is_an_error_that_says_how_much_is_needed(ten, tmp_path, monkeypatch):
    usage = build_lib.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(build_lib.shutil, "disk_usage", lambda _: usage._replace(free=2**19))
    with pytest.raises(UserError, match=r"takes up to 1 MiB and the disk of .* has 0 MiB"):
        build("youtube_mix", ten, tmp_path)
    assert not list(tmp_path.rglob("1.0.0"))


def test_a_disk_that_fills_up_is_an_error(ten, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds.core.ExampleWriter, "write", full)
    with pytest.raises(UserError, match=r"No space left on device; it takes up to 1 MiB"):
        build("youtube_mix", ten, tmp_path)
    assert not list(tmp_path.rglob("1.0.0"))


def test_a_data_dir_that_is_a_file_is_an_error(ten, tmp_path):
    (tmp_path / "data").touch()
    with pytest.raises(UserError, match="can't write in"):
        build("youtube_mix", ten, tmp_path / "data")


def test_the_data_dir_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHWAVE_DATA_DIR", str(tmp_path))
    assert manifest.default_data_dir() == tmp_path
    monkeypatch.delenv("PATCHWAVE_DATA_DIR")
    assert manifest.default_data_dir() == Path.home() / ".cache/patchwave_jax/data"
