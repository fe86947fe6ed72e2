import json
import math

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.special import expit

from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation import classical

ADAPTIVE = ("block-adaptive-32", "block-adaptive-256")


def chord(samples, seed=0):
    """A decaying chord in noise, as int16 PCM."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / 16_000
    tones = sum(np.sin(2 * np.pi * f * time + rng.uniform(0, 6)) for f in (262, 330, 392, 1047))
    waveform = 0.1 * tones * np.exp(-2 * time) + 0.003 * rng.standard_normal(samples)
    return np.round(waveform * 32768).astype(np.int16)


def autoregression(coefficients, noise):
    """x_t = a_1 x_{t-1} + a_2 x_{t-2} + ... + noise_t, as int16 PCM."""
    waveform = lfilter([1.0], np.concatenate([[1.0], -np.asarray(coefficients)]), noise)
    assert np.abs(waveform).max() < 1
    return np.round(waveform * 32767).astype(np.int16)


def bits(fitted, codes, name):
    return -float(fitted.log_probs(codes, [name])[name].mean(dtype=np.float64)) / math.log(2)


@pytest.fixture(scope="module")
def mulaw():
    return quantisers.get("mulaw")


@pytest.fixture(scope="module")
def train(mulaw):
    return [mulaw.encode(chord(3_000, seed)) for seed in (1, 2, 3)]


@pytest.fixture(scope="module")
def fitted(train, mulaw):
    return classical.fit(train, mulaw)


@pytest.fixture(scope="module")
def clip(mulaw):
    return mulaw.encode(chord(400))


def brute_force_windows(codes, quantiser, taps):
    """Row t: the `taps` waveform samples before t, oldest first."""
    waveform = [float(quantiser.centres[128])] * taps
    waveform += [float(quantiser.centres[code]) for code in codes]
    return np.array([waveform[t : t + taps] for t in range(len(codes))])


def brute_force_log_mass(code, quantiser, mean, scale):
    low = -math.inf if code == 0 else float(quantiser.edges[code])
    high = math.inf if code == 255 else float(quantiser.edges[code + 1])
    if mean < low:  # the upper tail, mirrored, so that the difference does not cancel
        low, high, mean = -high, -low, -mean
    if high - mean < -40 * scale:  # there the sigmoid is the exponential function
        return (high - mean) / scale + math.log(1 - math.exp((low - high) / scale))
    return math.log(expit((high - mean) / scale) - expit((low - mean) / scale))


def test_order_0_is_a_smoothed_histogram(fitted, train, clip):
    counts = dict.fromkeys(range(256), 0)
    for codes in train:
        for code in codes.tolist():
            counts[code] += 1
    total = sum(counts.values())
    expected = [math.log((counts[code] + 0.5) / (total + 128)) for code in clip.tolist()]
    np.testing.assert_allclose(fitted.log_probs(clip)["order-0"], expected, rtol=1e-6)


def test_previous_sample_backs_off_to_order_0(fitted, train, clip):
    order_0 = np.exp(fitted.log_probs(np.arange(256, dtype=np.uint8))["order-0"])
    pairs = [(a, b) for codes in train for a, b in zip([128, *codes], codes, strict=False)]
    expected = []
    for previous, code in zip([128, *clip], clip, strict=False):
        followers = [b for a, b in pairs if a == previous]
        kinds = max(1, len(set(followers)))
        mass = followers.count(code) + kinds * order_0[code]
        expected.append(math.log(mass / (len(followers) + kinds)))
    np.testing.assert_allclose(fitted.log_probs(clip)["previous-sample"], expected, rtol=1e-5)


def test_linear_is_least_squares_with_a_logistic_residual(fitted, train, clip, mulaw):
    rows, targets = [], []
    for codes in train:  # zeros before and after: the autocorrelation method
        extended = np.pad(mulaw.centres[codes].astype(np.float64), 32)
        rows += [extended[t - 32 : t] for t in range(32, len(extended))]
        targets += extended[32:].tolist()
    taps = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    np.testing.assert_allclose(fitted.linear_taps, taps, atol=1e-4)

    means = brute_force_windows(clip, mulaw, 32) @ taps
    expected = [
        brute_force_log_mass(int(code), mulaw, mean, fitted.linear_scale)
        for code, mean in zip(clip, means, strict=True)
    ]
    np.testing.assert_allclose(fitted.log_probs(clip)["linear-32"], expected, atol=1e-3)


def test_linear_scale_maximises_the_likelihood_of_train(train, mulaw, monkeypatch):
    monkeypatch.setattr(classical, "SCALE_EVERY_SAMPLES", 1)
    fitted = classical.fit(train, mulaw)
    values = fitted.to_dict()

    def train_bits(factor):
        scaled = {**values, "linear_scale": fitted.linear_scale * factor}
        other = classical.ClassicalBaselines.from_dict(scaled)
        return sum(bits(other, codes, "linear-32") for codes in train)

    assert train_bits(1) < min(train_bits(0.98), train_bits(1.02))


@pytest.mark.parametrize(
    ("name", "taps", "window", "ridge"),
    [("block-adaptive-32", 32, 1536, 1e-6), ("block-adaptive-256", 256, 6144, 5e-5)],
)
def test_block_adaptive_against_a_loop(name, taps, window, ridge, fitted, clip, mulaw):
    rise, fall = window - 32, 32
    taper = [math.sin(math.pi / 2 * (n + 0.5) / rise) ** 2 for n in range(rise)]
    taper += [math.cos(math.pi / 2 * (n + 0.5) / fall) for n in range(fall)]
    rows = brute_force_windows(clip, mulaw, taps)
    padded = np.concatenate([np.full(window, 128), clip])
    widths = np.diff(mulaw.edges.astype(np.float64))
    candidates = [2.0**power for power in range(-16, -2)]
    log_masses, expected, coefficients = [], [], np.empty(taps)
    for t, code in enumerate(clip):
        if t % 64 == 0:
            newest = mulaw.centres[padded[t : t + window]] * np.array(taper)
            lags = [newest[lag:] @ newest[: window - lag] for lag in range(taps + 1)]
            normal = [[lags[abs(i - j)] for j in range(taps)] for i in range(taps)]
            normal += np.eye(taps) * ridge * lags[0]
            coefficients = np.linalg.solve(normal, lags[:0:-1])
        noise = sum(coefficients**2 * widths[padded[t + window - taps : t + window]] ** 2 / 12)
        mean = rows[t] @ coefficients
        scales = [math.sqrt(s**2 + noise * 3 / math.pi**2) for s in candidates]
        log_masses.append([brute_force_log_mass(int(code), mulaw, mean, s) for s in scales])
        evidence = np.zeros(len(candidates))
        for i in range(t):
            evidence += 0.97 ** (t - 1 - i) * np.array(log_masses[i])
        weights = np.exp(evidence - evidence.max())
        weights = 0.999 * weights / weights.sum() + 0.001 / len(candidates)
        expected.append(math.log(weights @ np.exp(log_masses[t])))
    np.testing.assert_allclose(fitted.log_probs(clip)[name], expected, atol=2e-4)


@pytest.mark.parametrize("position", [0, 70, 200])
def test_normalised_over_the_256_codes(position, fitted, clip):
    totals = dict.fromkeys(classical.NAMES, 0.0)
    for code in range(256):
        alternative = clip[: position + 1].copy()
        alternative[position] = code
        for name, log_prob in fitted.log_probs(alternative).items():
            totals[name] += math.exp(log_prob[position])
    assert totals == pytest.approx(dict.fromkeys(classical.NAMES, 1.0), abs=1e-5)


@pytest.mark.parametrize("position", [0, 63, 64, 127, 300])
@pytest.mark.parametrize("future", ["altered", "absent"])
def test_causal(position, future, fitted, clip):
    other = clip[:position].copy()
    if future == "altered":
        other = np.concatenate([other, 255 - clip[position:]])
    before, after = fitted.log_probs(clip), fitted.log_probs(other)
    for name in classical.NAMES:
        np.testing.assert_array_equal(before[name][:position], after[name][:position])


def test_chunks_change_nothing(fitted, clip, monkeypatch):
    whole = fitted.log_probs(clip)
    monkeypatch.setattr(classical, "CHUNK_SAMPLES", 128)
    for name, log_prob in fitted.log_probs(clip).items():
        np.testing.assert_allclose(log_prob, whole[name], rtol=1e-6, err_msg=name)


def test_linear_reaches_the_entropy_rate_of_an_autoregression():
    scale, linear = 0.03, quantisers.get("linear")
    noise = np.random.default_rng(0).logistic(scale=scale, size=200_000)
    codes = linear.encode(autoregression([1.2, -0.6], noise))
    fitted = classical.fit([codes[:100_000]], linear)
    np.testing.assert_allclose(fitted.linear_taps[-2:], [-0.6, 1.2], atol=0.02)
    # A logistic's differential entropy is log(scale) + 2 nats; a bin is 1/128 wide.
    entropy = (math.log(scale * 128) + 2) / math.log(2)
    assert bits(fitted, codes[100_000:], "linear-32") == pytest.approx(entropy, abs=0.02)
    for name in ADAPTIVE:  # they pay for what they learn, and no more than this
        assert entropy - 0.02 < bits(fitted, codes[100_000:], name) < entropy + 0.6


def test_block_adaptive_follows_an_autoregression_that_changes(mulaw):
    rng = np.random.default_rng(0)
    parts = []
    for angle in (0.3, 1.0, 1.7, 2.4) * 2:  # a resonance that jumps every quarter of a second
        noise = rng.logistic(scale=0.004, size=4_000)
        parts.append(autoregression([2 * 0.98 * math.cos(angle), -(0.98**2)], noise))
    codes = mulaw.encode(np.concatenate(parts))
    fitted = classical.fit([codes], mulaw)  # global prediction even trains on its test
    assert bits(fitted, codes, "block-adaptive-32") < bits(fitted, codes, "linear-32") - 0.3
    assert bits(fitted, codes, "linear-32") < bits(fitted, codes, "order-0")


def test_more_taps_help_on_a_chord(fitted, mulaw):
    codes = mulaw.encode(chord(16_000, seed=4))
    assert bits(fitted, codes, "previous-sample") < bits(fitted, codes, "order-0") - 0.5
    assert bits(fitted, codes, "linear-32") < bits(fitted, codes, "previous-sample") - 0.5
    assert bits(fitted, codes, "block-adaptive-256") < bits(fitted, codes, "previous-sample") - 0.5


@pytest.mark.parametrize("quantiser", quantisers.NAMES)
def test_finite_on_the_worst_of_clips(quantiser):
    silence = np.full(1_000, 128, np.uint8)
    onset = np.concatenate([silence, np.tile(np.array([0, 255], np.uint8), 500)])
    random = np.random.default_rng(0).integers(0, 256, 1_000).astype(np.uint8)
    fitted = classical.fit([silence], quantisers.get(quantiser))
    for codes in (silence, onset, random, np.zeros(1_000, np.uint8), silence[:0], silence[:1]):
        for name, log_prob in fitted.log_probs(codes).items():
            assert log_prob.shape == codes.shape
            assert np.isfinite(log_prob).all(), name
            assert (log_prob <= 0).all(), name


def test_logistic_mass_where_naive_differences_vanish():
    # Far in a tail the mass is exp(-|x|) (1 - exp(-width)) to first order: a closed form.
    tail = classical.logistic_log_mass(np.array([500.0]), np.array([500.5]), np.array([0.0]), 1.0)
    assert tail[0] == pytest.approx(-500 + math.log(1 - math.exp(-0.5)))
    narrow = classical.logistic_log_mass(np.array([0.0]), np.array([1e-12]), np.array([0.0]), 1.0)
    assert narrow[0] == pytest.approx(math.log(0.25e-12), rel=1e-9)
    ends = classical.logistic_log_mass(
        np.array([-np.inf, 1.0]), np.array([1.0, np.inf]), np.array([0.0]), 1.0
    )
    np.testing.assert_allclose(np.exp(ends), [expit(1), expit(-1)])


def test_fit_draws_the_middle_of_each_clip_and_no_more_than_it_needs(mulaw):
    def clips():
        yield np.repeat(np.array([1, 2, 3], np.uint8), 100)
        yield np.full(300, 4, np.uint8)
        raise AssertionError("drew a clip too many")

    fitted = classical.fit(clips(), mulaw, max_clip_samples=100, max_samples=150)
    expected = np.zeros(256, int)
    expected[2], expected[4] = 100, 50
    np.testing.assert_array_equal(fitted.pair_counts.sum(0), expected)


def test_stored_values_come_back_exactly(fitted, clip):
    again = classical.ClassicalBaselines.from_dict(json.loads(json.dumps(fitted.to_dict())))
    for name, log_prob in again.log_probs(clip).items():
        np.testing.assert_array_equal(log_prob, fitted.log_probs(clip)[name])


@pytest.mark.parametrize(
    "damage",
    [
        {"surplus": 1},
        {"linear_scale": 0.0},
        {"linear_scale": None},
        {"linear_taps": [1.0]},
        {"linear_taps": [math.nan] * 32},
        {"pair_counts": [[1, 2], [3]]},
        {"pair_counts": [[-1] * 256] * 256},
        {"quantiser": "alaw"},
    ],
)
def test_damaged_values_are_refused(damage, fitted):
    with pytest.raises(UserError):
        classical.ClassicalBaselines.from_dict({**fitted.to_dict(), **damage})


def test_mistakes_are_named(fitted, mulaw):
    with pytest.raises(UserError, match="'order-1' is unknown"):
        fitted.log_probs(np.zeros(3, np.uint8), ["order-1"])
    with pytest.raises(UserError, match="no samples"):
        classical.fit([], mulaw)
    with pytest.raises(TypeError, match=r"i(nt)?16"):
        fitted.log_probs(chord(10))
