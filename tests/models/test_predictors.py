"""The adaptive predictors: the right coefficients, the right errors, nothing of the future."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_on, smooth_codes
from jax import lax
from scipy.linalg import solve_toeplitz
from scipy.signal import lfilter

from patchwave_jax.data import quantisers
from patchwave_jax.models.predictors import least_squares
from patchwave_jax.models.predictors.adaptive import AdaptivePredictors
from patchwave_jax.models.predictors.bank import PredictorBank
from patchwave_jax.models.predictors.kalman import Denoiser

PREDICTORS = AdaptivePredictors((5, 100), (90, 400), 20)
DENOISED = AdaptivePredictors((5, 100), (90, 400), 20, Denoiser(4, 80, 20))
BANK = PredictorBank((PREDICTORS,), 20, "mulaw")
EDGES = quantisers.get("mulaw").edges
FIRST = 700
# Compiled as users do, instead of as fast as can be: what holds to the last bit has to hold there.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return np.asarray(BANK.decode(jnp.asarray(smooth_codes(2, 1_000)))[0])


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.asarray(BANK.decode(jnp.asarray(smooth_codes(2, 1_000)))[1])


def fit_by_hand(newest: np.ndarray, taps: int) -> tuple[np.ndarray, float]:
    """Float64 normal equations: the coefficients and the variance of the error."""
    taper = least_squares.taper(newest.size).astype(np.float32).astype(np.float64)
    window = newest.size
    r = np.correlate(newest * taper, newest * taper, "full")[window - 1 :][: taps + 1]
    r[0] = r[0] * (1 + least_squares.RIDGE * taps) + least_squares.FLOOR * window
    fitted = solve_toeplitz(r[:-1], r[1:])
    return fitted, (r[0] - fitted @ r[1:]) / np.square(taper).sum()


def denoise_by_hand(row: np.ndarray, noise: np.ndarray, start: int) -> tuple[dict, dict]:
    """A textbook Kalman filter of two states, 4 taps, from 30 samples before a block on.

    Of the sample before each of the block: what is believed before that one and after it.
    """
    fitted, innovation = fit_by_hand(row[start - 80 : start], 4)
    past = row.copy()  # older samples, as the filter left them
    mean, covariance = row[[start - 31, start - 32]], np.diag(noise[[start - 31, start - 32]])
    move, observed = np.array([fitted[:2], [1, 0]]), np.array([1.0, 0.0])
    newest, kept = {}, {}
    for t in range(start - 30, start + 20):
        newest[t] = mean[0]
        mean = move @ mean + [fitted[2:] @ past[[t - 3, t - 4]], 0]
        covariance = move @ covariance @ move.T + np.diag([innovation, 0])
        gain = covariance @ observed / (covariance[0, 0] + noise[t])
        mean = mean + gain * (row[t] - mean[0])
        covariance = covariance - np.outer(gain, covariance[0])
        kept[t] = past[t - 1] = mean[1]
    return newest, kept


def by_hand(predictors: AdaptivePredictors, waveform, noise, first: int) -> np.ndarray:
    """Float64, fitted again for each block, one sample predicted at a time."""
    out = []
    for row, spread in zip(waveform.astype(np.float64), noise.astype(np.float64), strict=True):
        newest, kept = {t: row[t - 1] for t in range(1, row.size)}, row.copy()
        begin = first - predictors.fit_window if predictors.denoiser else row.size
        for start in range(begin, row.size, 20):
            padded = (np.pad(x, (0, 20), constant_values=1.0) for x in (row, spread))
            believed, after = denoise_by_hand(*padded, start)
            for t in range(start, min(start + 20, row.size)):
                newest[t], kept[t - 1] = believed[t], after[t]
        made = []
        for t in range(first, row.size):
            start = first + (t - first) // 20 * 20
            for taps, window in zip(predictors.taps, predictors.windows, strict=True):
                before = np.append(kept[start - window : start - 1], newest[start])
                read = np.append(kept[t - taps : t - 1], newest[t])
                made.append(fit_by_hand(before, taps)[0] @ read[::-1])
        out.append(np.reshape(made, (-1, 2)))
    return np.stack(out)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("predictors", [PREDICTORS, DENOISED], ids=["codes", "denoised"])
def test_predictions_equal_those_made_by_hand(predictors, platform, waveform, noise, monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", as_on(platform))
    monkeypatch.setattr(least_squares, "CPU_TAPS_AT_ONCE", 64)  # some turns, the last one padded
    monkeypatch.setattr(least_squares, "BLOCKS_AT_ONCE", 4)
    waveform, noise = waveform[:, :-7], noise[:, :-7]
    got = jax.jit(predictors.predict, static_argnums=2)(waveform, noise, FIRST)
    # Ill-conditioned equations: with other flags of XLA, rounding differs by up to 1e-4.
    np.testing.assert_allclose(got, by_hand(predictors, waveform, noise, FIRST), atol=1.5e-4)
    errors = np.square(got - waveform[:, FIRST:, None]).mean((0, 1))
    assert (errors < 0.2 * np.square(waveform).mean()).all()  # or nothing was predicted


def test_a_fit_is_the_same_whatever_is_fitted_beside_it(waveform):
    rows = np.stack([waveform[0, i : i + 400] for i in range(0, 600, 20)])
    fit = jax.jit(least_squares.fit, static_argnums=1, compiler_options=AS_USERS)
    together = np.asarray(fit(rows, 100)[0])
    for few in (1, 4):
        np.testing.assert_array_equal(together[:few], fit(rows[:few], 100)[0])


@pytest.mark.parametrize("options", [{}, AS_USERS])
def test_what_is_denoised_is_the_same_whatever_is_beside_it(waveform, noise, options):
    """In many blocks at once, and in one alone: as users compile it, but for a rounding."""
    denoise = jax.jit(DENOISED.denoiser.denoise, static_argnums=2, compiler_options=options)
    together = np.stack(denoise(waveform, noise, 300))[:, 0, 580:600]

    @functools.partial(jax.jit, compiler_options=options)
    def alone(row, spread):
        state, out = DENOISED.denoiser.begin(row[:, :880], spread[:, :880]), []
        for t in range(880, 900):
            before = state.means[0]
            state = state.observe(row[:, t], spread[:, t])
            out.append(jnp.concatenate([before, state.means[1]]))
        return jnp.stack(out, 1)

    rounding = np.spacing(np.abs(waveform).max()) if options else 0.0
    np.testing.assert_allclose(alone(waveform[:1], noise[:1]), together, rtol=0, atol=rounding)


def test_denoising_brings_codes_closer_to_what_was_recorded(rng):
    poles = 0.98 * np.exp([0.3j, -0.3j, 0.6j, -0.6j])
    wave = lfilter([1.0], np.poly(poles).real, rng.normal(size=4_000))
    wave = (0.5 * wave / np.abs(wave).max()).astype(np.float32)
    codes = quantisers.get("mulaw").encode((wave * 32768).astype(np.int16))[None]
    heard, noise = BANK.decode(jnp.asarray(codes))
    _, kept = Denoiser(16, 500, 100).denoise(heard, noise, 600)
    errors = kept[0] - wave[599:-1], heard[0, 599:-1] - wave[599:-1]
    after, before = (np.square(error).mean() for error in errors)
    assert after < 0.7 * before


def test_silence_predicts_silence():
    quiet = np.full((1, 600), EDGES[128:130].mean(), np.float32)
    spread = jnp.full((1, 600), np.diff(EDGES[128:130])[0] ** 2 / 12)
    got = DENOISED.predict(jnp.asarray(quiet), spread, 540)
    assert np.abs(got).max() < 2e-4


def test_descriptions_by_hand(waveform, rng):
    m, count = BANK.error_history, 30
    wave = waveform[:, : m + count]
    predicted = (wave[..., None] + rng.normal(0, [0.01, 0.03], (*wave.shape, 2))).astype(np.float32)
    offset = jnp.asarray(np.arange(count) % 20, jnp.float32)
    got, features = BANK._describe(jnp.asarray(predicted), jnp.asarray(wave), offset)
    assert features.shape[-1] == BANK.num_features
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
        np.testing.assert_allclose(got.differences[:, i], others, rtol=1e-2, atol=1e-3)
        lags = errors[:, at - 16 : at][:, ::-1] / scale[:, None, None]
        about = np.asarray(features[:, i])
        np.testing.assert_allclose(about[:, :32], lags.reshape(2, -1), rtol=1e-2, atol=1e-3)
        spans = [0.5 * np.log(squares[n] / scale[:, None] ** 2) for n in (8, 32, 128)]
        np.testing.assert_allclose(about[:, 32:38], np.concatenate(spans, 1), atol=1e-2)
        np.testing.assert_allclose(about[:, -2], (i % 20) / 20 - 0.5, atol=1e-6)


@pytest.mark.parametrize("predictors", [PREDICTORS, DENOISED], ids=["codes", "denoised"])
def test_nothing_of_a_sample_reaches_its_own_description_or_an_earlier_one(
    predictors, waveform, noise
):
    def describe(wave):
        begin = FIRST - BANK.error_history
        predicted = predictors.predict(wave, noise, begin)
        offset = jnp.arange(wave.shape[1] - FIRST, dtype=jnp.float32) % 20
        return BANK._describe(predicted, wave[:, begin:], offset)

    describe = jax.jit(describe)
    before = describe(waveform)
    for at in (3, 20, 39):
        changed = waveform.copy()
        changed[:, FIRST + at :] += 0.1
        after = describe(changed)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(a[:, : at + 1], b[:, : at + 1])
            assert (a[:, at + 1] != b[:, at + 1]).any()
