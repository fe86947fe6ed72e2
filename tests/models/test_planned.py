"""The plan: a function of the samples, normalised, the same in all forms, and kept to."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import PLANNED, random_model, smooth_codes
from flax import nnx
from jax.sharding import AxisType

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation import check
from patchwave_jax.models.patchwave import model as model_module
from patchwave_jax.models.patchwave import plan as planned
from patchwave_jax.models.patchwave.contradiction import contradict

SIZE, BLOCK = PLANNED.patch_samples, PLANNED.plan_block_samples


CODES = smooth_codes(2, 8 * SIZE)


@pytest.fixture(scope="module")
def model():
    return random_model(PLANNED, causal=True)


@pytest.fixture(scope="module")
def conditioning(model):
    """Predictions, features and what is measured of all of `CODES` but the first patch."""
    return jax.jit(lambda codes: model.head.condition(codes, SIZE)[1])(CODES)


def test_plan_is_the_levels_of_the_block(conditioning):
    """Against numpy: the error's mean square and the octave bands' energies, in steps of 3 dB."""
    prediction, _, measured = conditioning
    waveform = quantisers.get("mulaw").centres[CODES].astype(np.float64)
    blocks = waveform[:, SIZE:].reshape(2, -1, BLOCK)
    errors = (waveform[:, SIZE:] - prediction.mean).reshape(blocks.shape)

    def level(power):
        return np.clip(31 + 10 / 3 * np.log10(np.maximum(power, 1e-12)), 0, 31)

    window = planned.windows.tukey(BLOCK, 0.5)
    power = np.abs(np.fft.fft(blocks * window)) ** 2 / (BLOCK * np.square(window).sum())
    frequency = np.abs(np.fft.fftfreq(BLOCK, 1 / 16_000))
    edges = (0, 500, 1000, 2000, 4000, 8001)
    expected = [level(np.square(errors).mean(-1))]
    for low, high in itertools.pairwise(edges):
        expected.append(level(power[..., (frequency >= low) & (frequency < high)].sum(-1)))
    plan = np.asarray(measured.plan)[:, ::BLOCK]
    np.testing.assert_allclose(plan, np.stack(expected, -1), atol=0.51)
    np.testing.assert_array_equal(np.repeat(plan, BLOCK, 1), measured.plan)
    spent = np.cumsum(np.square(errors), -1) - np.square(errors)
    np.testing.assert_allclose(measured.spent.reshape(spent.shape), spent, atol=1e-6)
    np.testing.assert_array_equal(measured.left[0, : 2 * BLOCK], [*range(BLOCK, 0, -1)] * 2)


def test_dense_form_equals_patch_form(model, conditioning):
    """The newest patch of targets, whose windows hold all that the head reads."""
    patches = 7
    assert patches * SIZE >= model.head.lookback + BLOCK
    plan = conditioning[2].plan[:, -SIZE:]
    dense = jax.nn.log_softmax(jax.jit(model.logits)(CODES))[:, -SIZE:]
    patch_form = jax.jit(model.next_sample_logits, static_argnums=1)
    for phase in (0, 2 * BLOCK - 1):
        window = CODES[:, phase:][:, : patches * SIZE]
        logits = jax.nn.log_softmax(patch_form(window, phase, plan[:, phase]))
        np.testing.assert_allclose(dense[:, phase], logits, rtol=1e-4, atol=1e-3)


def test_log_probs_are_those_of_plan_and_samples(model, conditioning):
    """And the loss, of the plans inferred from the samples, is theirs."""
    logits = jax.nn.log_softmax(jax.jit(model.logits)(CODES))
    samples = np.take_along_axis(np.asarray(logits), CODES[:, SIZE:, None].astype(int), -1)[..., 0]
    log_probs = jax.jit(model.log_probs, static_argnums=1)
    plans = conditioning[2].plan[:, ::BLOCK]
    found = np.asarray(log_probs(CODES, 7 * SIZE, plans))
    difference = found - samples
    first = np.arange(7 * SIZE) % BLOCK == 0
    np.testing.assert_allclose(difference[:, ~first], 0, atol=1e-4)
    assert (difference[:, first] < -1).all()
    others = log_probs(CODES, 7 * SIZE, jnp.maximum(plans - 3, 0))
    assert np.abs(others - found).mean() > 0.01
    loss, row_nats = jax.jit(model.dense_nats)(CODES)
    np.testing.assert_allclose(-found.mean(1), row_nats, rtol=1e-5)
    assert float(loss) == pytest.approx(-found.mean(), rel=1e-5)


def test_plans_are_drawn_from_their_normalised_distribution(model, conditioning):
    """Uniform numbers on a grid: every level comes as often as its probability says."""
    head, rows, fixed = model.head, 4_000, conditioning
    fixed = jax.tree.map(lambda x: jnp.broadcast_to(x[0, 40], (rows, *x.shape[2:])), fixed)
    x = jnp.full((rows, PLANNED.width), 0.3)
    size = head.plan.size
    uniforms = jnp.tile((jnp.arange(rows)[:, None] + 0.5) / rows, (1, size))
    draw = jax.jit(head.plan.draw)
    for i in range(size):  # the levels before it are the same in all rows
        drawn, log_prob = draw(x, fixed, uniforms.at[:, :i].set(0.4))
        assert (drawn[:, :i] == drawn[:1, :i]).all()
        inputs, before = head.plan.inputs(x, *fixed)
        logits = head.plan._logits(i, head.plan.hidden(inputs), before, drawn)[0]
        assert float(jnp.exp(logits).sum()) == pytest.approx(1, abs=1e-5)
        frequency = np.bincount(drawn[:, i], minlength=planned.NUM_LEVELS) / rows
        np.testing.assert_allclose(frequency, np.exp(logits), atol=2 / rows)
        again = fixed[2]._replace(plan=drawn)
        np.testing.assert_allclose(head.plan.log_prob(x, *fixed[:2], again), log_prob, rtol=1e-5)


def test_generation_equals_the_evaluation_given_its_plans():
    """Across a slide of the window."""
    config = Config("dense", 35 * SIZE, model=PLANNED)
    params = nnx.state(random_model(PLANNED, causal=True))
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    evaluator = Evaluator(config, mesh)
    found = check.check(evaluator, params, smooth_codes(1, 400)[0])
    assert found.passed, str(found)
    assert found.slides > 0


def test_training_rows_leave_their_plan_by_what_is_said():
    rows, samples = 64, 24_000
    time = np.arange(samples) / 16_000
    tones = [0.05 * np.sin(2 * np.pi * f * time) for f in (250, 700, 1500, 3000, 6000)]
    waveform = jnp.broadcast_to(jnp.float32(sum(tones)), (rows, samples))
    moved = jax.jit(contradict)(waveform, jax.random.key(0))
    before, after = (
        planned.band_levels(x.reshape(rows, -1, 500)) for x in (waveform, moved.waveform)
    )
    excess = moved.excess.reshape(rows, -1, 500, planned.BANDS + 1)
    steady = np.asarray(moved.weight).reshape(rows, -1, 500).min(-1) == 1
    found = np.asarray(after - before)[steady]
    np.testing.assert_allclose(found, np.asarray(excess.mean(2))[..., 1:][steady], atol=0.3)
    kinds = np.asarray(jnp.abs(excess).max((1, 2)) > 0).sum(-1)
    assert set(kinds) == {0, 1, planned.BANDS + 1}  # no band, one, or all and the error
    plain = kinds == 0
    np.testing.assert_array_equal(moved.waveform[plain], waveform[plain])
    assert (moved.weight[plain] == 1).all()
    assert 0.05 < (np.asarray(moved.weight)[~plain] == 0).mean() < 0.1
    assert float(jnp.abs(moved.waveform).max()) < 1.1


def test_only_training_contradicts_plans(model, monkeypatch):
    calls = []

    def record(*args):
        calls.append(args)
        return contradict(*args)

    monkeypatch.setattr(model_module, "contradict", record)
    jax.eval_shape(model.dense_nats, CODES)
    assert not calls
    jax.eval_shape(model.dense_nats, CODES, jax.random.key(0))
    assert len(calls) == 1


def test_errors_stay_within_what_the_plan_leaves():
    plan = jnp.full((3, 1, planned.BANDS + 1), 10)
    zeros = jnp.zeros((3, 1, planned.BANDS))
    power = float(planned.power(jnp.float32(10)))
    spent = jnp.asarray([0.0, 500 * power * 0.9, 500 * power * 2])[:, None]
    measured = planned.Measured(plan, spent, jnp.asarray([[500], [100], [100]]), zeros)
    found = measured.error_power(500)[:, 0] / power
    np.testing.assert_allclose(found, [1, 0.5, planned.MIN_SHARE], rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"plan_block_samples": 30}, "model.plan_block_samples must be a multiple of"),
        ({"adaptive_taps": (), "adaptive_windows": ()}, "set model.adaptive_taps"),
    ],
)
def test_impossible_plans(changed, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLANNED, **changed).check(4 * SIZE, True)
