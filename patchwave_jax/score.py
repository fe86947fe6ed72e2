"""Bits per sample of any audio: `python -m patchwave_jax.score --workdir=DIR FILE...`.

Files are read and scored in blocks, so memory does not grow with their length. Audio other than
16 kHz mono is converted, and the output says so. `--npz=DIR` also writes, per file,

    log_probs  float32 [T], nats, of every sample at 16 kHz
    codes      uint8 [T], what the model saw
    quantiser, stride_patches, step

The protocol is that of `patchwave_jax.evaluation.protocol`; a file is one clip.
"""

import contextlib
import dataclasses
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from jaxtyping import Float32, Int16, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import audio, quantisers
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.evaluator import Evaluator, load
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.evaluation.protocol import Window, segment
from patchwave_jax.flags import argument_parser
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.storage import replacing

COPY_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of one file."""

    nll_nats: float
    samples: int
    source_rate: int
    source_channels: int

    def __str__(self) -> str:
        converted = ""
        if (self.source_rate, self.source_channels) != (audio.SAMPLE_RATE, 1):
            plural = "s" * (self.source_channels > 1)
            converted = (
                f", converted from {self.source_rate / 1000:g} kHz, {self.source_channels} "
                f"channel{plural} to {audio.SAMPLE_RATE / 1000:g} kHz mono"
            )
        bits = self.nll_nats / LN2
        seconds = self.samples / audio.SAMPLE_RATE
        return f"{bits:.4f} bits ({self.nll_nats:.4f} nats) per sample, {seconds:.1f} s{converted}"


def score_file(
    evaluator: Evaluator,
    params: Any,
    path: Path,
    stride: int,
    npz: Path | None = None,
    step: int = 0,
) -> Score:
    """Scores one file; with `npz`, writes log-probabilities and codes of every sample there.

    Raises:
      UserError: if the file can't be read as audio.
    """
    quantiser = quantisers.get(evaluator.config.data.quantiser)
    total, samples = 0.0, 0
    with _Sink(npz) as sink:
        blocks = sink.keep(encoded(path, quantiser))
        windows = stream(blocks, evaluator.config, stride)
        for window, log_probs, _ in evaluator.score_segments(params, windows):
            total -= float(log_probs.sum(dtype=np.float64))
            samples += log_probs.size
            sink.write(window.first, log_probs)
        sink.finish(samples, quantiser=quantiser.name, stride_patches=stride, step=step)
    info = sf.info(path)
    return Score(total / samples, samples, info.samplerate, info.channels)


def encoded(path: Path, quantiser: quantisers.Quantiser) -> Iterator[UInt8[np.ndarray, " _"]]:
    """A file's codes in blocks. `sashimi` reads the file twice, first for its extremes."""
    if quantiser.name != "sashimi":
        yield from map(quantiser.encode, audio.blocks(path))
        return
    low, high = np.int16(32767), np.int16(-32768)
    for pcm in audio.blocks(path):
        low, high = min(low, pcm.min(initial=low)), max(high, pcm.max(initial=high))
    extremes: Int16[np.ndarray, 2] = np.array([low, high], np.int16)
    for pcm in audio.blocks(path):
        yield quantiser.encode(np.concatenate([pcm, extremes]))[: pcm.size]


