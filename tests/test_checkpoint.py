"""Every damage of a checkpoint is noticed, and the newest undamaged step is used."""

import dataclasses
import gc
import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import make_config

from patchwave_jax import checkpoint_metadata
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.checkpoint_metadata import DamagedError
from patchwave_jax.errors import UserError

CONFIG = make_config("data")
# orbax leaves the coroutines of the other arrays when one can't be read
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(scope="module", autouse=True)
def freeze():
    """Collecting then passes by what earlier tests left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def save(workdir, steps, state, **changes) -> None:
    with Checkpoints(workdir, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(
                step,
                {**state, "step": jnp.int32(step)},
                **{
                    "config": CONFIG,
                    "manifest_hash": "a" * 64,
                    "best_nats": 2.0,
                    "flat_evals": 0,
                    "validation_nats": 2.0 + step / 100,
                    **changes,
                },
            )


@pytest.fixture(scope="module")
def state() -> dict:
    values = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32)
    params = {"bias": jnp.asarray(values[0]), "kernel": jnp.asarray(values)}
    moments = jax.tree.map(lambda x: x + 0.5, params)
    return {"params": params, "opt_state": {"mu": moments}, "step": jnp.int32(0)}


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, [3, 6], state)
    return workdir


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def resume(workdir, state):
    """What training goes on from, and the newest step that is left."""
    with Checkpoints(workdir, keep=9) as checkpoints:
        found = checkpoints.resume(shapes(state), lambda record: None)
        return found and found[0], checkpoints.latest


def damages(content: bytes):
    yield "gone", None
    yield "cut", content[: len(content) // 2]
    yield "empty", b""
    for at in sorted({len(content) // 3, len(content) // 2} if content else ()):
        flipped = bytes([content[at] ^ 0x04])
        yield f"flipped at {at}", content[:at] + flipped + content[at + 1 :]


def test_whatever_file_is_damaged_nothing_wrong_is_restored(saved, copy, state, caplog):
    """Of every file of the newest step: removed, cut, emptied, one bit flipped in two places."""
    good = [jax.device_get({**state, "step": jnp.int32(step)}) for step in (3, 6)]
    fell_back, unharmed = 0, 0
    original = saved / "checkpoints" / "6"
    for file in sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file()):
        for what, content in damages((original / file).read_bytes()):
            shutil.rmtree(copy)
            shutil.copytree(saved, copy)
            target = copy / "checkpoints" / "6" / file
            target.unlink() if content is None else target.write_bytes(content)
            caplog.clear()
            restored, latest = resume(copy, state)
            assert latest in (3, 6), (file, what)
            jax.tree.map(np.testing.assert_array_equal, restored, good[latest == 6])
            aside = sorted(p.name for p in copy.glob("damaged/*"))
            assert aside == ([] if latest == 6 else ["6"]), (file, what)
            if latest == 3:
                assert "checkpoints/6 is damaged" in caplog.text
            fell_back, unharmed = fell_back + (latest == 3), unharmed + (latest == 6)
    print(f"{fell_back} damages noticed, {unharmed} harmless")
    assert fell_back > 20


def test_reading_refuses_damage_and_leaves_it_where_it_is(copy, state):
    arrays = max((copy / "checkpoints/3/params").rglob("*"), key=lambda p: p.stat().st_size)
    content = arrays.read_bytes()
    half = len(content) // 2
    arrays.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best == 3
        with pytest.raises(DamagedError, match=r"checkpoints/3 is damaged.*other steps: 6"):
            checkpoints.restore_params(checkpoints.best, shapes(state["params"]))
        restored = checkpoints.restore_params(6, shapes(state["params"]))
    jax.tree.map(np.testing.assert_array_equal, restored, state["params"])
    assert not (copy / "damaged").exists()


def test_a_metric_that_flatters_is_noticed(copy):
    (copy / "checkpoints/6/metrics/metrics").write_text('{"validation_nll_nats": 1.06}')
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.best == 6
        with pytest.raises(DamagedError, match=r"its metrics are .*1\.06.*not 2\.06"):
            checkpoints.record(6)


def test_with_none_but_damaged_steps_nothing_is_overwritten(copy, state):
    for step in (3, 6):
        (copy / f"checkpoints/{step}/_CHECKPOINT_METADATA").write_text("{")
    for _ in range(2):
        with pytest.raises(UserError, match=r"has no undamaged checkpoint.*damaged"):
            resume(copy, state)
    assert sorted(p.name for p in (copy / "damaged").iterdir()) == ["3", "6"]


def test_the_same_step_may_be_damaged_again(copy, state):
    for taken in ("6", "6-1"):
        (copy / "checkpoints/6/params/manifest.ocdbt").unlink()
        shutil.rmtree(copy / "checkpoints/6/params")
        assert resume(copy, state)[1] == 3
        assert (copy / "damaged" / taken).is_dir()
        save(copy, [6], state)


def test_stray_files_are_passed_by(copy, state):
    (copy / "checkpoints/notes.txt").write_text("mine")
    (copy / "checkpoints/old").mkdir()
    (copy / "stray.json").write_text("{")
    assert resume(copy, state)[1] == 6


def test_another_optimizer_is_named_with_both_layouts(copy, state):
    moments = {"opt_state": {"nu": state["opt_state"]["mu"]}}
    with pytest.raises(UserError, match=r"optimizer/opt_state/nu/\S+ is float32\[.*but absent in"):
        resume(copy, {**state, **moments})
    wider = jax.tree.map(lambda x: jnp.zeros((*x.shape, 2), x.dtype), state["opt_state"])
    with pytest.raises(
        UserError, match=r"optimizer/.* is float32\[60, 2\] here, but float32\[60\]"
    ):
        resume(copy, {**state, "opt_state": wider})
    assert not (copy / "damaged").exists()


def test_other_data_is_named_with_both_values(saved):
    with Checkpoints(saved) as checkpoints:
        record = checkpoints.record(6)
    checkpoint_metadata.check_continues(CONFIG, "a" * 64, record)
    with pytest.raises(UserError, match=r"has the manifest bbbbbbbbbbbb, but .* aaaaaaaaaaaa"):
        checkpoint_metadata.check_continues(CONFIG, "b" * 64, record)
    other = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, dataset="maestro"))
    with pytest.raises(UserError, match=r"dataset is 'maestro', but .* 'audio_folder'"):
        checkpoint_metadata.check_continues(other, "a" * 64, record)


def test_what_may_change_is_listed(saved):
    faster = dataclasses.replace(CONFIG.train, learning_rate=0.5)
    config = dataclasses.replace(CONFIG, train=faster)
    assert checkpoint_metadata.changes(config, CONFIG) == ["train.learning_rate: 0.0001 -> 0.5"]


def test_nothing_is_unpickled(saved, state, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert resume(saved, state)[1] == 6


def test_a_checkpoint_from_before_checksums_and_new_fields_is_read_with_a_warning(
    copy, state, caplog
):
    path = copy / "checkpoints/6/_CHECKPOINT_METADATA"
    content = json.loads(path.read_text())
    for name in ("sha256", "arrays", "validation_nats"):
        del content["custom_metadata"][name]
    del content["custom_metadata"]["config"]["run"]["log_every_steps"]
    path.write_text(json.dumps(content))
    assert resume(copy, state)[1] == 6
    assert "has no checksums" in caplog.text
