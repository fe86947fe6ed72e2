"""Training: exact resumption, any number of devices, refusals, and that it learns."""

import dataclasses
import functools
import json
import re
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SMALL, random_codes
from jax.sharding import AxisType, Mesh
from shared_programs import make_step
from small_run import make_data

from patchwave_jax import expected
from patchwave_jax import train as train_module
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.data import manifest
from patchwave_jax.errors import UserError
from patchwave_jax.runtime.memory import choose_execution
from patchwave_jax.train import train
from patchwave_jax.training.optimizer import make_schedule
from patchwave_jax.training.step import Step

# A dropped token would take with it the NaN that `tests/training` puts into it.
MODEL = dataclasses.replace(
    SMALL, num_layers=1, input="embedding", head="logistic_mixture", token_dropout=0.0
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    return str(make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data")))


def small(data_dir: str = "", **train_fields) -> Config:
    """Dropout is on, so that resuming has randomness to get right."""
    recipe = TrainConfig(batch_size=8, micro_batch_size=0, num_steps=4, learning_rate=1e-3)
    return Config(
        objective="dense",
        context_samples=240,
        model=MODEL,
        data=DataConfig(dataset="audio_folder", data_dir=data_dir, distinct_positions=1000),
        train=dataclasses.replace(recipe, **train_fields),
        run=RunConfig(log_every_steps=1, eval_every_steps=2, eval_targets=2000, save_every_steps=2),
    )


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))


def final_state(config: Config, workdir) -> dict:
    step = make_step(config, train_module.make_mesh())
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest is not None
        return checkpoints.restore(checkpoints.latest, step.abstract_state)


