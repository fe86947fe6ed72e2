"""Kills the commands at random moments, restarts them, and compares the results.

    pytest tests/crash -n 0 -s --kills=50

`train`, `data.build` and `generate` run as processes and get SIGKILL or SIGTERM: at a time drawn
uniformly from the duration of an undisturbed run, or as soon as a checkpoint, a shard or a clip is
being written. The result must be that of the undisturbed run, bit for bit.
"""

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from small_run import make_config, make_data, make_run, tones, tree_hashes
from test_train import final_state, metrics, same_bits

from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.data.index import open_split

HERE = Path(__file__).parent


@dataclasses.dataclass
class Command:
    """A command to kill. A new path in `delicate` shows that it is writing something."""

    arguments: list[str]
    cache: Path
    delicate: Callable[[], Iterable[Path]]

    def start(self, *more: str) -> subprocess.Popen:
        paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
        environment = {
            "PYTHONPATH": paths,
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",  # as tests/conftest.py sets, but earlier
        }
        return subprocess.Popen(
            [sys.executable, "-m", *self.arguments, *more],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def traces(self) -> set[tuple[Path, int]]:
        found = set()
        with contextlib.suppress(OSError):  # a file may have been removed meanwhile
            for path in self.delicate():
                found.add((path, path.stat().st_ino))
        return found

    def finish(self, *more: str) -> float:
        """Runs it to its end; returns its duration in seconds."""
        begin = time.monotonic()
        process = self.start(*more)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return time.monotonic() - begin

    def kill(self, draw: random.Random, seconds: float, *more: str) -> str:
        """Starts and kills it; returns how, or an empty string if it ended before."""
        number = draw.choice([signal.SIGKILL, signal.SIGTERM])
        aimed = draw.random() < 0.6
        before, process = self.traces(), self.start(*more)
        deadline = time.monotonic() + (60 if aimed else draw.uniform(0, seconds))
        while time.monotonic() < deadline and process.poll() is None:
            if aimed and self.traces() - before:
                time.sleep(draw.uniform(0, 0.03))
                break
            time.sleep(0.001)
        process.send_signal(number)
        output, _ = process.communicate(timeout=900)
        assert "Traceback" not in output, output
        assert process.returncode in (0, -number), output
        if process.returncode == 0 and "stopped by a signal" not in output:
            return ""
        return f"{number.name} {'at a delicate point' if aimed else 'at any time'}"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))


@pytest.fixture
def kills(request) -> Callable[[str, int], int]:
    """How often to kill a command: its share of --kills, or a given number without the flag."""
    total = request.config.getoption("--kills")
    shares = {"train": 0.4, "build": 0.3, "generate": 0.3}
    return lambda what, few: round(shares[what] * total) if total else few


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_training(data, cache, kills, tmp_path):
    def command(workdir: Path) -> Command:
        arguments = ["patchwave_jax.train", f"--config={HERE / 'tiny.py'}", f"--workdir={workdir}"]
        saving = functools.partial(workdir.glob, "checkpoints/*tmp*")
        return Command([*arguments, f"--config.data.data_dir={data}"], cache, saving)

    def check() -> None:
        rows = [metrics(tmp_path / name) for name in ("straight", "disturbed")]
        assert rows[0] == rows[1]
        assert [r["step"] for r in rows[1] if r["kind"] == "train"] == list(range(1, 41))
        records = []
        for name in ("straight", "disturbed"):
            with Checkpoints(tmp_path / name) as checkpoints:
                assert checkpoints.latest == 40
                records.append(dataclasses.replace(checkpoints.record(40), seconds=0.0))
        assert records[0] == records[1]
        config = records[0].config
        same_bits(*(final_state(config, tmp_path / name) for name in ("straight", "disturbed")))
        assert not (tmp_path / "disturbed/damaged").exists()

    straight, disturbed = command(tmp_path / "straight"), command(tmp_path / "disturbed")
    seconds, draw = straight.finish(), random.Random(1)
    kinds, runs = Counter(), 1
    while kinds.total() < kills("train", 1):
        if how := disturbed.kill(draw, seconds):
            kinds[how] += 1
        else:  # it has ended: start again from the beginning
            check()
            shutil.rmtree(tmp_path / "disturbed")
            runs += 1
    disturbed.finish()
    check()
    print(f"train, {runs} runs: {dict(kinds)}")


def test_building(cache, kills, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(12):
        sf.write(source / f"take{i}.wav", tones(400_000, i), 16_000)

    def command(target: Path) -> Command:
        arguments = ["patchwave_jax.data.build", "--dataset=audio_folder", f"--source={source}"]
        writing = functools.partial(target.rglob, "incomplete*")
        return Command([*arguments, f"--data_dir={target}"], cache, writing)

    seconds, draw = command(tmp_path / "straight").finish(), random.Random(2)
    expected, kinds = tree_hashes(tmp_path / "straight"), Counter()
    while kinds.total() < kills("build", 1):
        if how := command(tmp_path / "data").kill(draw, seconds, "--overwrite"):
            kinds[how] += 1
        if (tmp_path / "data/audio_folder/1.0.0").exists():  # then it is complete
            split = open_split(tmp_path / "data", "audio_folder", "train")
            for index, recording in enumerate(split.recordings):
                split.read(index, 0, recording.num_samples)
    command(tmp_path / "data").finish()
    print(f"build: {dict(kinds)}")
    assert tree_hashes(tmp_path / "data") == expected


def test_generating(data, cache, kills, tmp_path):
    workdir = make_run(tmp_path / "run", make_config(data))

    def command(out: Path) -> Command:
        arguments = ["patchwave_jax.generate", f"--out={out}"]
        growing = functools.partial(out.glob, "000.json")  # a new file whenever the clip has grown
        return Command(arguments, cache, growing)

    begin = [f"--workdir={workdir}", "--seconds=4", "--num=2"]

    def check() -> None:
        for clip in ("000", "001"):
            for suffix in (".wav", ".codes"):
                one, other = (tmp_path / name / f"{clip}{suffix}" for name in ("straight", "out"))
                assert one.read_bytes() == other.read_bytes()
            assert np.fromfile(other, np.uint8).size == 64_000

    seconds, draw = command(tmp_path / "straight").finish(*begin), random.Random(3)
    disturbed, more = command(tmp_path / "out"), begin
    kinds, runs = Counter(), 1
    while kinds.total() < kills("generate", 1):
        if how := disturbed.kill(draw, seconds, *more):
            kinds[how] += 1
        else:
            check()
            shutil.rmtree(tmp_path / "out")
            runs += 1
        if (tmp_path / "out/run.json").exists():
            more = ["--resume"]
        else:  # nothing was generated, and --out must not exist
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            more = begin
    disturbed.finish(*more)
    check()
    print(f"generate, {runs} runs: {dict(kinds)}")