def stream(
    blocks: Iterable[UInt8[np.ndarray, " _"]], config: Config, stride: int
) -> Iterator[tuple[Window, UInt8[np.ndarray, " S"]]]:
    """The windows of `protocol.plan`, with their codes, over a clip of unknown length.

    Holds one block and one window at a time.
    """
    size, patches = config.window_unit, config.window_units
    codes, begin = np.empty(0, np.uint8), 0  # of the clip, from its sample `begin` on
    first, newest = 0, patches
    for block in blocks:
        codes = np.concatenate([codes, block])
        while begin + codes.size >= first + newest * size:
            window = Window(0, first, first + newest * size, patches, newest)
            yield window, segment(window, codes, config, begin)
            first, newest = window.end, stride
            needed = max(0, first + (stride - patches) * size - config.history)
            codes, begin = codes[needed - begin :], needed
    if (end := begin + codes.size) > first:
        if first == 0 and config.causal:
            patches = newest = -(-end // size)
        window = Window(0, first, end, patches, newest)
        yield window, segment(window, codes, config, begin)


class _Sink:
    """Writes an .npz in constant memory: raw temporary files first, then one zip."""

    def __init__(self, path: Path | None):
        self._path = path

    def __enter__(self) -> "_Sink":
        with contextlib.ExitStack() as stack:
            if self._path is not None:
                folder = self._path.parent
                self._log_probs = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                self._codes = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, blocks: Iterable[UInt8[np.ndarray, " _"]]) -> Iterator[np.ndarray]:
        """Yields the blocks, and keeps their codes."""
        for block in blocks:
            if self._path is not None:
                self._codes.write(block.tobytes())
            yield block

    def write(self, first: int, log_probs: Float32[np.ndarray, " n"]) -> None:
        """Log-probabilities of the samples from `first` on, in any order."""
        if self._path is not None:
            self._log_probs.seek(4 * first)
            self._log_probs.write(log_probs.astype("<f4").tobytes())

    def finish(self, samples: int, **about: str | int) -> None:
        if self._path is None:
            return
        with (
            replacing(self._path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        ):
            for name, dtype, raw in (
                ("log_probs", "<f4", self._log_probs),
                ("codes", "|u1", self._codes),
            ):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": dtype, "fortran_order": False, "shape": (samples,)}
                    np.lib.format.write_array_header_1_0(member, header)
                    raw.seek(0)
                    shutil.copyfileobj(raw, member, COPY_BYTES)
            for name, value in about.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.asarray(value), allow_pickle=False)


def npz_paths(files: list[Path], folder: Path | None, overwrite: bool) -> list[Path | None]:
    """Where each file's .npz goes. Raises `UserError` if two would share one, or one exists."""
    if folder is None:
        return [None] * len(files)
    if not folder.is_dir():
        raise UserError(f"--npz={folder} is not a folder; create it first")
    paths: dict[Path, Path] = {}
    for file in files:
        path = folder / f"{file.stem}.npz"
        if path in paths:
            raise UserError(
                f"{paths[path]} and {file} would both be written to {path}; score them separately"
            )
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists; give --overwrite to replace it, or another folder")
        paths[path] = file
    return list(paths)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line and scores file after file."""
    parser = argument_parser("score", __doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="wav, flac, mp3, ogg")
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", type=int, help="checkpoint; default: the best on validation")
    parser.add_argument(
        "--stride_patches",
        type=int,
        help="patches a window advances by; default: half the context ('dense'), 1 ('last')",
    )
    parser.add_argument("--npz", type=Path, metavar="DIR", help="also write every log-probability")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    args = parser.parse_args(argv)
    for file in args.files:
        if not file.is_file():
            raise UserError(f"{file} is not a file")
    paths = npz_paths(args.files, args.npz, args.overwrite)
    if not distributed.is_first():
        paths = [None] * len(paths)

    evaluator, params, step = load(args.workdir, args.step)
    config = evaluator.config
    stride = args.stride_patches
    stride = protocol.default_stride(config) if stride is None else stride
    protocol.check_stride(stride, config)
    print(
        f"{args.workdir}, step {step}: context up to {config.context_samples:,} samples, "
        f"stride {stride} of {config.window_units} patches, quantiser {config.data.quantiser}"
    )
    nats, samples = 0.0, 0
    for file, npz in zip(args.files, paths, strict=True):
        score = score_file(evaluator, params, file, stride, npz, step)
        print(f"{file}: {score}{f', {npz}' if npz else ''}", flush=True)
        nats, samples = nats + score.nll_nats * score.samples, samples + score.samples
    if len(args.files) > 1:
        mean = nats / samples
        print(f"all: {mean / LN2:.4f} bits ({mean:.4f} nats) per sample, {samples:,} samples")


if __name__ == "__main__":
    distributed.run(main)
