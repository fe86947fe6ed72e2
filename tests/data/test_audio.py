"""Reading audio: every format, and every kind of bad file."""

import struct

import numpy as np
import pytest
import soundfile as sf

from patchwave_jax.data import audio
from patchwave_jax.errors import UserError


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, num_samples).astype(np.int16)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_khz_mono_16_bit_passes_through_bit_exactly(tmp_path, suffix):
    pcm = noise(600_001)  # more than two blocks
    pcm[:2] = -32768, 32767
    sf.write(tmp_path / f"a.{suffix}", pcm, 16_000)
    read = audio.read(tmp_path / f"a.{suffix}")
    assert read.dtype == np.int16
    np.testing.assert_array_equal(read, pcm)


def test_channels_are_mixed_by_their_mean(tmp_path):
    left, right = noise(5000, 1), noise(5000, 2)
    sf.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000)
    expected = np.round((left.astype(float) + right) / 2)
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), expected)


@pytest.mark.parametrize(
    ("suffix", "rate", "tolerance"),
    [("wav", 44_100, 2), ("flac", 48_000, 2), ("ogg", 44_100, 900), ("mp3", 44_100, 900)],
)
def test_a_stereo_tone_of_any_rate_becomes_the_same_tone(tmp_path, suffix, rate, tolerance):
    seconds, path = 2.0, tmp_path / f"a.{suffix}"
    t = np.arange(int(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * 440 * t)
    left, right = 0.5 * tone, 0.3 * tone
    sf.write(path, np.stack([left, right], 1), rate)
    pcm = audio.read(path)
    assert abs(len(pcm) - seconds * 16_000) <= 1
    expected = 0.4 * 32768 * np.sin(2 * np.pi * 440 * np.arange(len(pcm)) / 16_000)
    assert np.abs(pcm - expected)[2000:-2000].max() < tolerance


def test_frequencies_above_8_khz_do_not_alias(tmp_path):
    t = np.arange(88_200) / 44_100
    sf.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 10_000 * t), 44_100)
    assert np.abs(audio.read(tmp_path / "a.wav")[2000:-2000]).max() <= 1


def test_resampling_in_blocks_is_resampling_at_once(tmp_path, monkeypatch):
    sf.write(tmp_path / "a.wav", noise(100_000), 22_050)
    expected = audio.read(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1000)
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), expected)
    assert max(block.size for block in audio.blocks(tmp_path / "a.wav")) < 2000


def test_float_samples_are_rounded_and_clipped(tmp_path):
    x = np.full(4000, 0.25)
    x[:4] = 1.5, -1.5, 1.6 / 32768, 0.4 / 32768
    sf.write(tmp_path / "a.wav", x, 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav")[:5], [32767, -32768, 2, 0, 8192])


def test_scan_counts_and_hashes(tmp_path):
    sf.write(tmp_path / "a.wav", np.stack([noise(48_000)] * 2, 1), 48_000)
    facts = audio.scan(tmp_path / "a.wav")
    assert (facts.num_samples, facts.source_rate, facts.source_channels) == (16_000, 48_000, 2)
    assert facts.sha256 == audio.sha256(tmp_path / "a.wav")
    assert len(facts.sha256) == 64


def wav(pcm: np.ndarray, declared: int, riff: int | None = None) -> bytes:
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    body = fmt + struct.pack("<4sI", b"data", declared) + pcm.tobytes()
    return struct.pack("<4sI4s", b"RIFF", len(body) + 4 if riff is None else riff, b"WAVE") + body


def halved(suffix: str):
    def write(path):
        sf.write(path, noise(60_000), 16_000, format=suffix)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return write


def floats(value: float):
    def write(path):
        x = np.full(20_000, 0.1, np.float32)
        x[16_000] = value
        sf.write(path, x, 16_000, subtype="FLOAT")

    return write


def beyond_4_gib(path):
    path.write_bytes(wav(noise(9000), 18_000))
    with open(path, "r+b") as file:  # a hole on most file systems: it takes no space
        file.truncate(44 + 18_000 + 2**32)


BAD = {
    "text.wav": (lambda path: path.write_text("no audio " * 100), "can't be read as audio"),
    "zero_bytes.wav": (lambda path: path.write_bytes(b""), "is empty"),
    "no_samples.wav": (lambda path: sf.write(path, noise(0), 16_000), "is empty"),
    "short.wav": (lambda path: sf.write(path, noise(1999), 16_000), "too short: 0.125 s"),
    "silent.wav": (lambda path: sf.write(path, noise(9000) * 0, 16_000), "silent"),
    "nan.wav": (floats(np.nan), r"NaN or infinite sample at 1\.000 s"),
    "inf.wav": (floats(-np.inf), r"NaN or infinite sample at 1\.000 s"),
    "cut.wav": (lambda p: p.write_bytes(wav(noise(9000), 20_000)), "holds 18000 of 20000 bytes"),
    "cut_header.wav": (lambda path: path.write_bytes(wav(noise(0), 0)[:36]), "truncated"),
    "unfinished.wav": (lambda p: p.write_bytes(wav(noise(9000), 0, 0)), "18000 bytes follow"),
    "over_4_gib.wav": (beyond_4_gib, "is over 4 GiB"),
    "cut.flac": (halved("flac"), "truncated"),
    "cut.ogg": (halved("ogg"), "truncated"),
    "cut.mp3": (halved("mp3"), "truncated"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_an_error_that_names_it(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        audio.read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav: can't be read: No such file"):
        audio.read(tmp_path / "gone.wav")


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF])
def test_a_streamed_wav_is_read_to_its_end(tmp_path, declared):
    pcm = noise(9000)
    (tmp_path / "a.wav").write_bytes(wav(pcm, declared, declared))
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), pcm)


def test_chunks_after_the_audio_are_not_truncation(tmp_path):
    pcm = noise(9000)
    (tmp_path / "a.wav").write_bytes(wav(pcm, 18_000) + struct.pack("<4sI4s", b"LIST", 4, b"INFO"))
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), pcm)


def test_an_mp3_without_a_known_length_is_an_error(tmp_path):
    t = np.arange(600_000) / 16_000
    sf.write(tmp_path / "a.mp3", 0.3 * np.sin(2 * np.pi * 440 * t) * np.exp(-(t % 3)), 16_000)
    content = (tmp_path / "a.mp3").read_bytes()
    second_frame = content.index(content[:2], 4)  # the first holds the length
    (tmp_path / "b.mp3").write_bytes(content[second_frame:])
    assert len(audio.read(tmp_path / "a.mp3")) == 600_000
    with pytest.raises(UserError, match="no length header"):
        audio.read(tmp_path / "b.mp3")
