"""The quantisers against independent implementations of their definitions."""

import math

import numpy as np
import pytest

from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError

ALL_PCM = np.arange(-32768, 32768).astype(np.int16)


def mu_law_code(pcm: int) -> int:
    x = pcm / 32768
    y = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
    return math.floor((y + 1) / 2 * 255 + 0.5)


def sashimi_codes(pcm: np.ndarray) -> np.ndarray:
    """In float64, and one sample at a time."""
    x = pcm / 32768
    codes = []
    for value in x:
        a = (value - x.min()) / (x.max() - x.min() + 1e-6) * 2 - 1
        e = math.copysign(math.log1p(255 * abs(a + 1e-8)) / math.log1p(255), a)
        codes.append(int((e + 1) / 2 * 255.99 + 0.005))
    return np.array(codes)


def test_mulaw_encodes_every_int16_as_its_formula():
    expected = [mu_law_code(int(pcm)) for pcm in ALL_PCM]
    np.testing.assert_array_equal(quantisers.get("mulaw").encode(ALL_PCM), expected)


def test_linear_is_the_upper_byte():
    expected = [(int(pcm) + 32768) // 256 for pcm in ALL_PCM]
    np.testing.assert_array_equal(quantisers.get("linear").encode(ALL_PCM), expected)


@pytest.mark.parametrize("name", ["mulaw", "linear"])
def test_decode_then_encode_is_the_identity(name):
    quantiser, codes = quantisers.get(name), np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(quantiser.encode(quantiser.decode(codes)), codes)


@pytest.mark.parametrize("name", ["mulaw", "linear"])
def test_codes_increase_with_pcm_and_decode_to_its_neighbourhood(name):
    quantiser = quantisers.get(name)
    codes = quantiser.encode(ALL_PCM)
    assert (np.diff(codes.astype(int)) >= 0).all()
    assert set(codes) == set(range(256))
    error = np.abs(quantiser.decode(codes).astype(int) - ALL_PCM)
    bound = 128 if name == "linear" else np.abs(ALL_PCM.astype(int)) / 32 + 4
    assert (error <= bound).all()


@pytest.mark.parametrize("name", ["mulaw", "linear"])
def test_edges_bound_what_encodes_to_each_code(name):
    quantiser = quantisers.get(name)
    codes = quantiser.encode(ALL_PCM)
    x = ALL_PCM / 32768
    assert (quantiser.edges[codes] <= x + 1e-7).all()
    assert (x <= quantiser.edges[codes.astype(int) + 1] + 1e-7).all()


@pytest.mark.parametrize("name", quantisers.NAMES)
def test_centres_lie_inside_their_bins(name):
    quantiser = quantisers.get(name)
    assert quantiser.centres.shape == (256,)
    assert quantiser.edges.shape == (257,)
    assert (quantiser.edges[:-1] < quantiser.centres).all()
    assert (quantiser.centres < quantiser.edges[1:]).all()


def test_silence_is_the_code_of_zero():
    zero = np.zeros(3, np.int16)
    assert (quantisers.get("mulaw").encode(zero) == quantisers.SILENCE).all()
    assert (quantisers.get("linear").encode(zero) == quantisers.SILENCE).all()


def test_sashimi_by_hand():
    # min -> -1 -> u 0 -> trunc(0.005) = 0. max -> just below 1 -> u*255.99+0.005 -> 255.
    # 0 of [-0.6, 0.8] -> -1/7: log1p(255/7)/log1p(255) = 0.65344 -> u 0.17328 -> 44.36 -> 44;
    # 0 of [-0.8, 0.6] ->  1/7: u 0.82672 -> 211.64 -> 211. Truncation, not rounding.
    low = np.array([-0.6, 0, 0.8])
    np.testing.assert_array_equal(quantisers.sashimi_encode(low), [0, 44, 255])
    np.testing.assert_array_equal(quantisers.sashimi_encode(-low), [255, 211, 0])


def test_sashimi_follows_its_formula_but_for_float32_ties():
    pcm = np.random.default_rng(0).normal(0, 4000, 20_000).astype(np.int16)
    codes = quantisers.get("sashimi").encode(pcm).astype(int)
    expected = sashimi_codes(pcm)
    assert np.abs(codes - expected).max() <= 1
    assert (codes != expected).mean() < 1e-3


def test_sashimi_scales_each_clip_by_itself():
    clips = np.stack([np.array([-100, 0, 300]), np.array([-10_000, 0, 30_000])]).astype(np.int16)
    both = quantisers.get("sashimi").encode(clips)
    for clip, codes in zip(clips, both, strict=True):
        np.testing.assert_array_equal(codes, quantisers.get("sashimi").encode(clip))
    np.testing.assert_array_equal(both[0], both[1])


def test_an_unknown_name_is_an_error_with_the_known_ones():
    with pytest.raises(UserError, match="'alaw' is unknown; use one of mulaw, linear, sashimi"):
        quantisers.get("alaw")


def test_only_int16_is_encoded():
    with pytest.raises(TypeError, match="int16"):
        quantisers.get("mulaw").encode(np.zeros(3, np.float32))  # type: ignore[arg-type]
