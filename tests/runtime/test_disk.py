"""Full, read-only and broken disks, and directories that are in use."""

import contextlib
import dataclasses
import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_run import make_data
from test_train import data_dir, final_state, metrics, same_bits, small  # noqa: F401

from patchwave_jax.config import Config
from patchwave_jax.data import build as build_module
from patchwave_jax.data import builder
from patchwave_jax.data.index import DamagedShardError, open_split
from patchwave_jax.data.windows import Windows
from patchwave_jax.errors import UserError
from patchwave_jax.generation.clips import Outputs
from patchwave_jax.runtime.storage import Lock
from patchwave_jax.train import make_windows, train

SHARD = "audio_folder-train.array_record-00000-of-00001"


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def collect():
    """Collects what orbax leaves unfinished on a full disk while its warnings are ignored."""
    yield
    gc.collect()


@pytest.fixture
def disk(tmp_path):
    """Mounts a file system of a given size in bytes, if that is permitted."""
    mounted = []

    def mount(size: int) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no permission to mount a file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Writes a file that leaves `left` bytes on `disk`."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError):
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - left))
    return ballast


def to(config: Config, num_steps: int, **data) -> Config:
    recipe = dataclasses.replace(config.train, num_steps=num_steps)
    return dataclasses.replace(config, train=recipe, data=dataclasses.replace(config.data, **data))


def test_training_on_a_disk_that_fills_up(disk, data_dir, tmp_path):  # noqa: F811
    """It stops with an error that names the location; with room it resumes bit for bit."""
    config, workdir = small(data_dir), disk(16 << 20) / "run"
    train(config, tmp_path / "straight")
    train(to(config, 2), workdir)
    for left in (0, 40_000):
        ballast = fill(workdir.parent, left)
        with pytest.raises(UserError, match=r"/run.*(No space left|can't be written|RESOURCE_EXH)"):
            train(config, workdir)
        ballast.unlink()
    train(config, workdir)
    same_bits(*(final_state(config, place) for place in (tmp_path / "straight", workdir)))
    assert metrics(workdir) == metrics(tmp_path / "straight")


def test_a_workdir_that_is_read_only(disk, data_dir):  # noqa: F811
    workdir = disk(16 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(workdir)], check=True)
    with pytest.raises(UserError, match=r"can't write in .*disk: Read-only file system; make it"):
        train(small(data_dir), workdir)


def test_building_on_a_disk_that_fills_up(disk, tmp_path, monkeypatch):
    place = disk(1 << 20)
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.setattr(builder, "check_space", lambda *_: None)  # which would fail at once
    ballast = fill(place, 20_000)
    with pytest.raises(UserError, match=r"can't write the dataset to .*it takes up to"):
        make_data(source, place)
    ballast.unlink()
    make_data(source, place)
    assert open_split(place, "audio_folder", "train").recordings
    assert not (place / "audio_folder/incomplete").exists()


def test_generating_on_a_disk_that_fills_up(disk):
    out = disk(200 << 10) / "out"
    noise = np.random.default_rng(0).integers(0, 256, (2, 20_000), dtype=np.uint8)
    scores = np.zeros((2, 20_000), np.float32)
    outputs = Outputs.create(out, {}, {"quantiser": "mulaw"}, ["", ""], noise[:, :1000])
    ballast = fill(out.parent, 40_000)
    with pytest.raises(UserError, match=r"/out/00.*can't be written: No space.*--resume"):
        outputs.append(noise, scores)
    outputs.lock.release()
    ballast.unlink()
    again = Outputs.resume(out)
    assert again.made == 1000
    again.append(noise, scores)
    np.testing.assert_array_equal(again.codes(1000, 21_000), noise)


HOLD = """
import sys, time
from patchwave_jax.runtime.storage import Lock
held = Lock(sys.argv[1], "--workdir")
print("held", flush=True)
time.sleep(60)
"""


