"""Profiler traces: the requested steps, by number, where TensorBoard looks for them."""

import re

import jax
import pytest
from jax.profiler import ProfileData

from patchwave_jax.errors import UserError
from patchwave_jax.runtime import profiler
from patchwave_jax.runtime.profiler import StepProfiler


def annotated(path) -> list[int]:
    """Numbers of the steps annotated in a trace: stats of events called `train`."""
    found = []
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name == "train":
                    found += [value for name, value in event.stats if name == "step_num"]
    return sorted(found)


def test_a_trace_of_two_steps(tmp_path, capsys):
    add = jax.jit(lambda x: x + 1)
    with StepProfiler((2, 3), tmp_path, 0, 4) as traced:
        values = [int(traced.run(number, add, number)) for number in (1, 2, 3, 4)]
    assert values == [2, 3, 4, 5]
    # LOGDIR/plugins/profile/TIME/HOST.xplane.pb is what TensorBoard's plugin lists
    (path,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert annotated(path) == [2, 3]
    assert "traced steps 2 to 3 in" in capsys.readouterr().out


def test_steps_that_a_run_does_not_have_are_refused(tmp_path):
    for done, last in ((2, 9), (0, 2)):
        with pytest.raises(UserError, match=f"2:3, but this run's steps are {done + 1} to {last}"):
            StepProfiler((2, 3), tmp_path, done, last)


@pytest.mark.parametrize("flag", ["", "3", "3:2", "0:4", "1:101", "1:2:3"])
def test_an_invalid_range_of_steps_is_refused(flag):
    with pytest.raises(UserError, match=re.escape(f"--profile_steps={flag} must be")):
        profiler.parse_steps(flag)