def metrics(workdir, *, timing=False) -> list[dict]:
    rows = [json.loads(row) for row in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    clocks = set() if timing else {"minutes", "seconds_per_step", "targets_per_second"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def same_bits(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def with_steps(config: Config, num_steps: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, num_steps=num_steps))


@dataclasses.dataclass(frozen=True)
class Runs:
    """A run of four steps, and the same that ended after two."""

    config: Config  # of four
    straight: Path
    halfway: Path


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory) -> Callable[[str], Runs]:
    @functools.cache
    def of(objective: str) -> Runs:
        run = dataclasses.replace(small().run, sample_every_steps=4, sample_seconds=0.01)
        config = dataclasses.replace(small(data_dir), objective=objective, run=run)
        made = Runs(config, *(tmp_path_factory.mktemp(name) for name in ("straight", "halfway")))
        assert train(config, made.straight)
        assert train(with_steps(config, 2), made.halfway)
        return made

    return of


@pytest.fixture
def dense(runs) -> Runs:
    return runs("dense")


@pytest.fixture
def halfway(dense, tmp_path) -> Path:
    """A copy, to go on from."""
    return shutil.copytree(dense.halfway, tmp_path / "halfway")


@pytest.mark.parametrize("objective", ["last", "dense"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(objective, runs, tmp_path):
    made = runs(objective)
    resumed = shutil.copytree(made.halfway, tmp_path / "resumed")
    assert train(made.config, resumed)
    both = made.straight, resumed
    same_bits(*(final_state(made.config, folder) for folder in both))
    rows = [metrics(folder) for folder in both]
    assert rows[0] == rows[1]
    assert [r["step"] for r in rows[0] if r["kind"] == "train"] == [1, 2, 3, 4]
    clips = [sorted((folder / "samples").iterdir()) for folder in both]
    assert [clip.name for clip in clips[0] if clip.suffix == ".wav"] == [
        "step00000004_0.wav", "step00000004_1.wav"
    ]  # fmt: skip
    assert [x.read_bytes() for x in clips[0]] == [x.read_bytes() for x in clips[1]]
    (events,) = (made.straight / "tensorboard").glob("events*")
    assert events.read_bytes().count(b"audio/wav") == 2


def test_eight_devices_then_four(dense, halfway, monkeypatch):
    """What is restored is bit for bit what eight devices saved; going on differs by rounding."""
    saved = final_state(dense.config, halfway)
    monkeypatch.setattr(train_module, "make_mesh", lambda *_: mesh_of(4))
    restored = final_state(dense.config, halfway)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(restored)} == {4}
    same_bits(jax.device_get(saved), jax.device_get(restored))
    train(dense.config, halfway)
    for straight, resumed in zip(metrics(dense.straight), metrics(halfway), strict=True):
        assert straight["step"] == resumed["step"]
        assert straight["nll_nats"] == pytest.approx(resumed["nll_nats"], abs=1e-5)


@pytest.mark.parametrize("objective", ["last", "dense"])
def test_one_device_equals_eight_and_micro_batches_equal_the_whole(objective):
    plain = dataclasses.replace(MODEL, conv_dropout=0.0, mlp_dropout=0.0, head_dropout=0.0)
    config = dataclasses.replace(small(), objective=objective, model=plain)
    codes = random_codes(16, config.window_samples)
    got = []
    for devices, rows in ((1, 0), (8, 1), (4, 2)):
        recipe = dataclasses.replace(config.train, batch_size=16, micro_batch_size=rows)
        step = make_step(dataclasses.replace(config, train=recipe), mesh_of(devices))
        state, values = step.update(step.init(), codes)
        got.append(jax.device_get((values, state["params"])))
    for values, params in got[1:]:
        np.testing.assert_allclose(values["nll_nats"], got[0][0]["nll_nats"], rtol=1e-5)
        np.testing.assert_allclose(values["gradient_norm"], got[0][0]["gradient_norm"], rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), params, got[0][1])


@pytest.mark.parametrize("objective", ["last", "dense"])
def test_overfits_one_batch(objective):
    """One repeated batch of noise is learned by heart: well below a bit a sample."""
    model = dataclasses.replace(
        MODEL, width=32, head="softmax", skip_connections=True,
        conv_dropout=0.0, mlp_dropout=0.0, head_dropout=0.0,
    )  # fmt: skip
    config = dataclasses.replace(
        small(batch_size=2, learning_rate=1e-2), objective=objective, model=model
    )
    step = make_step(config, mesh_of(1))
    state, codes = step.init(), random_codes(2, config.window_samples)
    first = None
    for _ in range(150):
        state, values = step.update(state, codes)
        first = first or float(values["nll_nats"]) / np.log(2)
    bits = float(values["nll_nats"]) / np.log(2)
    assert first > 7
    assert bits < 0.3


def test_a_contradiction_to_the_checkpoint_is_named(dense, halfway):
    config = dense.config
    wrong = {
        "config.model.width is 32, but the checkpoint was trained with 16": dataclasses.replace(
            config, model=dataclasses.replace(MODEL, width=32)
        ),
        "config.objective is 'last'": dataclasses.replace(config, objective="last"),
        "config.data.quantiser is 'linear'": dataclasses.replace(
            config, data=dataclasses.replace(config.data, quantiser="linear")
        ),
    }
    for message, other in wrong.items():
        with pytest.raises(UserError, match=message):
            train(other, halfway)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_step(data_dir, halfway):
    with pytest.raises(UserError, match="step 2 is the last good one"):
        train(small(data_dir, num_steps=9, learning_rate=1e30), halfway)
    with Checkpoints(halfway) as checkpoints:
        assert checkpoints.latest == 2


@pytest.fixture(scope="module")
def flat(data_dir, tmp_path_factory) -> tuple[Config, Path]:
    """A run whose parameters stay where they start."""
    config = small(
        data_dir,
        num_steps=100,
        learning_rate=1e-30,
        final_learning_rate=1e-30,
        decay_steps=4,
        patience_evals=2,
    )
    workdir = tmp_path_factory.mktemp("flat")
    train(config, workdir)
    return config, workdir


def test_stops_when_the_validation_loss_is_flat(flat):
    config, workdir = flat
    evaluated = [row["step"] for row in metrics(workdir) if row["kind"] == "validation"]
    assert evaluated == [2, 4, 6, 8]
    train(config, workdir)  # stays stopped
    assert metrics(workdir)[-1]["step"] == 8


def test_the_mixture_starts_from_linear_prediction(flat):
    config, workdir = flat
    taps = final_state(config, workdir)["params"]["head"]["predictor"][...]
    assert taps.shape == (16,)
    assert float(jnp.abs(taps).max()) > 1  # far from the previous sample alone
    assert metrics(workdir)[0]["nll_bits"] < 5.5  # order-0 entropy is 7.6


def test_is_held_against_classical_baselines_and_a_run_done_before(
    data_dir, tmp_path, monkeypatch, capsys
):
    config = small(data_dir, num_steps=2)
    _, manifest_hash = manifest.load(data_dir, "audio_folder")
    known = expected.Expected(
        "known", "", "", manifest_hash, expected.fingerprint(config), (1, 3), (1, 2), (9.0, 7.0), ""
    )
    monkeypatch.setattr(expected, "records", lambda: [known])
    train(config, tmp_path)
    printed = capsys.readouterr().out
    assert "expected after step 2: 8.0000 bits (known)" in printed
    assert re.search("bits is still above .*block-adaptive-256", printed)


def test_keeps_the_newest_and_the_best(dense, halfway):
    config = with_steps(dense.config, 8)
    train(config, halfway)
    with Checkpoints(halfway) as checkpoints:
        steps = [c.step for c in checkpoints._checkpointer.checkpoints]
        losses = {
            row["step"]: row["nll_nats"] for row in metrics(halfway) if row["kind"] == "validation"
        }
        assert checkpoints.best == min(losses, key=lambda step: losses[step])
        assert set(steps) == {6, 8, checkpoints.best}
        record = checkpoints.record(8)
        assert record.config == config
        assert record.best_nats == min(losses.values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_cleanly(number, data_dir, tmp_path, monkeypatch, capsys):
    """`tests/crash` sends SIGTERM to processes."""

    update = Step.update

    def signalled(step, state, *rest):
        if int(state["step"]) == 2:
            signal.raise_signal(number)
        return update(step, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "update", signalled)
        assert not train(small(data_dir, num_steps=100_000), tmp_path)
    assert "The same command goes on" in capsys.readouterr().out
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
    assert train(small(data_dir), tmp_path)
    assert [r["step"] for r in metrics(tmp_path) if r["kind"] == "train"] == [1, 2, 3, 4]


@pytest.fixture
def clips(monkeypatch) -> list[int]:
    """The steps after which clips are made, which are empty."""
    steps = []

    def make(config, params, folder, done, stopping):
        steps.append(done)
        return np.zeros((0, 1), np.int16)

    monkeypatch.setattr(train_module.preview, "make", make)
    return steps


@pytest.fixture
def minute_steps(monkeypatch) -> None:
    """A training step takes a minute of the clock, and nothing else takes any."""
    now, update = [0.0], Step.update

    def timed(*args):
        now[0] += 60
        return update(*args)

    monkeypatch.setattr(Step, "update", timed)
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(train_module, "time", clock)


def test_ends_when_its_minutes_are_used_up(data_dir, tmp_path, minute_steps, clips, capsys):
    recipe = {"num_steps": 100, "schedule": "cosine", "decay_steps": 100}
    config = small(data_dir, final_learning_rate=1e-5, max_minutes=5.0, **recipe)
    config = dataclasses.replace(
        config, run=dataclasses.replace(config.run, eval_every_steps=4, sample_every_steps=50)
    )

    def rates() -> list[float]:
        return [row["learning_rate"] for row in metrics(tmp_path) if row["kind"] == "train"]

    def decayed(share: float) -> float:
        return 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * share)) / 2

    assert train(with_steps(config, 3), tmp_path)
    assert rates() == pytest.approx([decayed(x / 5) for x in range(3)])
    assert train(config, tmp_path)
    assert rates() == pytest.approx([decayed(x / 5) for x in range(6)])
    assert rates()[-1] == pytest.approx(1e-5)
    printed = capsys.readouterr().out
    assert "trained to step 6, 11,520 targets; config.train.max_minutes=5 ended" in printed
    validated = [row["step"] for row in metrics(tmp_path) if row["kind"] == "validation"]
    assert (validated, clips) == ([3, 4, 6], [6])
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 6
        assert checkpoints.record(6).seconds == 360

    assert train(config, tmp_path)  # stays ended
    assert len(rates()) == 6
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_minutes=8.0))
    assert train(longer, tmp_path)
    assert rates()[6:] == pytest.approx([decayed(x / 8) for x in (6, 7, 8)])


