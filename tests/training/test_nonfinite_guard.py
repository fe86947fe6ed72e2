"""Steps that are not finite: skipped on the device, counted, and their rows kept for a look."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from conftest import random_codes
from shared_programs import make_step
from test_train import (  # noqa: F401
    clips,
    data_dir,
    final_state,
    mesh_of,
    metrics,
    same_bits,
    small,
)  # fmt: skip

from patchwave_jax import train as train_module
from patchwave_jax.data.index import open_split
from patchwave_jax.errors import UserError
from patchwave_jax.train import make_windows, train
from patchwave_jax.training.nonfinite_guard import SPIKE_HISTORY, NonFiniteGuard
from patchwave_jax.training.step import Step


def poisoned(state: dict, code: int) -> dict:
    """`state` with parameters that turn every window with `code` in it into a NaN."""
    table = state["params"]["encoder"]["embed"]["embedding"]
    table.set_value(table[...].at[code].set(math.nan))
    return state


@pytest.mark.parametrize("objective", ["last", "dense"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(objective):
    config = dataclasses.replace(small(micro_batch_size=2), objective=objective)
    codes = random_codes(8, config.window_samples) // 2  # none above 127
    codes[[1, 6], -100] = 200
    step = make_step(config, mesh_of(2))
    state = poisoned(step.init(), 200)
    before = jax.device_get(state)
    state, values = step.update(state, codes)
    assert not math.isfinite(values["gradient_norm"])
    row_nats = np.stack(jax.device_get(values["row_nats"]), 1)
    assert np.flatnonzero(np.isnan(row_nats)).tolist() == [1, 6]
    assert int(state["step"]) == 1
    changed = [
        (was, now)
        for was, now in zip(*map(jax.tree.leaves, (before, jax.device_get(state))), strict=True)
        if not np.array_equal(was, now, equal_nan=True)
    ]
    assert {(int(was), int(now)) for was, now in changed} == {(0, 1)}  # the counts of steps
    codes[[1, 6], -100] = 100
    state, values = step.update(state, codes)
    assert math.isfinite(values["gradient_norm"])
    row_nats = jax.device_get(values["row_nats"])
    assert np.mean(row_nats) == pytest.approx(float(values["nll_nats"]), rel=1e-6)
    assert not np.array_equal(
        state["params"]["readout"]["bias"], before["params"]["readout"]["bias"]
    )


@pytest.fixture
def laced(monkeypatch):
    """Has `train` meet code 255, which makes NaNs, in row 1 of some steps; no data has it."""

    update = Step.update

    def lace(steps: set[int]) -> None:
        def laced_update(step, state, codes, spent):
            if int(state["step"]) + 1 in steps:
                codes = codes.copy()
                codes[1, -100] = 255
            return update(step, state, codes, spent)

        def make(*args):
            step = make_step(*args)
            return dataclasses.replace(step, init=lambda: poisoned(step.init(), 255))

        monkeypatch.setattr(Step, "update", laced_update)
        monkeypatch.setattr(train_module, "make_step", make)
        monkeypatch.setattr(train_module, "make_mesh", lambda *_: mesh_of(2))

    return lace


def test_training_skips_counts_and_keeps_the_offending_rows(
    data_dir, tmp_path, laced, clips, capsys  # noqa: F811
):  # fmt: skip
    laced({3, 6})
    config = small(data_dir, num_steps=8, micro_batch_size=2)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, sample_every_steps=6))
    halfway = dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=5))
    train(config, tmp_path)
    told = capsys.readouterr().out
    rows = metrics(tmp_path)
    assert [r["step"] for r in rows if r.get("skipped_steps")] == [3, 6]
    # what was due at step 6 is done after the next finite step
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [2, 4, 7, 8]
    assert clips == [7]
    windows = make_windows(config, open_split(data_dir, "audio_folder", "train"))
    for step in (3, 6):
        batch, kept = windows[step - 1], np.load(tmp_path / f"nonfinite/step-{step}.npz")
        assert kept["row"].tolist() == [1]
        np.testing.assert_array_equal(kept["codes"], batch["codes"][[1]])
        name = windows.split.recordings[batch["recording"][1]].name
        assert f"step {step} skipped: its loss is nan" in told
        assert f"rows: {name} from sample {batch['start'][1]}; " in told
    train(halfway, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    same_bits(*(final_state(config, place) for place in (tmp_path, tmp_path / "resumed")))
    assert metrics(tmp_path / "resumed")[-1] == rows[-1]


def test_too_many_in_a_row_end_the_run(data_dir, tmp_path, laced):  # noqa: F811
    laced(set(range(3, 100)))
    config = small(data_dir, num_steps=90, micro_batch_size=2)
    told = (
        r"the last 10 steps had .* not finite; step 2 is the last good one.*nonfinite.*debug_nans"
    )
    with pytest.raises(UserError, match=told):
        train(config, tmp_path)
    assert metrics(tmp_path)[-1]["step"] == 11
    assert len(list((tmp_path / "nonfinite").iterdir())) == 10


def test_debugging_stops_where_the_nan_is_made(data_dir, tmp_path):  # noqa: F811
    config = small(data_dir, learning_rate=1e30)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, debug_nans=True))
    with pytest.raises(UserError, match=r"patchwave_jax/[\w/]+\.py:\d+ in \w+: .*invalid value"):
        train(config, tmp_path)


def test_a_spike_is_reported_with_its_loudest_row(data_dir, tmp_path):  # noqa: F811
    split = open_split(data_dir, "audio_folder", "train")
    windows, told = make_windows(small(data_dir), split), []
    watch, rng = NonFiniteGuard(windows, tmp_path, told.append), np.random.default_rng(0)
    for step in range(1, SPIKE_HISTORY + 50):
        row_nats = rng.normal(2.0, 0.2, 8)
        if step == SPIKE_HISTORY + 20:
            row_nats[3] = 9.0
        micro_batches = [row_nats[::2], row_nats[1::2]]
        values = {"nll_nats": row_nats.mean(), "gradient_norm": 1.0, "row_nats": micro_batches}
        watch.add(step, values, 0)
    assert watch.read()["skipped_steps"] == 0
    batch = windows[SPIKE_HISTORY + 19]
    place = f"{split.recordings[batch['recording'][3]].name} from sample {batch['start'][3]}"
    assert len(told) == 1
    assert told[0].startswith(f"step {SPIKE_HISTORY + 20}: the loss spiked to 4.")
    assert told[0].endswith(place)
