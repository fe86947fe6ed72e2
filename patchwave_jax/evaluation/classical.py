"""Classical baselines: predictors without a network, for comparison on the same codes.

| name                 | log p(code at t given all codes before t)                                |
|----------------------|--------------------------------------------------------------------------|
| `order-0`            | histogram of the train codes                                             |
| `previous-sample`    | histogram given the code before, backed off to `order-0`                 |
| `linear-32`          | one 32-tap linear prediction of the waveform for all of the data, its    |
|                      | residual logistic with one scale                                         |
| `block-adaptive-32`  | 32 taps, refitted every 64 samples to the newest samples of the clip     |
|                      | itself, the scale tracked at every sample                                |
| `block-adaptive-256` | 256 taps, fitted to four times as many                                   |

All five are normalised over the 256 codes and strictly causal; missing history is silence.
The first three are fitted on the train split. The last two learn from the clip alone, as it
goes by; their few constants were chosen on piano recordings.

Dimensions: `T` samples, `K` taps, `K1` = K + 1 (lags 0 to K), `S` candidate scales.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from scipy.fft import next_fast_len
from scipy.linalg import solve_toeplitz
from scipy.optimize import minimize_scalar
from scipy.signal import lfilter

from patchwave_jax.data import quantisers
from patchwave_jax.data.quantisers import NUM_CODES, SILENCE, Quantiser
from patchwave_jax.errors import UserError
from patchwave_jax.models.predictors.least_squares import taper

LINEAR_TAPS = 32
LINEAR_RIDGE = 1e-9  # of the waveform's energy; the quantiser's noise does the rest
ORDER_0_PSEUDOCOUNT = 0.5  # Krichevsky and Trofimov 1981
SCALE_EVERY_SAMPLES = 16  # linear-32's scale is fitted to every 16th sample

CANDIDATE_SCALES = 2.0 ** np.arange(-16, -2)  # of a logistic; full scale of the waveform is 1
EVIDENCE_DECAY = 0.97  # per sample: scales are weighed by about the last 33 samples
SHARED_WEIGHT = 1e-3  # of the mixture, spread evenly: bounds the cost of a sudden onset
LOGISTIC_VARIANCE = math.pi**2 / 3  # of a logistic of scale 1

BLOCK_SAMPLES = 64  # predicted with the same coefficients
CHUNK_SAMPLES = 65_536  # bounds memory, changes no result; a multiple of BLOCK_SAMPLES


@dataclasses.dataclass(frozen=True)
class _BlockAdaptive:
    taps: int
    window_samples: int  # newest samples that the coefficients are fitted to, tapered
    ridge: float  # of the window's energy


_BLOCK_ADAPTIVE = {
    "block-adaptive-32": _BlockAdaptive(32, 1_536, 1e-6),
    "block-adaptive-256": _BlockAdaptive(256, 6_144, 5e-5),
}
NAMES = ("order-0", "previous-sample", "linear-32", *_BLOCK_ADAPTIVE)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassicalBaselines:
    """What is fitted to the train split; `fit` makes it, `to_dict` stores it."""

    quantiser: Quantiser
    pair_counts: Int64[np.ndarray, "256 256"]  # [the code before, the code]
    linear_taps: Float64[np.ndarray, "32"]  # oldest sample first
    linear_scale: float  # of the logistic residual, in the waveform

    def log_probs(
        self, codes: UInt8[np.ndarray, " T"], names: Sequence[str] = NAMES
    ) -> dict[str, Float32[np.ndarray, " T"]]:
        """Log-probability of every code of one clip given those before it, in nats, by baseline.

        Raises `UserError` for a name that is not in `NAMES`.
        """
        _check_codes(codes)
        return {name: self._log_prob(name, codes).astype(np.float32) for name in names}

    def _log_prob(self, name: str, codes: UInt8[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
        if name in _BLOCK_ADAPTIVE:
            return _block_adaptive_log_prob(codes, self.quantiser, _BLOCK_ADAPTIVE[name])
        if name == "order-0":
            return np.log(_order_0(self.pair_counts))[codes]
        if name == "previous-sample":
            table = np.log(_given_previous(self.pair_counts))
            return table[_with_history(codes, 1)[:-1], codes]
        if name == "linear-32":
            return self._linear_log_prob(codes)
        raise UserError(f"baseline {name!r} is unknown; use some of {', '.join(NAMES)}")

    def _linear_log_prob(self, codes: UInt8[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
        padded, log_prob = _with_history(codes, LINEAR_TAPS), np.empty(len(codes))
        for begin in range(0, len(codes), CHUNK_SAMPLES):
            chunk = slice(begin, begin + CHUNK_SAMPLES)
            waveform = _decode(self.quantiser, padded[begin : chunk.stop + LINEAR_TAPS])
            means = np.correlate(waveform[:-1], self.linear_taps, "valid")
            low, high = _bins(self.quantiser, codes[chunk])
            log_prob[chunk] = logistic_log_mass(low, high, means, self.linear_scale)
        return log_prob

    def to_dict(self) -> dict:
        """All fitted values in JSON types, exactly; about 250 kB as text."""
        return {
            "quantiser": self.quantiser.name,
            "pair_counts": self.pair_counts.tolist(),
            "linear_taps": self.linear_taps.tolist(),
            "linear_scale": self.linear_scale,
        }

    @classmethod
    def from_dict(cls, values: Mapping) -> "ClassicalBaselines":
        """The inverse of `to_dict`. Raises `UserError` if `values` is not its result."""
        fields = {field.name for field in dataclasses.fields(cls)}
        if set(values) != fields:
            raise UserError(f"stored baselines need the fields {sorted(fields)}; fit them again")
        try:
            counts = np.asarray(values["pair_counts"], np.int64)
            taps = np.asarray(values["linear_taps"], np.float64)
            scale = float(values["linear_scale"])
        except (TypeError, ValueError) as error:
            raise UserError(f"stored baselines are damaged ({error}); fit them again") from error
        good_counts = counts.shape == (NUM_CODES, NUM_CODES) and (counts >= 0).all()
        good_taps = taps.shape == (LINEAR_TAPS,) and np.isfinite(taps).all()
        if not (good_counts and good_taps and 0 < scale < math.inf):
            raise UserError("stored baselines have a wrong shape or range; fit them again")
        return cls(quantisers.get(str(values["quantiser"])), counts, taps, scale)


def fit(
    train_clips: Iterable[UInt8[np.ndarray, " _"]],
    quantiser: Quantiser,
    *,
    max_clip_samples: int = 262_144,
    max_samples: int = 16_777_216,
) -> ClassicalBaselines:
    """Fits the classical baselines to a bounded sample of `train_clips`, the same one every time.

    The sample is the middle `max_clip_samples` of each clip, in the given order, until there are
    `max_samples`. Takes a few seconds and keeps the sample as bytes.
    Raises `UserError` if there are no samples.
    """
    excerpts, drawn = [], 0
    for clip in train_clips:
        _check_codes(clip)
        begin = max(0, (len(clip) - max_clip_samples) // 2)
        excerpts.append(clip[begin : begin + min(max_clip_samples, max_samples - drawn)].copy())
        drawn += len(excerpts[-1])
        if drawn >= max_samples:
            break
    if drawn == 0:
        raise UserError("the train split has no samples to fit baselines to; check the data")

    pair_counts = np.zeros(NUM_CODES * NUM_CODES, np.int64)
    for excerpt in excerpts:
        pairs = _with_history(excerpt, 1)[:-1].astype(np.intp) * NUM_CODES + excerpt
        pair_counts += np.bincount(pairs, minlength=NUM_CODES * NUM_CODES)
    taps, scale = fit_linear(excerpts, quantiser, LINEAR_TAPS)
    return ClassicalBaselines(quantiser, pair_counts.reshape(NUM_CODES, NUM_CODES), taps, scale)


def fit_linear(
    clips: Sequence[UInt8[np.ndarray, " _"]], quantiser: Quantiser, taps: int
) -> tuple[Float64[np.ndarray, " K"], float]:
    """Least-squares linear prediction of the waveform, and the scale of its logistic residual.

    Returns `taps` coefficients, the oldest sample's first, and the scale (full scale 1).
    """
    autocorrelation = np.zeros(taps + 1)
    for clip in clips:
        autocorrelation += _autocorrelation(_decode(quantiser, clip), taps)
    coefficients = _linear_prediction(autocorrelation, LINEAR_RIDGE)
    return coefficients, _fit_scale(clips, quantiser, coefficients)


def logistic_log_mass(
    low: np.ndarray, high: np.ndarray, mean: np.ndarray, scale: np.ndarray | float
) -> np.ndarray:
    """Log of the mass of a logistic between `low` and `high`, finite however far the tail.

    With a and b the standardised edges, sigmoid(b) - sigmoid(a) is
    sigmoid(b) sigmoid(-a) (1 - exp(a - b)): no factor cancels. Arguments broadcast.
    """
    a, b = (low - mean) / scale, (high - mean) / scale
    return np.log(-np.expm1(a - b)) - np.logaddexp(0, -b) - np.logaddexp(0, a)


def _check_codes(codes: np.ndarray) -> None:
    if codes.dtype != np.uint8 or codes.ndim != 1:
        raise TypeError(f"a clip is uint8 [T], got {codes.dtype} of shape {codes.shape}")


def _with_history(codes: UInt8[np.ndarray, " T"], samples: int) -> UInt8[np.ndarray, " _"]:
    return np.concatenate([np.full(samples, SILENCE, np.uint8), codes])


def _decode(quantiser: Quantiser, codes: UInt8[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
    return quantiser.centres.astype(np.float64)[codes]


def _bins(
    quantiser: Quantiser, codes: UInt8[np.ndarray, " T"]
) -> tuple[Float64[np.ndarray, " T"], Float64[np.ndarray, " T"]]:
    """Edges of the codes' bins, the outermost two open, so that all masses sum to one."""
    edges = quantiser.edges.astype(np.float64)
    edges[[0, -1]] = -np.inf, np.inf
    return edges[:-1][codes], edges[1:][codes]


