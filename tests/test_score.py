"""Scoring files: the same numbers as evaluation, in a stream."""

import tracemalloc

import numpy as np
import pytest
import soundfile as sf
from small_run import PATCHES, SIZE, make_config, make_data, make_run, tones

from patchwave_jax import score
from patchwave_jax.data import audio, quantisers
from patchwave_jax.data.index import open_split
from patchwave_jax.errors import EXIT_CODE
from patchwave_jax.evaluation import evaluator as evaluator_module
from patchwave_jax.evaluation import measure, protocol
from patchwave_jax.score import encoded, stream


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, source):
    return make_data(source, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    return make_run(tmp_path_factory.mktemp("run"), make_config(data_dir))


@pytest.mark.parametrize(("quantiser", "stride"), [("mulaw", PATCHES), ("sashimi", 1)])
def test_the_sum_of_scores_is_what_evaluation_says(
    data_dir, source, tmp_path, quantiser, stride, capsys
):
    """Growing context (stride N) and sliding, from the files against from the built dataset."""
    run = make_run(tmp_path / "run", make_config(data_dir, quantiser=quantiser))
    split = open_split(data_dir, "audio_folder", "test")
    files = [file.name for r in split.recordings for file in r.files]
    evaluator, params, _ = evaluator_module.load(run)
    result = measure.evaluate_split(evaluator, params, split, stride_patches=stride)
    paths = [str(source / name) for name in files]
    score.main([*paths, f"--workdir={run}", f"--npz={tmp_path}", f"--stride_patches={stride}"])
    total, count = 0.0, 0
    for name in files:
        with np.load(tmp_path / f"{name[:-4]}.npz") as stored:
            assert stored["log_probs"].dtype == np.float32
            total -= stored["log_probs"].sum(dtype=np.float64)
            count += stored["log_probs"].size
            quantiser = quantisers.get(str(stored["quantiser"]))
            assert quantiser.name == evaluator.config.data.quantiser
            np.testing.assert_array_equal(
                stored["codes"], quantiser.encode(audio.read(source / name))
            )
            assert (stored["stride_patches"], stored["step"]) == (stride, 3)
    assert count == result.targets
    assert total / count == pytest.approx(result.nll_nats, rel=1e-6)
    assert f"{result.nll_bits:.4f} bits" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["dense", "last"])
@pytest.mark.parametrize("stride", [1, 3, PATCHES])
def test_a_stream_has_the_windows_of_the_plan(objective, stride, rng):
    config = make_config("", objective=objective)
    whole = PATCHES * SIZE
    for length in (1, SIZE, whole - 1, whole, whole + 1, 5 * whole + 7):
        codes = rng.integers(0, 256, length, dtype=np.uint8)
        planned = protocol.plan([length], config, stride)
        for cut in (1, 50, 10_000):
            blocks = (codes[i : i + cut] for i in range(0, length, cut))
            streamed = list(stream(blocks, config, stride))
            assert [window for window, _ in streamed] == planned
            for window, read in streamed:
                np.testing.assert_array_equal(read, protocol.segment(window, codes, config))


def test_sashimi_scales_by_the_extremes_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_FRAMES", 1_000)
    pcm = tones(5_500, 3)
    pcm[4_321] = -30_000
    sf.write(tmp_path / "x.wav", pcm, 16_000)
    quantiser = quantisers.get("sashimi")
    blocks = list(encoded(tmp_path / "x.wav", quantiser))
    assert len(blocks) > 5
    np.testing.assert_array_equal(np.concatenate(blocks), quantiser.encode(pcm))


def test_memory_does_not_grow_with_the_length():
    config = make_config("")

    def peak(blocks: int) -> int:
        tracemalloc.start()
        for _ in stream((np.zeros(10_000, np.uint8) for _ in range(blocks)), config, 2):
            pass
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(2)
    assert peak(200) < 1.5 * peak(10) < 200_000


def test_what_is_converted_is_told(run, tmp_path, capsys):
    stereo = np.stack([tones(14_000, 1), tones(14_000, 2)], 1)
    sf.write(tmp_path / "stereo.flac", stereo, 44_100)
    score.main([str(tmp_path / "stereo.flac"), f"--workdir={run}"])
    printed = capsys.readouterr().out
    assert "converted from 44.1 kHz, 2 channels to 16 kHz mono" in printed
    assert "bits" in printed


def test_bad_input_is_one_clear_line_and_nothing_is_overwritten(run, source, tmp_path, capsys):
    good = source / "take0.wav"
    text = tmp_path / "notes.wav"
    text.write_text("no audio at all")
    (tmp_path / "take0.npz").write_text("precious")
    (tmp_path / "other").mkdir()
    for flags, message in (
        ([str(text)], "notes.wav"),
        ([str(tmp_path / "absent.wav")], "is not a file"),
        ([str(good), "--stride_patches=9"], "--stride_patches must be"),
        ([str(good), f"--npz={tmp_path}"], "--overwrite"),
        ([str(good), f"--npz={tmp_path}/none"], "is not a folder"),
        ([str(good), str(good), f"--npz={tmp_path}/other"], "would both be written to"),
    ):
        with pytest.raises(SystemExit) as stopped:
            score.main([*flags, f"--workdir={run}"])
        assert stopped.value.code == EXIT_CODE
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
    assert (tmp_path / "take0.npz").read_text() == "precious"
    score.main([str(good), f"--workdir={run}", f"--npz={tmp_path}", "--overwrite"])
    with np.load(tmp_path / "take0.npz") as stored:
        assert stored["log_probs"].size == sf.info(good).frames
