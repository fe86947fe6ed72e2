"""The judgement of generated clips, on sounds whose faults are known."""

import json
import math

import numpy as np
import pytest
import soundfile as sf
from small_run import make_config, make_run, tones

from benchmarks import closed_loop as benchmark
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.data.build import build
from patchwave_jax.evaluation import evaluator, protocol
from patchwave_jax.reporting import closed_loop

TIMES = np.array([0.5, 1.1, 1.9, 2.6, 3.3, 4.2, 4.8, 5.5])  # of the notes' beginnings, seconds


def notes(seconds: float = 6.0, gain: float = 1.0, times=TIMES) -> np.ndarray:
    """Decaying notes with harmonics, above a little noise."""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wave = 1e-5 * np.random.default_rng(0).normal(size=time.size)
    for i, start in enumerate(times):
        since = np.maximum(time - start, 0)
        struck = (time >= start) * np.exp(-1.5 * since)
        for harmonic in (1, 2, 3, 4):
            frequency = 220 * 2 ** (i * 5 % 12 / 12) * harmonic
            wave += 0.08 / harmonic**2 * struck * np.sin(2 * np.pi * frequency * since)
    return np.clip(gain * wave * 32768, -32768, 32767).astype(np.int16)


def judge(made: np.ndarray, real: np.ndarray | None = None) -> list[str]:
    measured = (closed_loop.measure(x) for x in (notes(), made, notes() if real is None else real))
    return closed_loop.judge(*measured)


def test_notes_pass_and_their_beginnings_are_found():
    assert judge(notes()) == []
    found = closed_loop.onset_times(notes())
    assert found.size == TIMES.size
    np.testing.assert_allclose(found, TIMES, atol=0.05)
    measured = closed_loop.measure(notes())
    assert measured.onsets.sum() == TIMES.size
    assert (measured.flatness < 0.005).all()
    assert (measured.treble_db < -25).all()


def test_loudness_is_the_root_mean_square():
    tone = (
        0.5 * 32768 * np.sin(2 * np.pi * 440 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    ).astype(np.int16)
    np.testing.assert_allclose(
        closed_loop.measure(tone).dbfs, 20 * np.log10(0.5 / 2**0.5), atol=0.01
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x * 6, "too loud in second 3"),
        (lambda x: x + 2_000 * np.random.default_rng(1).normal(size=x.size), "noise in second 3"),
        (lambda x: x + 9_000 * (-1.0) ** np.arange(x.size), "treble in second 3"),
        (lambda x: x * 1e-3, "silent from second 3"),
    ],
)
def test_faults_are_named_with_their_second(change, reason):
    made = notes().astype(float)
    made[2 * SAMPLE_RATE :] = change(made[2 * SAMPLE_RATE :])
    reasons = judge(np.clip(made, -32768, 32767).astype(np.int16))
    assert reason in reasons


def test_silence_where_the_music_is_silent_passes():
    quiet = notes()
    quiet[2 * SAMPLE_RATE :] = 0
    assert judge(quiet, quiet) == []
    assert judge(quiet) == ["silent from second 3"]


def test_a_note_that_only_decays_has_no_onset():
    held = notes(times=[0.0])
    assert "no onset" in judge(held[SAMPLE_RATE:])
    noise = np.random.default_rng(0).normal(size=5 * SAMPLE_RATE) * 3_000
    assert closed_loop.onset_times(noise.astype(np.int16)).size == 0


def test_less_than_a_second_is_an_error():
    with pytest.raises(ValueError, match="less than a second"):
        closed_loop.measure(np.zeros(100, np.int16))


def test_benchmark_compares_clips_with_the_music_that_came(tmp_path, capsys):
    """Its bits of real music are the evaluation's; clips, pictures and a page are written."""
    (tmp_path / "source").mkdir()
    for i in range(3):
        sf.write(tmp_path / f"source/take{i}.wav", tones(50_000, i), SAMPLE_RATE)
    build("audio_folder", tmp_path / "source", tmp_path / "data")
    config = make_config(tmp_path / "data")
    workdir, out = make_run(tmp_path / "run", config), tmp_path / "out"
    flags = f"--workdir={workdir} --out={out} --split=train --num=2 --seconds=1 --prompt_seconds=1"
    benchmark.main(flags.split())
    found = json.loads((out / "closed_loop.json").read_text())
    assert found["clips"] == 2
    assert found["failed"] == sum(bool(row["fails"]) for row in found["rows"])
    printed = capsys.readouterr().out
    assert "verdict" in printed
    assert f'"failed": {found["failed"]}' in printed
    loaded, params, _ = evaluator.load(workdir)
    total, count = 0.0, 0
    for i in range(2):
        real, rate = sf.read(out / f"{i:02}_real.flac", dtype="int16")
        assert rate == SAMPLE_RATE
        assert real.size == 2 * SAMPLE_RATE
        made, _ = sf.read(out / f"{i:02}.flac", dtype="int16")
        codes = quantisers.get("mulaw").encode(real)
        prompt = quantisers.get("mulaw").decode(codes[:SAMPLE_RATE])
        np.testing.assert_allclose(made[:SAMPLE_RATE], prompt, atol=700)
        windows = protocol.plan([codes.size], config, protocol.default_stride(config))
        for scored in loaded.score(params, lambda _, codes=codes: codes, windows):
            kept = scored.log_probs[max(0, SAMPLE_RATE - scored.window.first) :]
            total, count = total - float(kept.sum()), count + kept.size
        assert (out / f"{i:02}.png").stat().st_size > 1_000
    assert count == 2 * SAMPLE_RATE
    assert found["bits_real"] == pytest.approx(total / count / math.log(2), abs=1e-3)
    assert "00.flac" in (out / "index.html").read_text()
    with pytest.raises(SystemExit):
        benchmark.main(flags.split())
    assert "give another folder" in capsys.readouterr().err