def _order_0(pair_counts: Int64[np.ndarray, "256 256"]) -> Float64[np.ndarray, "256"]:
    counts = pair_counts.sum(0) + ORDER_0_PSEUDOCOUNT
    return counts / counts.sum()


def _given_previous(pair_counts: Int64[np.ndarray, "256 256"]) -> Float64[np.ndarray, "256 256"]:
    """Backed off to order 0 as Witten and Bell (1991, method C): by the kinds of code seen next."""
    kinds = np.maximum(1, np.count_nonzero(pair_counts, axis=1, keepdims=True))
    backed_off = pair_counts + kinds * _order_0(pair_counts)
    return backed_off / (pair_counts.sum(1, keepdims=True) + kinds)


def _autocorrelation(waveform: Float64[np.ndarray, " T"], taps: int) -> Float64[np.ndarray, " K1"]:
    """Sums of the products of samples 0 to `taps` apart."""
    size = next_fast_len(len(waveform) + taps, real=True)
    return np.fft.irfft(np.abs(np.fft.rfft(waveform, size)) ** 2, size)[: taps + 1]


def _linear_prediction(
    autocorrelation: Float64[np.ndarray, " K1"], ridge: float
) -> Float64[np.ndarray, " K"]:
    """Coefficients of least squared error, oldest sample first (the normal equations)."""
    column = autocorrelation[:-1].copy()
    column[0] *= 1 + ridge
    return solve_toeplitz(column, autocorrelation[1:])[::-1]


