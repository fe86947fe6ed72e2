"""The accelerator's measurements, rehearsed on the CPU."""

import json
import subprocess

import pytest

from benchmarks.accelerator import __main__ as accelerator
from patchwave_jax.errors import UserError


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_parts_run_and_results_of_several_runs_merge(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    write(
        tmp_path / "device.jsonl",
        {"case": "copy", "gb_per_second": -1.0},
        {"case": "of another card", "gb_per_second": 7.0},
    )
    accelerator.main(
        [f"--out={tmp_path}", "--small", "--minutes=3", "--parts", "device", "convolutions"]
    )
    rows = accelerator.read(tmp_path / "device.jsonl")
    assert rows["copy"]["gb_per_second"] > 0
    assert rows["of another card"]["gb_per_second"] == 7
    assert rows["product bfloat16"]["tflops_per_second"] > 0
    rows = accelerator.read(tmp_path / "convolutions.jsonl")
    assert len(rows) == 4
    assert all(row["relative_error"] < 2e-2 for row in rows.values())
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert json.loads((tmp_path / "runs.jsonl").read_text())["ended"]["device"] == "done"


@pytest.mark.quick
@pytest.mark.parametrize("more", [True, False])
def test_a_part_that_crashes_goes_on_after_the_case(tmp_path, monkeypatch, more):
    commands = []

    def run(command, **_):
        commands.append(command)
        with open(command[4], "a") as file:
            if len(commands) == 1:
                file.write('{"case": "a", "ms": 1.0}\n{"case": "b", "error": "not finished"}\n')
            elif more:
                file.write('{"case": "c", "ms": 3.0}\n')
        return subprocess.CompletedProcess(command, -6 if len(commands) == 1 or not more else 0)

    write(tmp_path / "steps.jsonl", {"case": "a", "ms": 9.0}, {"case": "c", "ms": 8.0})
    monkeypatch.setattr(accelerator.subprocess, "run", run)
    ended = accelerator.run_part("steps", 60, tmp_path / "steps.jsonl", small=False)
    assert ended == "a process ended with -6"
    assert commands[1][5:] == ["--skip=a", "--skip=b"]
    assert len(commands) == 2
    rows = accelerator.read(tmp_path / "steps.jsonl")
    assert rows["a"]["ms"] == 1
    assert rows["c"]["ms"] == (3 if more else 8)
    assert rows["b"] == {"case": "b", "error": "not finished"}


@pytest.mark.quick
def test_no_time_is_refused(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        accelerator.main([f"--out={tmp_path}", "--minutes=0"])
    assert not isinstance(stopped.value, UserError)
    assert list(tmp_path.iterdir()) == []