def test_the_learning_rate_by_time_reaches_the_update():
    """The same step and gradient, at the start of the budget, in its middle and at its end."""
    recipe = {"schedule": "cosine", "decay_steps": 100, "learning_rate": 1e-3}
    config = small(max_minutes=5.0, final_learning_rate=1e-4, **recipe)
    step, codes = make_step(config, mesh_of(1)), random_codes(8, config.window_samples)
    moved = []
    for spent in (None, 0.0, 0.5, 1.0, 3.0):
        before = jax.device_get(step.init()["params"])
        state, _ = step.update(step.init(), codes, spent)
        change = jax.tree.map(lambda a, b: a - b, jax.device_get(state["params"]), before)
        moved.append(np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(change))))
    np.testing.assert_allclose(moved / moved[0], [1, 1, 0.55, 0.1, 0.1], rtol=1e-3)
    assert step.apply._cache_size() == 2  # one program without a budget, one with


def test_schedules_by_hand():
    drop = make_schedule(Config())
    assert [float(drop(step)) for step in (0, 249_999, 250_000, 999_999)] == pytest.approx(
        [1e-4, 1e-4, 5e-6, 5e-6]
    )
    recipe = TrainConfig(
        schedule="cosine",
        warmup_steps=10,
        decay_steps=110,
        learning_rate=1.0,
        final_learning_rate=0.1,
    )
    cosine = make_schedule(Config(train=recipe))
    assert [float(cosine(step)) for step in (0, 5, 10, 60, 110, 500)] == pytest.approx(
        [0, 0.5, 1, 0.55, 0.1, 0.1]
    )
    timed = [(0, 0.5, 0), (5, 0.1, 0.5), (5, 1, 0.1), (10, 0, 1), (20, 60 / 110, 0.55)]
    timed += [(60, 0.1, 0.55), (60, 1, 0.1), (500, 0, 0.1)]
    for step, spent, wanted in timed:
        found = make_schedule(Config(train=recipe), spent)(step)
        assert float(found) == pytest.approx(wanted), (step, spent)


