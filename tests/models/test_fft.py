"""Spectra by matrix products: what a TPU runs, computed here."""

from functools import partial
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile as sf
from conftest import as_on, random_codes
from flax import nnx
from jax import lax

from patchwave_jax.data import quantisers
from patchwave_jax.models import fft
from patchwave_jax.models.predictors.least_squares import fit
from patchwave_jax.models.sashimi import SaShiMi, SaShiMiConfig


@pytest.mark.parametrize("samples", [1, 7, 48, 360, 1_000])
def test_a_convolution_and_the_way_back(samples, monkeypatch):
    x, kernel = np.random.default_rng(0).normal(size=(2, 3, samples))
    expected = [np.convolve(*pair)[:samples] for pair in zip(x, kernel, strict=True)]
    with jax.enable_x64(True):
        for platform_dependent in (lax.platform_dependent, as_on("tpu")):
            monkeypatch.setattr(lax, "platform_dependent", platform_dependent)
            np.testing.assert_allclose(fft.convolution(x, kernel), expected, atol=1e-10)
            spectrum = np.fft.rfft(x)
            np.testing.assert_allclose(fft.irfft(spectrum, samples), x, atol=1e-10)
            of_itself = [np.correlate(row, row, "full")[samples - 1 :] for row in x]
            got = fft.autocorrelation(x, 2 * samples, samples)
            np.testing.assert_allclose(got, of_itself, atol=1e-10)


def in_passes(count, equation, a, b, precision):
    """A float32 product as a TPU computes it, of numbers cut to one or two bfloat16s."""
    to_bfloat16 = partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    product = partial(jnp.einsum, equation, precision="highest")
    a1, b1 = to_bfloat16(a), to_bfloat16(b)
    if count == 1:
        return product(a1, b1)
    return product(a1, b1) + product(a1, to_bfloat16(b - b1)) + product(to_bfloat16(a - a1), b1)


def test_three_passes_are_enough_for_a_convolution(monkeypatch):
    monkeypatch.setattr(lax, "platform_dependent", as_on("tpu"))
    x, kernel = np.random.default_rng(0).normal(size=(2, 2, 4_096)).astype(np.float32)
    expected = [np.convolve(*pair)[:4_096] for pair in zip(x, kernel, strict=True)]

    def error(count):
        monkeypatch.setattr(fft, "_sum", partial(in_passes, count))
        difference = np.asarray(jax.jit(lambda x: fft.convolution(x, kernel))(x)) - expected
        return np.linalg.norm(difference) / np.linalg.norm(expected)

    assert error(1) > 1e-3
    assert error(3) < 5e-5


def test_three_passes_are_too_few_for_a_fit(monkeypatch):
    """Of 192 taps, to 64 places in the demo's piano; the error is of the next 100 samples."""
    monkeypatch.setattr(lax, "platform_dependent", as_on("tpu"))
    path = resources.files("patchwave_jax") / "data/demo_audio/demo1_beethoven_fur_elise.flac"
    mulaw, piano = quantisers.get("mulaw"), sf.read(str(path))[0]
    piano = mulaw.centres[np.searchsorted(mulaw.edges[1:-1], piano)].astype(np.float32)
    starts = np.random.default_rng(0).integers(4_096, piano.size - 100, 64)
    x = np.stack([piano[start - 4_096 : start + 100] for start in starts])

    def errors():
        fitted = jax.jit(lambda x: fit(x, 192)[0])(x[:, :4_096])
        past = np.lib.stride_tricks.sliding_window_view(x[:, 3_904:-1], 192, 1)[..., ::-1]
        predicted = np.einsum("bik,bk->bi", past, np.asarray(fitted))
        return np.sqrt(np.square(x[:, 4_096:] - predicted).mean(1))

    with monkeypatch.context() as library:
        library.setattr(lax, "platform_dependent", as_on("cpu"))
        expected = errors()
    assert (errors() / expected).max() < 1.01
    monkeypatch.setattr(fft, "_sum", partial(in_passes, 3))
    assert (errors() / expected).max() > 1.2


def test_no_fourier_transform_on_a_tpu():
    """Long ones are more than its compiler can do."""
    config = SaShiMiConfig(width=8, num_layers=1, pools=(4,), state_size=16)
    graphdef, params = nnx.split(SaShiMi(config, rngs=nnx.Rngs(0)))
    codes = random_codes(1, 320)
    step = jax.jit(jax.grad(lambda params: nnx.merge(graphdef, params).window_logits(codes).sum()))
    for platform, transforms in (("cpu", True), ("tpu", False)):
        text = step.trace(params).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.fft" in text) == transforms
