"""Malformed input of every kind is refused with one line, exit code 2 and no traceback.

The cases are tables of inputs and messages. Where the message is None, the input is unusual but
valid.
"""

import os
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from small_run import make_config, make_data, make_run, tones

from patchwave_jax import evaluate, generate, score
from patchwave_jax import train as train_module
from patchwave_jax.data import build as build_module

# ml_collections loads a configuration with a deprecated function
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
ROOT = Path(__file__).parent.parent


def refused(main: Callable, arguments: list[str], capsys, lines: int = 1) -> str:
    """The message of `main` when it refuses `arguments`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr().err
    errors = [line for line in output.splitlines() if not line.startswith(("WARNING", "W0", "I0"))]
    assert exit_.value.code == 2, output
    assert "Traceback" not in output
    assert len(errors) <= lines, output
    return output


# --- audio


def pcm(samples: int = 4_000) -> np.ndarray:
    return tones(samples, 1)


def written(**options) -> Callable[[Path], None]:
    data = options.pop("data", None)
    rate, channels = options.pop("rate", 16_000), options.pop("channels", 1)

    def make(path: Path) -> None:
        content = pcm() if data is None else data
        content = np.stack([content] * channels, 1) if channels > 1 else content
        sf.write(path, content, rate, **options)

    return make


def header(
    *,
    samples: int = 4_000,
    declared: int | None = None,
    rate: int = 16_000,
    channels: int = 1,
    bits: int = 16,
    kind: int = 1,
    riff: bytes = b"RIFF",
    wave: bytes = b"WAVE",
    fmt_size: int = 16,
    align: int | None = None,
) -> Callable[[Path], None]:
    """A WAV file whose header may be wrong."""

    def make(path: Path) -> None:
        body = pcm(samples).tobytes()
        size = len(body) if declared is None else declared
        block = (channels * bits // 8 if align is None else align) % 2**16
        fmt = struct.pack(
            "<4sIHHIIHH",
            b"fmt ",
            fmt_size,
            kind,
            channels,
            rate,
            (rate * block) % 2**32,
            block,
            bits,
        )
        start = struct.pack("<4sI4s", riff, (36 + size) % 2**32, wave)
        path.write_bytes(start + fmt + struct.pack("<4sI", b"data", size) + body)

    return make


def holds(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


NOISE = np.random.default_rng(0).bytes(5_000)
BROKEN = "can't be read as audio|is truncated|declares no samples"

AUDIO: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    # name: file name, how to make it, message
    "text": ("x.wav", holds(b"This is not audio.\n" * 300), BROKEN),
    "zeros": ("x.wav", holds(bytes(5_000)), BROKEN),
    "noise mp3": ("x.mp3", holds(bytes(5_000)), BROKEN),
    "magic and size": ("x.wav", holds(b"RIFF\xff\xff\xff\x7fWAVE"), BROKEN),
    "magic and noise": ("x.wav", holds(b"RIFF\x00\x10\x00\x00WAVE" + NOISE), BROKEN),
    "flac magic and noise": ("x.flac", holds(b"fLaC" + NOISE), BROKEN),
    "ogg magic and noise": ("x.ogg", holds(b"OggS" + NOISE), BROKEN),
    "rf64 without sizes": ("x.wav", holds(b"RF64\xff\xff\xff\xffWAVEds64"), BROKEN),
    "rf64 with short sizes": (
        "x.wav",
        holds(b"RF64\xff\xff\xff\xffWAVEds64\x02\x00\x00\x00ab"),
        BROKEN,
    ),
    "one short of a patch": ("x.wav", header(samples=1_999), r"is too short: 0\.125 s"),
    "just a patch": ("x.wav", header(samples=2_000), None),
    "far too loud": ("x.wav", written(data=pcm() * 9.0, subtype="FLOAT"), None),
    "float64": ("x.wav", written(subtype="DOUBLE"), None),
    "24 bit": ("x.flac", written(subtype="PCM_24"), None),
    "8 bit": ("x.wav", written(subtype="PCM_U8"), None),
    "mu-law": ("x.wav", written(subtype="ULAW"), None),
    "384 kHz": ("x.wav", written(rate=384_000, data=pcm(100_000)), None),
    "8 kHz": ("x.wav", written(rate=8_000), None),
    "32 channels": ("x.wav", written(channels=32), None),
    "rate 0": ("x.wav", header(rate=0), "sample rate of 0|" + BROKEN),
    "rate 1": ("x.wav", header(rate=1), "sample rate of 1 Hz, not one of 1000 to 768000"),
    "rate 2**31-1": ("x.wav", header(rate=2**31 - 1), "sample rate of 2147483647|" + BROKEN),
    "0 channels": ("x.wav", header(channels=0), BROKEN),
    "65535 channels": ("x.wav", header(channels=65_535), BROKEN + "|too short"),
    "0 bits": ("x.wav", header(bits=0), BROKEN),
    "7 bits": ("x.wav", header(bits=7), None),
    "unknown codec": ("x.wav", header(kind=0x7777), BROKEN),
    "block size 0": ("x.wav", header(align=0), None),
    "huge fmt chunk": ("x.wav", header(fmt_size=2**32 - 1), BROKEN),
    "2 GiB declared": ("x.wav", header(samples=500, declared=2**31), "is truncated"),
    "1 byte more declared": ("x.wav", header(declared=8_001), "is truncated"),
    "0 declared": ("x.wav", header(declared=0), "declares no samples"),
    "not a wave": ("x.wav", header(wave=b"WEAV"), BROKEN),
    "a flac called wav": ("x.wav", written(data=pcm(60_000), format="FLAC"), None),
    "a link to itself": ("x.wav", lambda p: p.symlink_to(p), "can't be read: Too many levels"),
    "a dead link": ("x.wav", lambda p: p.symlink_to("gone.wav"), "can't be read: No such file"),
    "a pipe": ("x.wav", os.mkfifo, "is not a regular file"),
    "a folder called wav": ("x.wav", lambda p: p.mkdir(), None),
    "a newline in its name": ("a\nb.wav", holds(NOISE), r"a\\nb\.wav: can't be read"),
    "a terminal's codes in its name": ("\x1b[2J.wav", holds(NOISE), r"\\x1b\[2J\.wav: can't"),
    "a newline, and sound": ("a\nb.wav", written(), None),
    "unicode": ("Prélude №1 – 雨だれ 🎹.wav", written(), None),
    "a leading dash": ("--overwrite.wav", written(), None),
    "spaces": (" .. .wav", written(), None),
    "a name that is not UTF-8": (os.fsdecode(b"\xff\xfe.wav"), header(), "not UTF-8; rename it"),
    "a long name": ("x" * 250 + ".wav", holds(NOISE), BROKEN),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("good")
    for split in ("train", "validation", "test"):
        (source / split).mkdir()
        sf.write(source / split / "good.wav", tones(2_100, 0), 16_000)
    return source


@pytest.mark.parametrize("case", AUDIO)
def test_audio(case, good, tmp_path, capsys):
    name, make, expected = AUDIO[case]
    source = tmp_path / "source"
    for split in ("train", "validation", "test"):
        (source / split).mkdir(parents=True)
        (source / split / "good.wav").symlink_to(good / split / "good.wav")
    path = source / "train" / name
    make(path)
    flags = ["--dataset=audio_folder", f"--source={source}", f"--data_dir={tmp_path / 'data'}"]
    if expected is None:
        build_module.main(flags)
        return
    message = refused(build_module.main, flags, capsys, lines=3)
    assert message.startswith("error: 1 of 4 files can't be used:\n")
    line = message.splitlines()[1]
    assert re.search(expected, line), line
    build_module.main([*flags, "--skip_bad"])
    assert "1 files skipped" in capsys.readouterr().out


# --- configurations


def config_file(text: str) -> Callable[[Path], str]:
    def make(directory: Path) -> str:
        path = directory / "config.py"
        path.write_text(text)
        return f"--config={path}"

    return make


DEMO = f"--config={ROOT / 'configs/demo.py'}"
MODEL, TRAIN, RUN, DATA = "--config.model.", "--config.train.", "--config.run.", "--config.data."

FLAGS: list[tuple[str, str]] = [
    # types
    (TRAIN + "batch_size=abc", "batch_size"),
    (TRAIN + "batch_size=1.5", "batch_size"),
    (TRAIN + "batch_size=None", "batch_size"),
    (TRAIN + "learning_rate=fast", "learning_rate"),
    (TRAIN + "learning_rate=True", "learning_rate"),
    (MODEL + "strides=2", "strides must be a tuple|strides must have one entry"),
    (MODEL + "strides=(2.5,2,2,2)", "strides"),
    (MODEL + "skip_connections=maybe", "skip_connections"),
    (DATA + "skip_damaged=3", "skip_damaged"),
    # signs and ranges
    (TRAIN + "batch_size=0", "config.train.batch_size must be at least 1, got 0"),
    (TRAIN + "batch_size=99999999999", "config.train.batch_size must be below"),
    (TRAIN + "learning_rate=nan", "config.train.learning_rate must be finite"),
    (TRAIN + "learning_rate=-1e-3", "config.train.learning_rate must be at least 0"),
    (TRAIN + "learning_rate=0", "config.train.learning_rate must be above 0"),
    (TRAIN + "beta2=1", "config.train.beta2 must be below 1"),
    (TRAIN + "clip_norm=-1", "config.train.clip_norm must be at least 0"),
    (TRAIN + "warmup_steps=-1", "config.train.warmup_steps must be at least 0"),
    (TRAIN + "schedule=linear", "config.train.schedule must be one of drop, cosine"),
    (RUN + "log_every_steps=0", "config.run.log_every_steps must be at least 1"),
    (RUN + "phase_chunk=7", "config.run.phase_chunk 7 does not divide"),
    (RUN + "encode_chunk_patches=-1", "config.run.encode_chunk_patches must be at least 0"),
    (MODEL + "patch_samples=7", "config.model.patch_samples 7 is too short"),
    (MODEL + "kernel_size=600", "config.model.patch_samples 500 is too short"),
    (MODEL + "strides=()", "config.model.strides must have one entry"),
    (MODEL + "strides=(0,0,0,0)", "config.model.strides must be at least 1"),
    (MODEL + "filters=(64,64,64,-32)", "config.model.filters must be at least 1"),
    (MODEL + "width=63", "config.model.width must be even"),
    (MODEL + "num_layers=-1", "config.model.num_layers must be at least 0"),
    (MODEL + "mlp_dropout=1", "config.model.mlp_dropout must be below 1"),
    (MODEL + "mlp_dropout=-0.1", "config.model.mlp_dropout must be at least 0"),
    (MODEL + "head=gaussian", "config.model.head must be one of softmax, logistic_mixture"),
    (MODEL + "input=fft", "config.model.input must be one of waveform, embedding"),
    (MODEL + "compute_dtype=float16", "config.model.compute_dtype must be one of"),
    (MODEL + "predictor_taps=501", "config.model.predictor_taps 501 is more than"),
    (DATA + "quantiser=alaw", "config.data.quantiser must be one of mulaw"),
    (DATA + "dataset=mp3s", "'mp3s' is unknown; use one of piano_demo"),
    (DATA + "dataset=maestro", "maestro is not built in .*; build it: python -m"),
    (DATA + "distinct_positions=-1", "config.data.distinct_positions must be at least 0"),
    (DATA + "gain_db=-6", "config.data.gain_db must be at least 0"),
    (DATA + "gain_db=1e9", "config.data.gain_db must be at most"),
    (DATA + "pitch_semitones=500", "config.data.pitch_semitones must be at most"),
    ("--config.seed=-1", r"config.seed must be in \[0, 2\*\*31\)"),
    ("--config.seed=2147483648", r"config.seed must be in \[0, 2\*\*31\)"),
    ("--config.objective=both", "config.objective must be one of last, dense"),
    ("--config.context_samples=499", "not a whole number of patches .*nearest is 500"),
    ("--config.context_samples=8001", "not a whole number of patches .*nearest is 8000"),
    ("--config.context_samples=99999999999500", "config.context_samples must be above 0 and below"),
    # names
    ("--config.nosuch=1", "nosuch"),
    (TRAIN + "learning_rat=1", "learning_rat"),
    ("--config.train=5", "train"),
    ("--nosuch=1", "nosuch"),
    ("stray", "unknown argument 'stray'"),
    ("--workdir", "workdir"),
]

FILES: dict[str, tuple[Callable[[Path], str], str]] = {
    "none": (lambda _: "--config=", "config"),
    "missing": (lambda d: f"--config={d}/gone.py", "config"),
    "a folder": (lambda d: f"--config={d}", "config"),
    "an argument that is unknown": (
        lambda _: f"--config={ROOT / 'configs/ctx128k.py'}:dens",
        "dens is unknown; use FILE.py or FILE.py:dense",
    ),
    "not Python": (config_file("This is no Python.\n"), "SyntaxError|invalid syntax"),
    "binary": (lambda d: config_file("")(d) + str((d / "config.py").write_bytes(NOISE))[:0], ""),
    "empty": (config_file(""), "get_config"),
    "raises": (config_file("def get_config():\n    raise KeyError('mine')\n"), "mine"),
    "returns nothing": (config_file("def get_config():\n    pass\n"), "config"),
    "returns a number": (config_file("def get_config():\n    return 3\n"), "config|int"),
    "imports what is not there": (config_file("import nosuchmodule\n"), "nosuchmodule"),
    "lacks fields": (
        config_file(
            "import ml_collections\n"
            "def get_config():\n    return ml_collections.ConfigDict({'seed': 1})\n"
        ),
        "config.objective is missing",
    ),
}


@pytest.mark.parametrize(("flag", "expected"), FLAGS)
def test_a_configuration(flag, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATCHWAVE_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    message = refused(train_module.main, [DEMO, flag], capsys)
    assert re.search(expected, message), message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_file(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("config_config", None)  # else ml_collections extends the previous one
    make, expected = FILES[case]
    message = refused(train_module.main, [make(tmp_path)], capsys)
    assert re.search(expected, message), message


def test_no_configuration(capsys):
    assert "--config is missing" in refused(train_module.main, [], capsys)


# --- working directories and the other commands


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    data = make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))
    workdir = tmp_path_factory.mktemp("run")
    make_run(workdir, make_config(data))
    (workdir / "checkpoints/notes.txt").write_text("mine")
    (workdir / "checkpoints/old").mkdir()
    (workdir / "checkpoints/7.orbax-checkpoint-tmp").mkdir()
    (workdir / "metrics.jsonl").write_bytes(NOISE)
    return workdir


def test_stray_files_in_a_workdir_are_ignored(run, capsys):
    evaluate.main([f"--workdir={run}", "--split=test"])
    assert "bits" in capsys.readouterr().out
    assert (run / "checkpoints/notes.txt").exists()


COMMANDS: list[tuple[Callable, list[str], str]] = [
    (evaluate.main, ["--workdir={run}/gone", "--split=test"], "holds no checkpoints; train there"),
    (evaluate.main, ["--workdir={run}/metrics.jsonl", "--split=test"], "holds no checkpoints"),
    (evaluate.main, ["--workdir={run}", "--split=tset"], "tset"),
    (evaluate.main, ["--workdir={run}", "--split=test", "--step=7"], "has no step 7; it has 3"),
    (
        evaluate.main,
        ["--workdir={run}", "--split=test", "--json={run}"],
        "exists; give --overwrite",
    ),
    (score.main, ["--workdir={run}", "{run}/gone.wav"], "gone.wav is not a file"),
    (score.main, ["--workdir={run}", "{run}"], "is not a file"),
    (score.main, ["--workdir={run}", "{run}/metrics.jsonl"], "can't be read as audio"),
    (generate.main, ["--workdir={run}", "--out={run}/metrics.jsonl"], "can't write in .*--out"),
    (generate.main, ["--workdir={run}", "--out=/proc/nosuch/out"], "can't write in .*--out"),
    (generate.main, ["--out={run}", "--resume"], "holds no run to resume"),
    (generate.main, ["--workdir={run}", "--seconds=nan", "--out={out}"], "seconds"),
    (generate.main, ["--workdir={run}", "--seconds=-1", "--out={out}"], "seconds"),
    (generate.main, ["--workdir={run}", "--temperature=inf", "--out={out}"], "temperature"),
    (generate.main, ["--workdir={run}", "--num=0", "--out={out}"], "num"),
    (generate.main, ["--workdir={run}", "--prompt", "{run}", "--out={out}"], "not a regular file"),
    (build_module.main, ["--dataset=audio_folder", "--source={run}/gone"], "is not a folder"),
    (build_module.main, ["--dataset=youtube_mix", "--source={run}"], "has no numbered audio"),
]


@pytest.mark.parametrize(("main", "flags", "expected"), COMMANDS)
def test_a_command(main, flags, expected, run, tmp_path, capsys):
    flags = [flag.format(run=run, out=tmp_path / "out") for flag in flags]
    message = refused(main, flags, capsys)
    assert re.search(expected, message), message


@pytest.mark.parametrize("content", ["", "no", "-1", "\x00"])
def test_an_invalid_step(content, run, capsys):
    """argparse refuses a `--step` of a wrong type, with usage and one line."""
    flags = [f"--workdir={run}", "--split=test", f"--step={content}"]
    assert "step" in refused(evaluate.main, flags, capsys, lines=12)
