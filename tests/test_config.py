"""Configurations: the files, the paper's recipe, and every mistake named by its field."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import pytest

from patchwave_jax import expected, recipes, train
from patchwave_jax.config import Config
from patchwave_jax.config_dict import from_config_dict, to_config_dict
from patchwave_jax.errors import EXIT_CODE, UserError
from patchwave_jax.models.base import count_parameters
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str, arg: str = "") -> Config:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(arg))


@pytest.mark.parametrize(("name", "tokens"), [("ctx128k", 64), ("ctx512k", 256), ("ctx1m", 500)])
def test_the_papers_recipe(name, tokens):
    config = load(name)
    assert (config.objective, config.window_units, config.targets_per_step) == ("last", tokens, 40)
    train, model = config.train, config.model
    assert (train.batch_size, train.learning_rate, train.decay_steps) == (40, 1e-4, 250_000)
    assert (train.final_learning_rate, train.schedule) == (5e-6, "drop")
    dropout = (model.conv_dropout, model.mlp_dropout, model.head_dropout, model.token_dropout)
    assert dropout == (0.2, 0.2, 0.2, 0.1)
    assert config.data.distinct_positions == 10_000_000


def test_the_written_out_recipe_is_that_of_the_other_contexts():
    same = dataclasses.replace(load("ctx1m"), context_samples=128_000)
    assert load("ctx128k") == same == recipes.paper(128_000)


@pytest.mark.parametrize(("name", "run"), [("demo", "demo"), ("laptop", "laptop-pianomix")])
def test_the_numbers_in_a_configuration_are_those_of_its_recorded_run(name, run):
    text = (CONFIGS / f"{name}.py").read_text()
    (found,) = (record for record in expected.records() if record.name == run)
    minutes, bits = found.minutes[-1], found.validation_bits[-1]
    assert f"{minutes:.1f} minutes, {bits:.3f} bits per sample on validation" in text
    data = {"dataset": found.config["data"]["dataset"]}
    config = load(name)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    assert expected.matching(config, found.manifest_hash) == found


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
def test_print_config_prints_what_would_be_trained(capsys):
    flags = [f"--config={CONFIGS / 'wavenet.py'}", "--config.train.batch_size=3"]
    train.main([*flags, "--print_config"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["batch_size"] == 3
    assert from_config_dict(printed).model == load("wavenet").model


@pytest.mark.parametrize(
    ("name", "arg", "parameters"),
    [
        ("ctx128k", "", 3_109_024),
        ("ctx1m", "dense", None),
        ("demo", "", None),
        ("wavenet", "", 4_244_480),
        ("samplernn", "", 35_034_624),
        ("sashimi", "6", None),  # of one layer, which takes a fifth of the time
        ("megabyte", "", 33_815_808),
    ],
)
def test_every_configuration_traces_a_whole_train_step(name, arg, parameters):
    config = load(name, arg)
    if name == "sashimi":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    batch = config.train.batch_size
    while batch % jax.device_count():
        batch += 1
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=batch))
    step = make_step(config, make_mesh())
    state, rows = step.abstract_state, step.micro.rows
    codes = jax.ShapeDtypeStruct((rows, config.window_samples // config.segments), "uint8")
    total = jax.ShapeDtypeStruct((), "float32"), state["params"]
    args = total, state["params"], state.get("carry", ()), codes, state["step"], 0
    total, row_nats, carry = jax.eval_shape(step.accumulate, *args)
    state, metrics = jax.eval_shape(step.apply, state, total, carry)
    assert row_nats.shape == (rows,)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), step.abstract_state
    )
    assert set(metrics) == {"nll_nats", "gradient_norm"}
    if parameters:
        assert count_parameters(state["params"]) == parameters
    else:
        assert count_parameters(state["params"]) < 3_200_000


def test_an_unknown_argument_is_named():
    with pytest.raises(UserError, match="dense2"):
        load("ctx128k", "dense2")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective", "both", "config.objective must be one of last, dense"),
        ("context_samples", 100_001, "not a whole number of patches of 2000.*nearest is 100000"),
        ("context_samples", 0, "config.context_samples"),
        ("seed", -1, "config.seed"),
        ("model.head", "gaussian", "config.model.head must be one of"),
        ("model.width", 127, "config.model.width must be even"),
        ("model.num_heads", 0, "config.model.num_heads must be at least 1"),
        ("model.num_heads", 2.5, "config.model.num_heads must be of type int"),
        ("model.strides", (2, 3), "config.model.strides must have one entry"),
        ("model.strides", 2, "config.model.strides must be a tuple"),
        ("model.strides", (2, 3, 2, 3, 0), "config.model.strides must be at least 1"),
        ("model.patch_samples", 200, "config.model.patch_samples 200 is too short"),
        ("model.mlp_dropout", 1.0, "config.model.mlp_dropout must be below 1"),
        ("model.predictor_taps", 4000, "config.model.predictor_taps"),
        ("data.quantiser", "alaw", "config.data.quantiser must be one of mulaw"),
        ("train.learning_rate", float("nan"), "config.train.learning_rate must be finite"),
        ("train.learning_rate", "fast", "config.train.learning_rate must be of type float"),
        ("train.batch_size", True, "config.train.batch_size must be of type int"),
        ("train.max_minutes", -1.0, "config.train.max_minutes must be at least 0"),
        ("train.max_minutes", 5, "config.train.max_minutes needs config.train.schedule='cosine'"),
        ("run.phase_chunk", 7, "config.run.phase_chunk 7 does not divide"),
        ("run.encode_chunk_patches", 7, "config.run.encode_chunk_patches 7 does not divide"),
    ],
)
def test_a_wrong_value_is_named(field, value, message):
    tree = to_config_dict(Config()).to_dict()
    *parents, name = field.split(".")
    part = tree
    for parent in parents:
        part = part[parent]
    part[name] = value
    with pytest.raises(UserError, match=message):
        from_config_dict(tree)


def test_unknown_and_missing_fields_are_named():
    tree = to_config_dict(Config()).to_dict()
    tree["model"]["heads"] = 3
    with pytest.raises(UserError, match=r"config\.model\.heads is not a field; the fields are"):
        from_config_dict(tree)
    del tree["model"]["heads"], tree["train"]["beta2"]
    with pytest.raises(UserError, match=r"config\.train\.beta2 is missing"):
        from_config_dict(tree)


def test_a_configuration_survives_its_dict():
    config = load("ctx1m", "dense")
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(dataclasses.asdict(config)) == config


@pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config=configs/none.py"],
            "--config=configs/none.py is not a file; .* configs/demo.py",
        ),
        (["--config=configs/demo.py", "--config.train.batchsize=3"], 'batchsize.*"batch_size"'),
    ],
)
def test_a_mistyped_flag_is_one_clear_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(SystemExit) as ended:
        train.main(flags)
    assert ended.value.code == EXIT_CODE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