def test_a_batch_that_does_not_split_over_the_devices_is_named():
    with pytest.raises(UserError, match=r"config\.train\.batch_size 7 is not a multiple of 8"):
        make_step(small(batch_size=7), mesh_of(8))


def test_chunks_fit_the_memory_and_divide():
    class Device:
        def __init__(self, limit, platform="gpu"):
            self.limit, self.platform = limit, platform

        def memory_stats(self):
            return {"bytes_limit": self.limit}

    for context in (128_000, 1_000_000):
        config = dataclasses.replace(Config(), objective="dense", context_samples=context)
        small_device = choose_execution(config, 1, Device(12e9))
        large_device = choose_execution(config, 1, Device(80e9))
        assert small_device.phase_chunk <= large_device.phase_chunk
        assert small_device.encode_chunk_patches <= large_device.encode_chunk_patches
        assert 2000 % small_device.phase_chunk == 0
        assert config.window_units % small_device.encode_chunk_patches == 0
    chosen = dataclasses.replace(config, run=dataclasses.replace(config.run, phase_chunk=4))
    assert choose_execution(chosen, 1, Device(80e9)).phase_chunk == 4
    on_chip = {choose_execution(config, 1, Device(x, "tpu")).phase_chunk for x in (16e9, 95e9)}
    assert on_chip == {choose_execution(config, 1, Device(12e9, "cpu")).phase_chunk}