def _fit_scale(
    excerpts: Sequence[UInt8[np.ndarray, " _"]],
    quantiser: Quantiser,
    taps: Float64[np.ndarray, " K"],
) -> float:
    """The scale of greatest likelihood for the logistic residual of a fixed linear prediction."""
    parts = []
    for codes in excerpts:
        waveform = _decode(quantiser, _with_history(codes, len(taps)))
        means = np.correlate(waveform[:-1], taps, "valid") if len(codes) else np.empty(0)
        parts.append(np.stack([*_bins(quantiser, codes), means])[:, ::SCALE_EVERY_SAMPLES])
    low, high, mean = np.concatenate(parts, axis=1)

    def nll(log_scale: float) -> float:
        return -float(logistic_log_mass(low, high, mean, math.exp(log_scale)).mean())

    bounds = tuple(np.log(CANDIDATE_SCALES[[0, -1]]))
    best = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-4})
    return math.exp(best.x)


def _block_adaptive_log_prob(
    codes: UInt8[np.ndarray, " T"], quantiser: Quantiser, config: _BlockAdaptive
) -> Float64[np.ndarray, " T"]:
    """Linear prediction, refitted for each block, and a mixture of logistics around it.

    All logistics of a mixture have the predicted mean; the candidate scales are weighted by
    their likelihoods over the newest samples, with exponential forgetting. Each scale is widened
    by the quantiser's noise in the samples that are predicted from.
    """
    taps, window = config.taps, config.window_samples
    window_function = taper(window)
    noise_by_code = np.diff(quantiser.edges.astype(np.float64)) ** 2 / 12
    padded, log_prob = _with_history(codes, window), np.empty(len(codes))
    evidence = np.zeros((len(CANDIDATE_SCALES), 1))
    for begin in range(0, len(codes), CHUNK_SAMPLES):
        chunk = padded[begin : begin + CHUNK_SAMPLES + window]
        waveform, noise = _decode(quantiser, chunk), noise_by_code[chunk]
        means, variances = np.empty((2, len(chunk) - window))
        for start in range(0, len(means), BLOCK_SAMPLES):
            stop = min(start + BLOCK_SAMPLES, len(means))
            newest = (
                waveform[start : start + window] * window_function
            )  # ends just before the block
            coefficients = _linear_prediction(_autocorrelation(newest, taps), config.ridge)
            past = slice(start + window - taps, stop + window - 1)
            means[start:stop] = np.correlate(waveform[past], coefficients, "valid")
            variances[start:stop] = np.correlate(noise[past], coefficients**2, "valid")
        low, high = _bins(quantiser, chunk[window:])
        scales = np.sqrt(CANDIDATE_SCALES[:, None] ** 2 + variances / LOGISTIC_VARIANCE)
        log_masses = logistic_log_mass(low, high, means, scales)
        log_prob[begin : begin + len(means)], evidence = _mix(log_masses, evidence)
    return log_prob


def _mix(
    log_masses: Float64[np.ndarray, "S T"], evidence: Float64[np.ndarray, "S 1"]
) -> tuple[Float64[np.ndarray, " T"], Float64[np.ndarray, "S 1"]]:
    """Log of the mixture at each sample, weighed by the evidence before it; the evidence after."""
    decayed, _ = lfilter([1.0], [1.0, -EVIDENCE_DECAY], log_masses, zi=EVIDENCE_DECAY * evidence)
    before = np.concatenate([evidence, decayed[:, :-1]], axis=1)
    weights = np.exp(before - before.max(0))
    weights *= (1 - SHARED_WEIGHT) / weights.sum(0)
    weights += SHARED_WEIGHT / len(weights)
    peak = log_masses.max(0)
    return np.log((weights * np.exp(log_masses - peak)).sum(0)) + peak, decayed[:, -1:]
