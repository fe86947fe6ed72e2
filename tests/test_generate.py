"""The command: streaming, stopping, resuming, prompts, records, bad input."""

import json
import resource
import signal
import subprocess
import sys
import time
import wave

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile as sf
from conftest import SMALL, random_model
from flax import nnx

from patchwave_jax import generate
from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config
from patchwave_jax.data import audio, quantisers
from patchwave_jax.data.index import Split
from patchwave_jax.errors import UserError
from patchwave_jax.generation import prompts
from patchwave_jax.generation.check import Consistency
from patchwave_jax.generation.clips import Outputs

CONFIG = Config(objective="dense", context_samples=240, model=SMALL)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with one checkpoint, of a model with random weights."""
    path = tmp_path_factory.mktemp("run")
    params = nnx.state(random_model(SMALL, causal=True))
    state = {"params": params, "opt_state": (), "step": jnp.int32(3)}
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(3, state, config=CONFIG, manifest_hash="", best_nats=None, flat_evals=0)
    return str(path)


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "tone.wav"
    samples = 8000 * np.sin(np.arange(4000) / 9)
    sf.write(path, samples.astype(np.int16), 16_000)
    return str(path)


def run(*flags: str, fails: str | None = None, capsys=None) -> None:
    if fails is None:
        generate.main(list(flags))
        return
    with pytest.raises(SystemExit) as caught:
        generate.main(list(flags))
    assert caught.value.code == 2
    assert fails in capsys.readouterr().err


def command(*flags: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "patchwave_jax.generate", *flags]


def test_stopped_by_a_signal_and_resumed_it_is_the_same_to_the_last_byte(workdir, tmp_path):
    """A real process, SIGTERM in the middle, and one that was never stopped."""
    flags = (f"--workdir={workdir}", "--num=2", "--seconds=1.5", "--seed=7", "--temperature=0.9")
    whole = subprocess.Popen(command(*flags, f"--out={tmp_path}/whole"))
    out = tmp_path / "stopped"
    process = subprocess.Popen(command(*flags, f"--out={out}"), stdout=subprocess.PIPE, text=True)
    record = out / "run.json"
    deadline = time.monotonic() + 120
    while not record.exists() or json.loads(record.read_text())["made_samples"] < 3000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "--resume" in told
    made = json.loads(record.read_text())["made_samples"]
    assert 3000 <= made < 24_000, "it was not stopped in the middle"
    assert sf.info(out / "000.wav").frames == made
    subprocess.run(command(f"--out={out}", "--resume"), check=True, timeout=120)
    assert whole.wait(timeout=120) == 0
    for name in ("000.wav", "001.wav", "000.codes", "001.codes"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    one, other = (json.loads((p / "001.json").read_text()) for p in (out, tmp_path / "whole"))
    assert one["nats_per_sample"] == pytest.approx(other["nats_per_sample"], rel=1e-9)


def test_files_can_be_played_at_any_moment_and_tell_their_bits(workdir, tmp_path, monkeypatch):
    out = tmp_path / "clips"
    seen, log_probs, append = [], [], Outputs.append

    def watch(self, codes, scores):
        append(self, codes, scores)
        log_probs.append(scores[0])
        pcm = audio_of(self.path(0, ".wav"))
        stored = np.fromfile(self.path(0, ".codes"), np.uint8)
        np.testing.assert_array_equal(pcm, quantisers.get("mulaw").decode(stored))
        seen.append(pcm.size)

    monkeypatch.setattr(Outputs, "append", watch)
    run(f"--workdir={workdir}", "--seconds=0.2", "--plots", f"--out={out}")
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert seen[-1] == 3200
    beside = json.loads((out / "000.json").read_text())
    assert beside["bits_per_sample"] == pytest.approx(
        -np.concatenate(log_probs).mean() / np.log(2), rel=1e-5
    )
    assert beside["step"] == 3
    assert beside["quantiser"] == "mulaw"
    assert beside["settings"]["seconds"] == 0.2
    assert (out / "000.png").stat().st_size > 10_000


def audio_of(path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_prompts_come_first_and_take_turns(workdir, tmp_path, tone):
    other = tmp_path / "other.flac"
    sf.write(other, np.random.default_rng(0).normal(0, 0.1, 44_100), 44_100)
    out = tmp_path / "clips"
    run(
        f"--workdir={workdir}", "--prompt", tone, str(other), "--num=3", "--prompt_seconds=0.125",
        "--seconds=0.05", f"--out={out}",
    )  # fmt: skip
    mulaw = quantisers.get("mulaw")
    for clip, source in enumerate((tone, str(other), tone)):
        pcm = audio_of(out / f"{clip:03d}.wav")
        assert pcm.size == 2000 + 800
        expected = mulaw.decode(mulaw.encode(audio.read(source)[:2000]))
        np.testing.assert_array_equal(pcm[:2000], expected)
        told = json.loads((out / f"{clip:03d}.json").read_text())
        assert (told["prompt"], told["prompt_samples"]) == (source, 2000)
        assert told["generated_samples"] == 800
    assert (audio_of(out / "000.wav")[2000:] != audio_of(out / "002.wav")[2000:]).any()


class FakeSplit(Split):
    """Recordings of given lengths whose samples tell where they are from."""

    dataset, name = "fake", "test"

    def __init__(self, *lengths: int):
        self.recordings = [
            type("Recording", (), {"name": f"r{i}", "num_samples": n})()
            for i, n in enumerate(lengths)
        ]

    def read(self, recording, start, count):
        assert start + count <= self.recordings[recording].num_samples
        return (1000 * recording + np.arange(start, start + count) // 16).astype(np.int16)


def test_prompts_of_a_split_are_spread_over_it_with_their_originals(
    workdir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(prompts, "open_data", lambda *_: FakeSplit(5000, 2100, 9000))
    flags = [f"--workdir={workdir}", "--prompt_split=test", "--prompt_seconds=0.1"]
    out = tmp_path / "clips"
    run(*flags, "--num=4", "--seconds=0.05", f"--out={out}")
    firsts = []
    for clip in range(4):
        original = audio_of(out / f"{clip:03d}_original.wav")
        assert original.size == 2400
        np.testing.assert_allclose(
            audio_of(out / f"{clip:03d}.wav")[:1600], original[:1600], rtol=0.03, atol=5
        )
        firsts.append(original[0] // 1000)
    assert firsts == [0, 2, 2, 2]  # 2601, 0 and 6601 places to start at
    told = "no recording of fake test is as long"
    run(*flags, "--seconds=9", f"--out={tmp_path}/no", fails=told, capsys=capsys)


def test_resume_can_ask_for_more_and_only_that(workdir, tmp_path, capsys):
    out, long = tmp_path / "short", tmp_path / "long"
    run(f"--workdir={workdir}", "--seconds=0.05", f"--out={out}")
    run(f"--workdir={workdir}", "--seconds=0.1", f"--out={long}")
    run(f"--out={out}", "--resume", "--seconds=0.1")
    assert (out / "000.wav").read_bytes() == (long / "000.wav").read_bytes()
    told = "--resume continues with --seed=0, got 4"
    run(f"--out={out}", "--resume", "--seed=4", fails=told, capsys=capsys)


def test_what_was_written_past_the_record_is_cut_off(tmp_path):
    shared = {"quantiser": "linear"}
    codes = np.arange(200, dtype=np.uint8).reshape(2, 100)
    outputs = Outputs.create(tmp_path / "o", {}, shared, ["", ""], codes)
    outputs.append(codes[:, :50], np.full((2, 50), -2.0, np.float32))
    with outputs.path(0, ".codes").open("ab") as file:
        file.write(b"more")
    with outputs.path(1, ".wav").open("ab") as file:
        file.write(b"more")
    outputs.lock.release()
    again = Outputs.resume(tmp_path / "o")
    assert again.made == 150
    np.testing.assert_array_equal(again.codes(90, 120), np.hstack([codes, codes])[:, 90:120])
    assert outputs.path(0, ".codes").stat().st_size == 150
    assert audio_of(outputs.path(1, ".wav")).size == 150
    assert again.describe(1)["nats_per_sample"] == 2.0


def test_a_full_disk_keeps_what_was_made(tmp_path):
    codes = np.zeros((1, 1000), np.uint8)
    outputs = Outputs.create(tmp_path / "o", {}, {"quantiser": "mulaw"}, [""], codes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"can't be written.*--resume"):
            outputs.append(np.zeros((1, 2000), np.uint8), np.zeros((1, 2000), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert audio_of(outputs.path(0, ".wav")).size == 1000
    outputs.lock.release()
    again = Outputs.resume(tmp_path / "o")
    again.append(np.zeros((1, 2000), np.uint8), np.zeros((1, 2000), np.float32))
    assert audio_of(outputs.path(0, ".wav")).size == 3000


def test_bad_input_is_one_line_and_leaves_nothing(workdir, tmp_path, tone, capsys):
    out = tmp_path / "out"
    quiet, text = tmp_path / "quiet.wav", tmp_path / "text.wav"
    sf.write(quiet, np.repeat([0.0, 0.5], 4000), 16_000)
    text.write_text("not audio")
    base = [f"--workdir={workdir}", f"--out={out}"]
    for flags, told in (
        (["--out=x"], "--workdir is missing"),
        ([f"--workdir={workdir}"], "--out is missing"),
        ([f"--workdir={tmp_path}", f"--out={out}"], "holds no checkpoints"),
        ([*base, "--step=9"], "has no step 9; it has 3"),
        ([*base, "--temperature=-1"], "--temperature must be"),
        ([*base, "--top_k=300"], "--top_k must be"),
        ([*base, "--top_p=0"], "--top_p must be"),
        ([*base, "--num=0"], "--num must be at least 1"),
        ([*base, "--seconds=0"], "--seconds must be"),
        ([*base, "--seconds=1e9"], "--seconds must be"),
        ([*base, "--stride_patches=5"], "--stride_patches must be from 1 to the context's 4"),
        ([*base, "--prompt", tone, "--prompt_seconds=1"], "lasts 0.25 seconds, too short"),
        ([*base, "--prompt", str(quiet), "--prompt_seconds=0.2"], "silent for the first 0.2"),
        ([*base, "--prompt", str(text)], "can't be read as audio"),
        ([*base, "--prompt", str(tmp_path / "none.wav")], "none.wav"),
        ([*base, "--prompt", tone, str(quiet)], "set with --prompt_seconds"),
        ([*base, "--prompt", tone, tone, "--num=1"], "--num=1 is less than the 2 prompts"),
        ([*base, "--prompt", tone, "--prompt_split=test"], "use one of them"),
        ([*base, "--prompt_split=test"], "--prompt_split needs --prompt_seconds"),
        ([f"--out={out}", "--resume"], "holds no run to resume"),
    ):
        run(*flags, fails=told, capsys=capsys)
        assert not out.exists(), flags
    out.mkdir()
    (out / "run.json").write_text("{")
    run(*base, fails="already holds run.json", capsys=capsys)
    run(f"--out={out}", "--resume", fails="is damaged", capsys=capsys)


@pytest.mark.parametrize(("largest", "code", "told"), [(1e-6, 0, "pass"), (1e-2, 1, "FAIL")])
def test_check_says_pass_or_fail_by_its_exit_code(
    largest, code, told, workdir, tone, monkeypatch, capsys
):
    def check(evaluator, params, codes, **_):
        np.testing.assert_array_equal(codes, quantisers.get("mulaw").encode(audio.read(tone)))
        return Consistency(largest, largest, 10, 240, 1, 1e-3)

    monkeypatch.setattr(generate, "check", check)
    with pytest.raises(SystemExit) as caught:
        generate.main([f"--workdir={workdir}", "--check", "--prompt", tone])
    assert caught.value.code == code
    assert capsys.readouterr().out.startswith(told)
