"""The cached sampler: against the patch form across slides, its draws, resuming, a small model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import soundfile as sf
from conftest import ADAPTIVE, OTHER_PATCH, OURS, PLANNED, SMALL, random_codes, random_model
from flax import nnx
from jax.sharding import AxisType
from scipy import stats

from patchwave_jax.config import Config, DataConfig, RunConfig
from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation import check, preview
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.generation.sampling_params import SamplingParams
from patchwave_jax.models.patchwave import model as model_module
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.predictors.bank import Prediction

ONE_FRAME = dataclasses.replace(  # its encoder ends with a single frame; more taps than kernel
    OURS, patch_samples=25, kernel_size=3, strides=(2, 5), head="softmax", predictor_taps=25
)


def mesh(devices=1):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def make(model: PatchWaveConfig, objective="dense", patches=4, quantiser="mulaw", seed=0):
    config = Config(
        objective=objective,
        context_samples=patches * model.patch_samples,
        model=model,
        data=DataConfig(quantiser=quantiser),
    )
    made = random_model(model, causal=objective == "dense", quantiser=quantiser, seed=seed)
    return config, made, nnx.state(made)


def run_to(streams: Sampler, end: int) -> tuple[np.ndarray, np.ndarray]:
    pieces = []
    while streams.position < end:
        pieces.append(streams.run(end - streams.position))
    codes, log_probs = zip(*pieces, strict=True)
    return np.concatenate(codes, 1), np.concatenate(log_probs, 1)


def patch_form(config: Config, model, codes: np.ndarray, first: int, stride: int) -> np.ndarray:
    """Log-probabilities of samples `first` and on, every one from a window of its own."""
    size, rows, samples = config.model.patch_samples, *codes.shape
    forward = jax.jit(model.next_sample_log_prob)
    ends = ((0, 0), (size, size))
    padded = np.pad(codes, ends, constant_values=quantisers.SILENCE)  # of a patch before and after
    found = np.zeros((rows, samples + size))
    for window in protocol.plan([samples], config, stride):
        begin = window.first - (window.units - window.last_n) * size
        for token in range((window.first - begin) // size, window.units):
            low = begin + token * size
            if low >= samples:
                break
            # The windows of a patch of targets, from the patch of the first token on.
            windows = [padded[:, t - token * size : t + size + 1] for t in range(low, low + size)]
            read = np.stack(windows, 1).reshape(rows * size, -1)
            if not model.causal:
                fill = ((0, 0), ((config.window_units - token - 1) * size, 0))
                read = np.pad(read, fill, constant_values=quantisers.SILENCE)
            found[:, low : low + size] = np.asarray(forward(read)).reshape(rows, size)
    return found[:, first:samples]


@pytest.mark.parametrize(
    ("model", "objective", "quantiser", "stride", "prompt"),
    [
        (OURS, "dense", "linear", 1, 77),
        (OURS, "last", "sashimi", 3, 77),
        (OTHER_PATCH, "dense", "mulaw", 4, 500),
        (ONE_FRAME, "dense", "mulaw", 2, 0),
    ],
    ids=["ours", "ours-last", "other-patch", "one-frame"],
)
def test_cached_equals_patch_form_across_slides(
    model, objective, quantiser, stride, prompt, monkeypatch
):
    """Thousands of samples, each compared with the model run again on its own window."""
    if model is OTHER_PATCH:  # compile for 3 tokens, and then for all
        monkeypatch.setattr(model_module, "VISIBLE_TOKENS", 3)
    config, reference, params = make(model, objective, quantiser=quantiser)
    given = random_codes(2, prompt)
    streams = Sampler(config, params, mesh(), num=2, stride_patches=stride)
    streams.prime(given, prompt)
    end = prompt + 2 * config.context_samples + 50
    codes, log_probs = run_to(streams, end)
    assert streams.window_start(end - 1) > 0, "the window never slid"
    codes = np.concatenate([given, codes], 1)
    expected = patch_form(config, reference, codes, prompt, stride)
    assert log_probs.std() > 0.1, "the weights are degenerate"
    np.testing.assert_allclose(log_probs, expected, atol=2e-4)


def test_every_devices_streams_equal_the_evaluation_after_a_long_prompt():
    """Eight devices; the prompt itself has slid past the context."""
    config, _, params = make(ADAPTIVE)
    streams = Sampler(config, params, mesh(8), num=11)
    given = random_codes(11, 905)
    streams.prime(given[:, 905 - streams.lookback :], 905)
    codes, log_probs = run_to(streams, 1300)
    codes = np.concatenate([given, codes], 1)
    evaluator = Evaluator(config, mesh())
    windows = protocol.plan([1300] * 11, config, streams.stride_patches)
    expected = np.zeros(codes.shape)
    for scored in evaluator.score(params, codes.__getitem__, windows):
        window = scored.window
        expected[window.clip, window.first : window.end] = scored.log_probs
    difference = np.abs(log_probs - expected[:, 905:])
    assert difference.max() < check.TOLERANCE_NATS["float32"]
    assert difference.mean() < 2e-5


@pytest.mark.parametrize(
    ("model", "objective"), [(OURS, "last"), (ADAPTIVE, "dense"), (PLANNED, "dense")]
)
def test_taken_up_again_it_goes_on_to_the_last_bit(model, objective):
    config, _, params = make(model, objective)
    prompt, end = random_codes(2, 61), 700
    streams = Sampler(config, params, mesh(), num=2, stride_patches=2)
    streams.prime(prompt, 61)
    codes, log_probs = run_to(streams, end)
    codes = np.concatenate([prompt, codes], 1)
    assert sum(piece.size for piece in streams._pieces) < 2 * 2 * streams.lookback  # not the clip
    for stopped in (100, 333, 480, 611):
        at = streams.rewind(stopped, 61)
        assert at <= stopped
        streams.prime(codes[:, max(0, at - streams.lookback) : at], at)
        while streams.position < stopped:
            streams.run(given=codes[:, streams.position : stopped])
        resumed, resumed_log_probs = run_to(streams, end)
        np.testing.assert_array_equal(resumed, codes[:, stopped:])
        np.testing.assert_array_equal(resumed_log_probs, log_probs[:, stopped - 61 :])


def test_a_clip_is_the_same_whatever_the_batch_and_differs_from_the_others():
    config, _, params = make(SMALL)

    def clips(num, seed):
        streams = Sampler(config, params, mesh(), num=num, sampling=SamplingParams(seed=seed))
        streams.prime(np.zeros((num, 0), np.uint8), 0)
        return run_to(streams, 400)[0]

    alone, three = clips(1, 5), clips(3, 5)
    np.testing.assert_array_equal(alone[0], three[0])
    assert (three[0] != three[1]).mean() > 0.5
    assert (three[0] != clips(3, 6)[0]).mean() > 0.5


def test_an_untrained_uniform_model_draws_uniform_codes():
    config, made, _ = make(SMALL)
    made.head.linear.kernel[...] = jnp.zeros_like(made.head.linear.kernel[...])
    made.head.linear.bias[...] = jnp.zeros_like(made.head.linear.bias[...])
    streams = Sampler(config, nnx.state(made), mesh(), num=32)
    streams.prime(np.zeros((32, 0), np.uint8), 0)
    codes, log_probs = run_to(streams, 1000)
    np.testing.assert_allclose(log_probs, -np.log(256), rtol=1e-5)
    assert stats.chisquare(np.bincount(codes.ravel(), minlength=256)).pvalue > 1e-3
    following = (codes[:, :-1] // 16).astype(int) * 16 + codes[:, 1:] // 16
    assert stats.chisquare(np.bincount(following.ravel(), minlength=256)).pvalue > 1e-3
    across = (codes[:-1] // 16).astype(int) * 16 + codes[1:] // 16
    assert stats.chisquare(np.bincount(across.ravel(), minlength=256)).pvalue > 1e-3


def kept_by(params: SamplingParams, logits: np.ndarray) -> np.ndarray:
    """The distribution that the parameters leave of one row of logits, in float64."""
    p = np.exp((logits - logits.max()).astype(np.float64) / params.temperature)
    order = np.argsort(-p)
    p /= p.sum()
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    count = np.searchsorted(np.cumsum(p[order]), params.top_p) + 1
    p[order[count:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=3.0, top_k=7),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
        SamplingParams(top_k=1),
    ],
    ids=str,
)
def test_draws_have_the_distribution_that_the_parameters_leave(params, rng):
    logits = rng.normal(0, 2, 256).astype(np.float32)
    uniforms = rng.uniform(size=(2500, 16)).astype(np.float32)
    rows = jnp.broadcast_to(logits, (16, 256))
    draw = jax.jit(lambda u: jax.lax.map(lambda u: params.draw(rows, u), u))
    codes = np.asarray(draw(uniforms)).ravel()
    counts, expected = np.bincount(codes, minlength=256), kept_by(params, logits) * codes.size
    assert (counts[expected == 0] == 0).all()
    likely = expected > 5
    if likely.sum() > 1:
        observed, wanted = counts[likely], expected[likely]
        scaled = wanted * observed.sum() / wanted.sum()
        assert stats.chisquare(observed, scaled).pvalue > 1e-3
    else:
        assert counts[likely].sum() == codes.size


def test_draws_are_safe_at_the_ends():
    logits = np.full((4, 256), -np.inf, np.float32)
    logits[0, [0, 255]] = 0.0
    logits[1, [0, 255]] = 0.0
    logits[2, 255] = -300.0
    logits[3, 17] = 5.0
    uniforms = np.array([0.0, 1 - 2**-23, 0.999, 0.5], np.float32)
    codes = SamplingParams().draw(jnp.asarray(logits), jnp.asarray(uniforms))
    np.testing.assert_array_equal(codes, [0, 255, 255, 17])
    greedy = SamplingParams(temperature=0).draw(jnp.asarray(logits), jnp.asarray(uniforms))
    np.testing.assert_array_equal(greedy, [0, 0, 255, 17])


@pytest.mark.parametrize("quantiser", quantisers.NAMES)
def test_the_mixtures_drawing_logits_are_its_logits(quantiser, rng):
    _, made, _ = make(OURS, quantiser=quantiser)
    hidden = jnp.asarray(rng.normal(size=(64, OURS.readout_width)), jnp.float32)
    mean = jnp.asarray(rng.uniform(-1, 1, 64), jnp.float32)
    prediction = Prediction(mean, jnp.full(64, np.exp(-5.0), jnp.float32), None)
    exact = np.asarray(made.head.logits(hidden, prediction))
    cheap = np.asarray(made.head.drawing_logits(hidden, prediction))
    np.testing.assert_allclose(cheap, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(temperature=-1), "--temperature must be 0 or more"),
        (SamplingParams(temperature=float("nan")), "--temperature"),
        (SamplingParams(top_k=257), "--top_k must be from 0"),
        (SamplingParams(top_p=0.0), "--top_p must be more than 0"),
        (SamplingParams(top_p=1.5), "--top_p"),
        (SamplingParams(seed=-1), "--seed"),
    ],
)
def test_impossible_parameters_are_named(params, message):
    with pytest.raises(UserError, match=message):
        params.check()


def test_a_model_that_is_not_a_number_is_an_error():
    config, made, _ = make(SMALL)
    made.norm.scale[...] = jnp.full_like(made.norm.scale[...], np.nan)
    streams = Sampler(config, nnx.state(made), mesh(), num=1)
    streams.prime(np.zeros((1, 0), np.uint8), 0)
    with pytest.raises(UserError, match="not finite from sample 0"):
        streams.run()


def test_check_passes_in_bfloat16(monkeypatch):
    monkeypatch.setattr(check, "CHECK_SAMPLES", 150)
    model = dataclasses.replace(OURS, compute_dtype="bfloat16", num_layers=1)
    config, _, params = make(model, "last")
    params = jax.tree.map(lambda x: 0.3 * x, params)
    assert check.check(Evaluator(config, mesh()), params, random_codes(100)).passed


def test_check_passes_and_fails_if_generation_is_wrong(monkeypatch):
    """By caches that are one phase off, as an indexing mistake would leave them."""
    monkeypatch.setattr(check, "CHECK_SAMPLES", 150)
    config, _, params = make(SMALL)
    evaluator, prompt, prime = Evaluator(config, mesh()), random_codes(100), Sampler._prime
    found = check.check(evaluator, params, prompt)
    assert found.passed
    assert found.samples == 450
    assert found.slides >= 1
    assert str(found).startswith("pass: the largest difference")

    def wrong(self, codes):
        prime(self, codes)
        assert self._state is not None
        caches = [jnp.roll(x, 1, 0) for x in self._state.caches]
        self._state = self._state._replace(caches=caches)

    monkeypatch.setattr(Sampler, "_prime", wrong)
    found = check.check(evaluator, params, prompt)
    assert not found.passed
    assert str(found).startswith("FAIL")


def test_greedy_continuation_of_a_periodic_signal_continues_the_period():
    period, size = 24, 48
    model = dataclasses.replace(
        SMALL, patch_samples=size, readout_width=64, skip_connections=True, input="embedding",
        conv_dropout=0.0, mlp_dropout=0.0, head_dropout=0.0, token_dropout=0.0,
    )  # fmt: skip
    config = Config(objective="dense", context_samples=3 * size, model=model)
    shape = 40 * np.sin(np.arange(period) * 2 * np.pi / period)
    shape += 15 * np.sin(np.arange(period) * 6 * np.pi / period + 1)
    signal = np.tile(np.round(128 + shape), 100).astype(np.uint8)
    made = random_model(model, causal=True)
    graphdef, params = nnx.split(made)
    params = jax.tree.map(lambda x: x / 2, params)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, state, segments):
        def loss(params):
            return -nnx.merge(graphdef, params).log_probs(segments, 3 * size).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state, rng = optimizer.init(params), np.random.default_rng(0)
    for _ in range(200):
        starts = rng.integers(0, period, 4)
        segments = np.stack([signal[s : s + 4 * size] for s in starts])
        params, state, nats = update(params, state, segments)
    assert nats < 0.05
    prompt = signal[None, 5 : 5 + 3 * size]
    streams = Sampler(config, params, mesh(), num=1, sampling=SamplingParams(temperature=0))
    streams.prime(prompt, 3 * size)
    codes, _ = run_to(streams, 20 * size)
    np.testing.assert_array_equal(codes[0], signal[5 + 3 * size : 5 + 20 * size])


@pytest.mark.parametrize("objective", ["last", "dense"])
def test_clips_made_in_training_are_the_samplers(objective, tmp_path):
    config, _, params = make(OURS, objective, patches=9, quantiser="linear")
    config = dataclasses.replace(config, seed=4, run=RunConfig(sample_seconds=0.005))
    assert preview.make(config, params, tmp_path, 7, lambda: True).size == 0
    pcm = preview.make(config, params, tmp_path, 7, lambda: False)
    streams = Sampler(config, params, mesh(), num=2, sampling=SamplingParams(seed=4))
    streams.prime(np.zeros((2, 0), np.uint8), 0)
    codes, log_probs = run_to(streams, 80)
    np.testing.assert_array_equal(pcm, quantisers.get("linear").decode(codes))
    for clip in range(2):
        path = tmp_path / "samples" / f"step00000007_{clip}.wav"
        np.testing.assert_array_equal(sf.read(path, dtype="int16")[0], pcm[clip])
        bits = json.loads(path.with_suffix(".json").read_text())["bits_per_sample"]
        assert bits == pytest.approx(-log_probs[clip].mean() / np.log(2), rel=1e-4)
