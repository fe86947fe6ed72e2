"""The baselines in the commands: training, resuming, evaluation, generation, the report."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile as sf
from conftest import SAMPLERNN, WAVENET, random_codes
from flax import nnx
from jax.sharding import AxisType
from shared_programs import make_step
from small_run import make_config, make_data, tones

from patchwave_jax import evaluate, generate, report, score, train
from patchwave_jax.config import Config, RunConfig, TrainConfig
from patchwave_jax.config_dict import from_config_dict, to_config_dict
from patchwave_jax.data.index import open_split
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import evaluator as evaluator_module
from patchwave_jax.evaluation import measure, protocol
from patchwave_jax.generation import check
from patchwave_jax.models.base import log_prob as picked
from patchwave_jax.models.megabyte import MegabyteConfig
from patchwave_jax.models.sashimi import SaShiMiConfig, s4_parameters
from patchwave_jax.training.optimizer import make_optimizer

SASHIMI = SaShiMiConfig(width=8, num_layers=1, pools=(4,), state_size=8)
MEGABYTE = MegabyteConfig(
    patch_samples=16,
    max_patches=16,
    global_width=16,
    global_layers=1,
    global_heads=2,
    local_width=16,
    local_layers=1,
    local_heads=2,
    head_size=8,
)
MODELS = {
    "wavenet": WAVENET,
    "samplernn": SAMPLERNN,
    "sashimi": SASHIMI,
    "megabyte": MEGABYTE,
}
NAMES = list(MODELS)
STEPS = 12


def small(name: str, data_dir="", **changes) -> Config:
    train_config = TrainConfig(
        batch_size=8, micro_batch_size=1, num_steps=STEPS, learning_rate=3e-3
    )
    config = make_config(data_dir)
    return dataclasses.replace(
        config,
        context_samples=256,
        model=MODELS[name],
        data=dataclasses.replace(config.data, distinct_positions=0),
        train=train_config,
        run=RunConfig(
            eval_every_steps=STEPS, save_every_steps=5, eval_targets=2_000, sample_every_steps=0
        ),
        **changes,
    )


@functools.cache
def params_of(name: str):
    config = small(name)
    return jax.jit(lambda: nnx.state(config.build_model(nnx.Rngs(0))))()


def mesh(devices=1):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=NAMES)
def run(request, data_dir, tmp_path_factory):
    """A configuration and the directory where it was trained."""
    config = small(request.param, data_dir)
    workdir = tmp_path_factory.mktemp(request.param)
    assert train.train(config, workdir)
    return config, workdir


def test_training_lowers_the_loss(run):
    _, workdir = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["kind"] == "validation"
    assert rows[-1]["nll_bits"] < rows[0]["nll_bits"] - 0.02


def test_interrupted_it_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    """It stops in the middle of a stretch, where SampleRNN carries its state along."""
    config, straight = run
    stops = iter([False] * 4)
    stopping = contextlib.nullcontext(lambda: next(stops, True))
    with monkeypatch.context() as patched:
        patched.setattr(train, "stop_requested", lambda **_: stopping)
        assert not train.train(config, tmp_path)
    assert train.train(config, tmp_path)
    ends = (evaluator_module.load(workdir, STEPS)[1] for workdir in (straight, tmp_path))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a, b)


def test_steps_walk_through_their_rows(data_dir):
    split, config = open_split(data_dir, "audio_folder", "train"), small("samplernn", data_dir)
    parts = train.make_windows(config, split)
    whole = train.make_windows(dataclasses.replace(config, model=WAVENET), split)[1]
    walked = [parts[config.segments + i] for i in range(config.segments)]
    np.testing.assert_array_equal(np.concatenate([p["codes"] for p in walked], 1), whole["codes"])
    np.testing.assert_array_equal(walked[3]["start"], whole["start"] + 3 * 32)
    assert parts.locate(config.segments + 3, 2) == (whole["recording"][2], whole["start"][2])


def test_samplernn_updates_once_a_segment_with_what_it_carries():
    """Two steps on eight devices in micro-batches, against the plain loss of the whole row."""
    config = dataclasses.replace(small("samplernn"), context_samples=64)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=16, learning_rate=1e-9)
    )
    made = make_step(config, mesh(8))
    state, codes = made.init(), random_codes(16, 64)
    model = nnx.merge(made.graphdef, jax.device_get(state["params"]))
    whole = -np.asarray(picked(model.window_logits(codes), codes))
    for _ in range(2):  # and the next row begins with a new state
        for first in (0, 32):
            state, metrics = made.update(state, codes[:, first : first + 32])
            expected = whole[:, first : first + 32].mean()
            np.testing.assert_allclose(metrics["nll_nats"], expected, rtol=1e-5)


def test_eight_devices_train_as_one():
    config = small("wavenet")
    codes = random_codes(8, 256)

    def losses(devices):
        made = make_step(config, mesh(devices))
        state, metrics = made.init(), []
        for _ in range(3):
            state, found = made.update(state, codes)
            metrics.append([found["nll_nats"], found["gradient_norm"]])
        return np.asarray(metrics)

    one = losses(1)
    assert one[2, 0] < one[0, 0]
    np.testing.assert_allclose(losses(8), one, rtol=1e-4)


def test_s4_has_its_own_learning_rate():
    """Adam's first step moves every parameter by its rate, whatever the gradient."""
    config = small("sashimi")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, learning_rate=0.004, weight_decay=0.01)
    )
    optimizer = make_optimizer(config)
    params = params_of("sashimi")
    gradient = jax.tree.map(jnp.ones_like, params)
    moved, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    for step, param, own in zip(
        *map(jax.tree.leaves, (moved, params, s4_parameters(params))), strict=True
    ):
        decay = 0 if own or param.ndim < 2 else 0.01 * 0.004 * param
        np.testing.assert_allclose(step, -(0.001 if own else 0.004) - decay, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_target_has_the_context_it_is_said_to_have(name, stride):
    """Against the network run on that context alone."""
    config = small(name)
    codes = random_codes(700)
    params = params_of(name)
    evaluator = evaluator_module.Evaluator(config, mesh())
    network = nnx.merge(config.abstract_model()[0], params)
    logits = jax.jit(network.window_logits)
    windows = protocol.plan([700], config, stride)
    counted = 0
    for window, log_probs, contexts in evaluator.score(params, lambda _: codes, windows):
        counted += log_probs.size
        for i in (0, 33, log_probs.size - 1):
            target = window.first + i
            alone = np.full((1, 256), 128, np.uint8)
            seen = codes[target - contexts[i] : target + 1]
            alone[0, : seen.size] = seen
            expected = picked(logits(alone), alone)[0, contexts[i]]
            np.testing.assert_allclose(log_probs[i], expected, atol=1e-4)
    assert counted == 700


def test_evaluation_and_scoring_agree(run, data_dir, tmp_path, capsys):
    config, workdir = run
    evaluate.main([f"--workdir={workdir}", "--split=test", f"--json={tmp_path}/x.json"])
    found = json.loads((tmp_path / "x.json").read_text())
    limit = WAVENET.receptive_field if config.model == WAVENET else 255
    assert found["context_max"] == limit
    split = open_split(data_dir, "audio_folder", "test")
    files = []
    for i, recording in enumerate(split.recordings):
        files.append(tmp_path / f"{i}.wav")
        sf.write(files[-1], split.read(i, 0, recording.num_samples), 16_000)
    score.main([f"--workdir={workdir}", *map(str, files)])
    assert f"{found['nll_bits']:.4f} bits" in capsys.readouterr().out.splitlines()[-1]
    if config.model == WAVENET:
        report.main([f"--workdir={workdir}", "--max_targets=2000"])
        assert "bits per sample" in (workdir / "report.html").read_text()


def test_all_models_are_measured_on_the_same_targets(data_dir):
    split = open_split(data_dir, "audio_folder", "test")
    for name in NAMES:
        config = small(name)
        targets = measure.choose_targets(config, split, clip_samples=300, drop_last=True)
        spans = {(w.clip, t) for w in targets.windows for t in range(w.first, w.end)}
        assert len(spans) == 300 * len(targets.clips)


def test_generation_agrees_with_evaluation(run, capsys, monkeypatch):
    """`generate --check`, across a slide of the window."""
    _, workdir = run
    monkeypatch.setattr(check, "CHECK_SAMPLES", 300)
    with pytest.raises(SystemExit) as ended:
        generate.main([f"--workdir={workdir}", "--check"])
    words = capsys.readouterr().out
    assert ended.value.code == 0, words
    assert "across 0 slides" not in words


def test_prompts_and_resuming(run, tmp_path):
    """A clip that was stopped goes on with the same bits."""
    _, workdir = run
    prompt = tmp_path / "prompt.wav"
    sf.write(prompt, tones(2_100, 0), 16_000)
    common = [f"--workdir={workdir}", f"--prompt={prompt}", "--num=2"]
    generate.main([*common, "--seconds=0.05", f"--out={tmp_path}/whole"])
    generate.main([*common, "--seconds=0.02", f"--out={tmp_path}/parts"])
    generate.main([f"--out={tmp_path}/parts", "--resume", "--seconds=0.05"])
    for clip in ("000", "001"):
        whole, parts = (
            sf.read(tmp_path / f / f"{clip}.wav", dtype="int16")[0] for f in ("whole", "parts")
        )
        assert whole.size == 2_100 + 800
        np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("wavenet", {"context_samples": 28}, "context_samples"),
        ("samplernn", {"context_samples": 96}, "context_samples"),
        ("samplernn", {"model.segment_samples": 40}, "model.segment_samples"),
        ("samplernn", {"model.frame_sizes": (4, 3, 2)}, "model.segment_samples"),
        ("samplernn", {"model.kind": "wavenets"}, "model.kind"),
        ("sashimi", {"context_samples": 262}, "model.pools"),
        ("sashimi", {"model.pools": (4, 0)}, "model.pools"),
        ("sashimi", {"model.state_size": 7}, "model.state_size"),
        ("sashimi", {"model.num_layers": 0}, "model.num_layers"),
        ("sashimi", {"model.dropout": 1.0}, "model.dropout"),
        ("megabyte", {"context_samples": 240}, "context_samples"),
        ("megabyte", {"model.head_size": 7}, "model.head_size"),
        ("wavenet", {"objective": "last"}, "objective"),
        ("wavenet", {"model.cycles": 0}, "model.cycles"),
        ("wavenet", {"model.compute_dtype": "float64"}, "model.compute_dtype"),
    ],
)
def test_bad_configurations_are_refused_by_name(name, change, field):
    tree = to_config_dict(small(name))
    assert from_config_dict(tree) == small(name)
    tree.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=f"config.{field}"):
        from_config_dict(tree)


def test_another_model_in_the_same_directory_is_refused(run, tmp_path):
    config, workdir = run
    other = small(next(name for name in NAMES if MODELS[name] != config.model))
    other = dataclasses.replace(other, data=config.data)
    with pytest.raises(UserError, match=r"config.model.kind is .*checkpoint was trained with"):
        train.train(other, workdir)