def test_a_directory_in_use_is_refused_until_its_process_dies(tmp_path, data_dir):  # noqa: F811
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        expected = f"in use by another process .{process.pid} on .*choose another --"
        with pytest.raises(UserError, match=expected + "workdir"):
            train(small(data_dir), tmp_path)
        with pytest.raises(UserError, match=expected + "out"):
            Outputs.create(tmp_path, {}, {"quantiser": "mulaw"}, [""], np.zeros((1, 9), np.uint8))
        process.send_signal(signal.SIGKILL)
    with Lock(tmp_path, "--workdir"):
        pass


def test_an_error_of_the_disk_is_one_line(tmp_path, capsys, monkeypatch):
    """Commands report any OSError with file, cause and remedy."""

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "x"))

    monkeypatch.setattr(build_module, "build", fail)
    with pytest.raises(SystemExit) as exit_:
        build_module.main(["--dataset=piano_demo"])
    assert exit_.value.code == 2
    error = f"error: {tmp_path / 'x'}: Input/output error; repair the disk, or choose another"
    assert capsys.readouterr().err == f"{error} location\n"


@pytest.fixture
def copy(data_dir, tmp_path) -> Path:  # noqa: F811
    """A copy of the data, to damage."""
    return shutil.copytree(data_dir, tmp_path / "copy")


def damage(data: Path, at: int) -> None:
    path = data / "audio_folder/1.0.0" / SHARD
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def pcm_of(split) -> list[np.ndarray]:
    return [split.read(i, 0, r.num_samples) for i, r in enumerate(split.recordings)]


def test_no_flipped_byte_of_a_shard_is_read_as_audio(copy, rng):
    good = pcm_of(open_split(copy, "audio_folder", "train"))
    size = (copy / "audio_folder/1.0.0" / SHARD).stat().st_size
    noticed, positions = 0, rng.integers(0, size, 150)
    for at in positions:
        damage(copy, int(at))
        split = open_split(copy, "audio_folder", "train")
        for index, expected in enumerate(good):
            try:
                np.testing.assert_array_equal(split.read(index, 0, expected.size), expected)
            except DamagedShardError:
                noticed += 1
        damage(copy, int(at))
    assert noticed > 20  # the others are in the padding


def test_damaged_windows_are_redrawn_and_all_others_stay_the_same(copy, data_dir):  # noqa: F811
    damage(copy, 20_000)
    config = small(str(copy))
    good = make_windows(config, open_split(data_dir, "audio_folder", "train"))
    split = open_split(copy, "audio_folder", "train", skip_damaged=True)
    windows = make_windows(config, split)
    redrawn = 0
    for step in range(20):
        mine, theirs = windows[step], good[step]
        for row in range(8):
            same = mine["redrawn"][row] == 0
            where = int(theirs["recording"][row]), int(theirs["start"][row]), windows.window_samples
            if same:
                np.testing.assert_array_equal(mine["codes"][row], theirs["codes"][row])
                split.read(*where)
            else:
                with pytest.raises(DamagedShardError):
                    split.read(*where)
        redrawn += int(mine["redrawn"].sum())
        np.testing.assert_array_equal(mine["codes"], windows[step]["codes"])
    assert 0 < redrawn < 80


def test_training_counts_damaged_windows_if_it_may_skip_them(copy, tmp_path, caplog):
    damage(copy, 20_000)
    config = small(str(copy))
    with pytest.raises(UserError, match=rf"{SHARD} is damaged.*data\.skip_damaged=True"):
        train(config, tmp_path / "run")
    assert train(to(config, 4, skip_damaged=True), tmp_path / "run")
    counts = [r["redrawn_windows"] for r in metrics(tmp_path / "run") if r["kind"] == "train"]
    assert sum(counts) > 0
    assert f"{SHARD} is damaged" in caplog.text


def test_when_all_is_damaged_it_stops(copy):
    path = copy / "audio_folder/1.0.0" / SHARD
    path.write_bytes(bytes(path.stat().st_size))
    split = open_split(copy, "audio_folder", "train", skip_damaged=True)
    windows = Windows(split, window_samples=300, batch_size=2, quantiser="mulaw", seed=0)
    with pytest.raises(UserError, match=f"{SHARD} is damaged"):
        windows[0]
    with pytest.raises(UserError, match=r"nothing of .* can be read"):
        list(split.excerpts([(0, 0, 100)]))
