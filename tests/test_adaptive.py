"""The adaptive predictors: the right coefficients, the right errors, nothing of the future."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import smooth_codes
from scipy.linalg import solve_toeplitz

from patchwave_jax import adaptive, quantisers
from patchwave_jax.adaptive import Predictors, waveform_of

PREDICTORS = Predictors((5, 100), (90, 400), 20)
EDGES = quantisers.get("mulaw").edges
FIRST = 700


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return np.asarray(waveform_of(jnp.asarray(smooth_codes(2, 1_000)), "mulaw"))


def by_hand(waveform: np.ndarray, first: int) -> np.ndarray:
    """Float64 normal equations, solved anew for each block, one sample predicted at a time."""
    out = []
    for taps, window in zip(PREDICTORS.taps, PREDICTORS.windows, strict=True):
        for row in waveform.astype(np.float64):
            for t in range(first, row.size):
                start = first + (t - first) // 20 * 20
                newest = row[start - window : start] * adaptive._taper(window)
                r = np.correlate(newest, newest, "full")[window - 1 :][: taps + 1]
                r[0] = r[0] * (1 + adaptive.RIDGE * taps) + adaptive.FLOOR * window
                out.append(solve_toeplitz(r[:-1], r[1:]) @ row[t - taps : t][::-1])
    return np.moveaxis(np.reshape(out, (2, 2, -1)), 0, -1)


def test_predictions_equal_normal_equations_solved_by_hand(waveform, monkeypatch):
    monkeypatch.setattr(adaptive, "CPU_TAPS_AT_ONCE", 64)  # and a remainder
    got = jax.jit(PREDICTORS.predict, static_argnums=1)(waveform[:, :-7], FIRST)
    np.testing.assert_allclose(got, by_hand(waveform[:, :-7], FIRST), atol=3e-5)
    errors = np.square(got - waveform[:, FIRST:-7, None]).mean((0, 1))
    assert (errors < 0.2 * np.square(waveform).mean()).all()  # or nothing was predicted


def test_a_fit_is_the_same_whatever_is_fitted_beside_it(waveform):
    rows = np.stack([waveform[0, i : i + 400] for i in range(0, 600, 20)])
    fit = jax.jit(adaptive._fit, static_argnums=1)
    together = np.asarray(fit(rows, 100))
    for few in (1, 4):
        np.testing.assert_array_equal(together[:few], fit(rows[:few], 100))


def test_silence_predicts_silence():
    quiet = np.full((1, 600), EDGES[128:130].mean(), np.float32)
    got = PREDICTORS.predict(jnp.asarray(quiet), 420)
    assert np.abs(got).max() < 2e-4


def test_descriptions_by_hand(waveform, rng):
    m, count = PREDICTORS.memory_samples, 30
    wave = waveform[:, : m + count]
    predicted = (wave[..., None] + rng.normal(0, [0.01, 0.03], (*wave.shape, 2))).astype(np.float32)
    age = np.arange(count) % 20
    got = PREDICTORS.describe(jnp.asarray(predicted), jnp.asarray(wave), jnp.asarray(age), EDGES)
    errors = wave[..., None] - predicted
    for i in (0, 1, 29):
        at = m + i
        squares = {n: np.square(errors[:, at - n : at]).mean(1) for n in (8, 32, 128)}
        trust = squares[128] ** -2.0
        mean = (predicted[:, at] * trust).sum(-1) / trust.sum(-1)
        code = quantisers.get("mulaw").encode(np.round(mean * 32768).astype(np.int16)).astype(int)
        width = EDGES[code + 1] - EDGES[code]
        scale = np.sqrt(squares[32].min(-1) + width**2 / 12)
        np.testing.assert_allclose(got.mean[:, i], mean, rtol=1e-4)
        np.testing.assert_allclose(got.scale[:, i], scale, rtol=1e-3)
        others = (predicted[:, at] - mean[:, None]) / scale[:, None]
        np.testing.assert_allclose(got.others[:, i], others, rtol=1e-2, atol=1e-3)
        lags = errors[:, at - 16 : at][:, ::-1] / scale[:, None, None]
        features = np.asarray(got.features[:, i])
        np.testing.assert_allclose(features[:, :32], lags.reshape(2, -1), rtol=1e-2, atol=1e-3)
        spans = [0.5 * np.log(squares[n] / scale[:, None] ** 2) for n in (8, 32, 128)]
        np.testing.assert_allclose(features[:, 32:38], np.concatenate(spans, 1), atol=1e-2)
        np.testing.assert_allclose(features[:, -2], (i % 20) / 20 - 0.5, atol=1e-6)
    assert got.features.shape[-1] == PREDICTORS.num_features


def test_nothing_of_a_sample_reaches_its_own_description_or_an_earlier_one(waveform):
    def describe(wave):
        begin, m = FIRST - PREDICTORS.memory_samples, PREDICTORS.memory_samples
        predicted = PREDICTORS.predict(wave, begin)
        age = jnp.arange(wave.shape[1] - begin - m) % 20
        return PREDICTORS.describe(predicted, wave[:, begin:], age, EDGES)

    describe = jax.jit(describe)
    before = describe(waveform)
    for at in (3, 20, 39):
        changed = waveform.copy()
        changed[:, FIRST + at :] += 0.1
        after = describe(changed)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a[:, : at + 1], b[:, : at + 1])
            assert (a[:, at + 1] != b[:, at + 1]).any()
