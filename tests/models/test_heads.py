"""The heads: normalised over the 256 codes, safe at the edges, started from linear prediction."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from patchwave_jax.data import quantisers
from patchwave_jax.evaluation import classical
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.heads import LogisticMixture, Softmax, correlate
from patchwave_jax.models.predictors.bank import Prediction

CONFIG = PatchWaveConfig(readout_width=6, mixture_components=3)


def mixture(quantiser="mulaw", taps=8) -> LogisticMixture:
    config = dataclasses.replace(CONFIG, predictor_taps=taps)
    return LogisticMixture(config, quantiser, rngs=nnx.Rngs(0))


def around(head: LogisticMixture, mean) -> Prediction:
    """What the head's own linear prediction gives where it predicts `mean`."""
    mean = jnp.asarray(mean, jnp.float32)
    scale = jnp.broadcast_to(jnp.exp(head.log_scale[...]), mean.shape)
    return Prediction(mean, scale, None)


@pytest.mark.parametrize("quantiser", quantisers.NAMES)
def test_mixture_is_normalised_also_at_extreme_scales_and_means(quantiser, rng):
    head = mixture(quantiser)
    hidden = jnp.asarray(rng.normal(0, 30, (64, 6)), jnp.float32)
    for log_scale in (-30.0, -9.0, -5.0, 0.0, 5.0):
        head.log_scale[...] = jnp.float32(log_scale)
        for mean in (-3.0, -1.0, 0.0, 1e-4, 0.7, 3.0):
            log_probs = head.logits(hidden, around(head, np.full(64, mean)))
            assert np.isfinite(log_probs).all()
            np.testing.assert_allclose(jax.nn.logsumexp(log_probs, -1), 0, atol=3e-5)


def test_no_code_costs_more_than_32_bits():
    head = mixture()
    head.log_scale[...] = jnp.float32(-30.0)
    bits = -head.logits(jnp.zeros((1, 6)), around(head, np.zeros(1)))[0] / np.log(2)
    assert bits.max() == pytest.approx(32, abs=1e-4)
    assert bits.min() < 1.1  # at an edge


@pytest.mark.parametrize("quantiser", quantisers.NAMES)
def test_mixture_equals_float64_masses_of_its_bins(quantiser, rng):
    head = mixture(quantiser)
    hidden = jnp.asarray(rng.normal(size=(32, 6)), jnp.float32)
    prediction = around(head, rng.uniform(-0.9, 0.9, 32))
    weights, means, log_scales = (
        np.asarray(x, np.float64) for x in head._mixture(hidden, prediction)
    )
    edges = quantisers.get(quantiser).edges.astype(np.float64)
    edges[[0, -1]] = [-np.inf, np.inf]
    with np.errstate(over="ignore"):
        cdf = 1 / (1 + np.exp(-(edges[:, None] - means[:, None]) / np.exp(log_scales)[:, None]))
    expected = (np.exp(weights)[:, None] * np.diff(cdf, axis=1)).sum(-1)
    got = np.exp(np.asarray(head.logits(hidden, prediction), np.float64))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_log_prob_is_the_logit_of_its_code(rng):
    hidden = jnp.asarray(rng.normal(size=(256, 6)), jnp.float32)
    prediction = around(mixture(), rng.uniform(-1, 1, 256))
    codes = np.arange(256, dtype=np.uint8)
    softmax = Softmax(CONFIG, "mulaw", rngs=nnx.Rngs(0))
    for head, conditioning in ((mixture(), (prediction,)), (softmax, ())):
        log_probs = jax.nn.log_softmax(head.logits(hidden, *conditioning))  # pyright: ignore
        got = head.log_prob(hidden, jnp.asarray(codes), *conditioning)  # pyright: ignore
        np.testing.assert_allclose(got, np.diag(log_probs), rtol=1e-5, atol=2e-5)


def test_a_component_leans_towards_single_predictors(rng):
    """Means by hand from the linear layer's outputs: weight, offset, scale, one for each."""
    config = dataclasses.replace(CONFIG, adaptive_taps=(4, 8), adaptive_windows=(40, 40))
    head = LogisticMixture(config, "mulaw", rngs=nnx.Rngs(0))
    hidden = jnp.asarray(rng.normal(0, 5, (40, 6)), jnp.float32)
    mean, scale = rng.uniform(-0.5, 0.5, 40), rng.uniform(0.01, 0.1, 40)
    others = rng.normal(size=(40, 3))
    values = (jnp.asarray(x, jnp.float32) for x in (mean, scale, others))
    prediction = Prediction(*values)
    raw = np.asarray(head.linear(hidden), np.float64).reshape(40, 3, 6)
    offsets = raw[..., 1] + np.einsum("nkj,nj->nk", raw[..., 3:], others)
    _, means, log_scales = head._mixture(hidden, prediction)
    np.testing.assert_allclose(means, mean[:, None] + scale[:, None] * offsets, atol=1e-5)
    np.testing.assert_allclose(log_scales, raw[..., 2] + np.log(scale)[:, None], atol=1e-4)
    np.testing.assert_allclose(jnp.exp(head.logits(hidden, prediction)).sum(-1), 1, atol=1e-4)


def test_gradients_are_finite_everywhere(rng):
    head = mixture()
    graphdef, params = nnx.split(head)
    codes = jnp.asarray(rng.integers(0, 256, 512), jnp.uint8)

    def loss(params, hidden, prediction):
        head = nnx.merge(graphdef, params)
        return head.log_prob(hidden, codes, around(head, prediction)).sum()

    for scale in (0.1, 100.0):
        hidden = jnp.asarray(rng.normal(0, scale, (512, 6)), jnp.float32)
        prediction = jnp.asarray(rng.uniform(-2, 2, 512), jnp.float32)
        gradients = jax.grad(loss, (0, 1, 2))(params, hidden, prediction)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("taps", [1, 5, 16])
@pytest.mark.parametrize("samples", [16, 17, 100])
def testcorrelate_equals_numpy(taps, samples, rng):
    x, kernel = rng.normal(size=(2, samples)), rng.normal(size=taps)
    got = correlate(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    expected = np.stack([np.correlate(row, kernel, "valid") for row in x])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_an_untrained_mixture_is_near_linear_prediction(rng):
    """Before the first step it costs no more than a bit over the predictor it starts from."""
    noise = rng.logistic(0, 0.002, 20_000)
    wave = np.zeros(20_000)
    for t in range(2, wave.size):
        wave[t] = 1.9 * wave[t - 1] - 0.95 * wave[t - 2] + noise[t]
    pcm = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
    quantiser = quantisers.get("mulaw")
    codes = quantiser.encode(pcm)
    taps, scale = classical.fit_linear([codes], quantiser, 8)
    head = mixture()
    head.start_from(taps, scale)
    (prediction,), _ = jax.tree.map(lambda x: x[0], head.condition(jnp.asarray(codes[None]), 8))
    hidden = jnp.zeros((codes.size - 8, 6))
    bits = -float(head.log_prob(hidden, jnp.asarray(codes[8:]), prediction).mean()) / np.log(2)
    baseline = classical.fit([codes], quantiser).log_probs(codes, ["linear-32"])["linear-32"]
    assert bits < -float(baseline[32:].mean()) / np.log(2) + 1
