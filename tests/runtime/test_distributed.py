"""Two processes of four devices compute the same as one of eight, and one resumes what two began.

`test_workdir.py` runs another pair, in a bucket, with a state that is carried from step to step.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pod.tiny import get_config
from small_run import make_data, make_run
from test_train import metrics

from patchwave_jax import evaluate
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config_dict import from_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.runtime import distributed
from patchwave_jax.train import train

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return str(make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Pair:
    """Two processes that run one command together. A context manager that ends both."""

    def __init__(self, cache: Path, *arguments: str):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        environment = {
            "PYTHONPATH": str(HERE.parent),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | environment | {"JAX_PROCESS_ID": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number in range(2)
        ]

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_row(self, workdir: Path, step: int) -> None:
        def there() -> bool:
            logged = metrics(workdir) if (workdir / "metrics.jsonl").exists() else []
            return bool(logged) and logged[-1]["step"] >= step

        self.wait_until(there)

    def wait_until(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not there():
            for process in self.processes:
                assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def finish(self, seconds: float) -> list[str]:
        return [process.communicate(timeout=seconds)[0] for process in self.processes]


def test_two_processes_are_stopped_and_killed_and_one_resumes(data, cache, tmp_path):
    """One gets a signal; with shared rows one is killed; a single process resumes."""
    workdir = tmp_path / "disturbed"
    command = ["-m", "patchwave_jax.train", f"--config={HERE / 'pod/tiny.py'}"]
    command += [f"--workdir={workdir}", f"--config.data.data_dir={data}"]
    command += ["--config.train.num_steps=100_000"]

    with Pair(cache, *command) as pair:
        pair.wait_for_row(workdir, 5)  # after a validation and a checkpoint
        pair.processes[1].send_signal(signal.SIGTERM)
        outputs = pair.finish(120)
        assert [p.returncode for p in pair.processes] == [0, 0], outputs
    stopped = metrics(workdir)[-1]["step"]
    assert f"saved step {stopped}. The same command goes on" in outputs[0]
    assert "step" not in outputs[1].replace("Reached preemption sync point, step", "")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest == stopped

    with Pair(cache, *command, "--config.run.context_devices=8") as pair:
        pair.wait_for_row(workdir, stopped + 1)
        pair.processes[0].kill()
        assert pair.processes[1].wait(120) != 0

    config = get_config()
    config.data.data_dir, config.train.num_steps = data, metrics(workdir)[-1]["step"] + 1
    config = from_config_dict(config)
    disturbed = {(r["step"], r["kind"]): r["nll_nats"] for r in metrics(workdir)}
    train(config, tmp_path / "straight", profile_steps=(2, 3))
    assert list((tmp_path / "straight/profile").rglob("*.xplane.pb"))
    train(config, workdir)
    straight = {(r["step"], r["kind"]): r["nll_nats"] for r in metrics(tmp_path / "straight")}
    resumed = {(r["step"], r["kind"]): r["nll_nats"] for r in metrics(workdir)}
    assert straight == pytest.approx(resumed, rel=1e-5)
    assert disturbed == pytest.approx({key: straight[key] for key in disturbed}, rel=1e-5)


def test_the_first_process_clock_ends_all(data, cache, tmp_path):
    command = [str(HERE / "pod/fast_clock.py"), f"--config={HERE / 'pod/tiny.py'}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={data}"]
    command += ["--config.train.schedule=cosine", "--config.train.num_steps=2"]
    with Pair(cache, *command, "--config.train.max_minutes=100") as pair:
        outputs = pair.finish(120)  # alone, the second would end after a step
        assert [p.returncode for p in pair.processes] == [0, 0], outputs
    assert metrics(tmp_path / "run")[-1]["step"] == 2
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert 0 < checkpoints.record(2).seconds < 120


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_hangs_ends_the_other(silent, data, cache, tmp_path):
    command = [str(HERE / "pod/impatient.py"), f"--config={HERE / 'pod/tiny.py'}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.data_dir={data}"]
    command += ["--config.train.num_steps=100_000"]
    with Pair(cache, *command) as pair:
        pair.wait_for_row(tmp_path / "run", 1)
        pair.processes[silent].send_signal(signal.SIGSTOP)
        assert pair.processes[1 - silent].wait(100) != 0


def test_other_commands_of_two_processes(data, cache, tmp_path):
    config = get_config()
    config.data.data_dir = data
    workdir = make_run(tmp_path / "run", from_config_dict(config))
    asked = f"--workdir={workdir} --max_targets=1000"
    with Pair(
        cache,
        str(HERE / "pod/commands.py"),
        f"evaluate {asked} --json={tmp_path / 'two.json'}",
        f"generate --workdir={workdir} --seconds=0.01 --out={tmp_path / 'clips'}",
    ) as pair:
        outputs = pair.finish(300)
        assert [p.returncode for p in pair.processes] == [0, 0], outputs
    assert "bits per sample generated" in outputs[0]
    assert "bits per sample" not in outputs[1]
    evaluate.main([*asked.split(), f"--json={tmp_path / 'one.json'}"])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["targets"] == one["targets"]
    assert two["nll_nats"] == pytest.approx(one["nll_nats"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not set"),
        ({"NUM_PROCESSES": "2", "PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set"),
        (
            {"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "two", "PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES must be a number, got 'two'",
        ),
        (
            {"COORDINATOR_ADDRESS": "h:1", "NUM_PROCESSES": "2", "PROCESS_ID": "2"},
            "JAX_PROCESS_ID is 2, but JAX_NUM_PROCESSES is only 2",
        ),
    ],
)
def test_invalid_variables_are_named(given, message, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UserError, match=message):
        distributed.start()
