"""Reads any wav, flac, mp3 or ogg file as 16 kHz mono int16 PCM, in constant memory.

Channels are averaged, resampled with soxr, rounded and clipped. Audio that is 16 kHz mono 16 bit
already is returned bit for bit.
"""

import dataclasses
import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from jaxtyping import Int16

from patchwave_jax.errors import UserError, printable

SAMPLE_RATE = 16_000
SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
MIN_SAMPLES = 2000  # one patch, 125 ms
BLOCK_FRAMES = 1 << 18  # of one channel
RATES = range(1_000, 768_001)  # Hz; a wrong header could make resampling exhaust the memory

# Sizes that programs write into the WAV header of a stream, whose length is not known yet.
_STREAMING_SIZES = (0x7FFFF000, 0x7FFFFFFF, 0xFFFFFFFF)
_MAX_OGG_PAGE_BYTES = 65_307


class BadAudioError(UserError):
    """A file that can't be used. `reason` is the message without the file's path."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{printable(path)}: {reason}")
        self.path, self.reason = path, reason


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """Properties of a source file. `num_samples` is at 16 kHz."""

    sha256: str
    num_samples: int
    source_rate: int
    source_channels: int


def is_audio(path: Path) -> bool:
    """Whether `path` has the suffix of a supported format and is not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read(path: str | os.PathLike[str]) -> Int16[np.ndarray, " T"]:
    """The whole file as 16 kHz mono PCM.

    Raises:
      UserError: naming the file and the remedy, if it is unreadable, truncated, empty, shorter
        than 125 ms, entirely silent, or holds NaN or infinite samples.
    """
    return np.concatenate(list(blocks(path)))


def blocks(path: str | os.PathLike[str]) -> Iterator[Int16[np.ndarray, " _"]]:
    """The file as consecutive blocks of 16 kHz mono PCM.

    Raises:
      UserError: as `read`; some of these are only detected after the last block.
    """
    path = Path(path)
    _check_container(path)
    num_samples, peak = 0, 0
    for pcm in _decode(path):
        num_samples += pcm.size
        peak = max(peak, int(np.abs(pcm.astype(np.int32)).max(initial=0)))
        yield pcm
    if num_samples == 0:
        raise BadAudioError(path, "is empty: it has no samples; remove it or export it again")
    if num_samples < MIN_SAMPLES:
        seconds = num_samples / SAMPLE_RATE
        minimum = MIN_SAMPLES / SAMPLE_RATE
        raise BadAudioError(path, f"is too short: {seconds:.3f} s, at least {minimum} s are needed")
    if peak == 0:
        raise BadAudioError(path, "is silent for its whole length; remove it or export it again")


def scan(path: str | os.PathLike[str]) -> SourceInfo:
    """Reads the whole file and returns its `SourceInfo`.

    Raises:
      UserError: as `read`.
    """
    path = Path(path)
    num_samples = sum(pcm.size for pcm in blocks(path))
    info = sf.info(path)
    return SourceInfo(sha256(path), num_samples, info.samplerate, info.channels)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode(path: Path) -> Iterator[Int16[np.ndarray, " _"]]:
    frames_read = 0
    try:
        with open(path, "rb") as raw, sf.SoundFile(raw) as file:
            frames_declared = file.frames
            if file.samplerate not in RATES:
                raise BadAudioError(
                    path,
                    f"declares a sample rate of {file.samplerate} Hz, not one of {RATES[0]} to "
                    f"{RATES[-1]}; export it again",
                )
            block_frames = max(1, BLOCK_FRAMES // file.channels)
            resampler = None
            if file.samplerate != SAMPLE_RATE:
                resampler = soxr.ResampleStream(
                    file.samplerate, SAMPLE_RATE, 1, dtype="float64", quality="VHQ"
                )
            while True:
                block = file.read(block_frames, dtype="float64", always_2d=True)
                if not np.isfinite(block).all():
                    where = frames_read + int(np.argmin(np.isfinite(block).all(1)))
                    raise BadAudioError(
                        path,
                        f"contains a NaN or infinite sample at {where / file.samplerate:.3f} s; "
                        "repair it and export it as 16-bit PCM",
                    )
                frames_read += len(block)
                mono = block.mean(1) if len(block) else np.zeros(0)
                if resampler is not None:
                    mono = resampler.resample_chunk(mono, last=len(block) < block_frames)
                yield np.clip(np.round(mono * 32768), -32768, 32767).astype(np.int16)
                if len(block) < block_frames:
                    break
            bytes_reached, is_mp3 = raw.tell(), file.format == "MP3"
    except (sf.SoundFileError, RuntimeError) as error:  # soxr raises the latter
        detail = getattr(error, "error_string", str(error)).strip()
        raise BadAudioError(
            path,
            f"can't be read as audio ({detail}): it is damaged, truncated or of another format; "
            "fetch it again, or convert it to wav or flac",
        ) from error
    if frames_read < frames_declared:
        raise _truncated(path, f"{frames_read} of {frames_declared} declared frames")
    # Without a length header, libsndfile guesses an mp3's length from its first bit rate.
    if is_mp3 and bytes_reached < 0.9 * (size := path.stat().st_size):
        raise BadAudioError(
            path,
            f"has a variable bit rate and no length header, so only {bytes_reached} of its "
            f"{size} bytes can be read; convert it to flac (ffmpeg -i FILE OUT.flac)",
        )


def _truncated(path: Path, found: str) -> BadAudioError:
    return BadAudioError(path, f"is truncated: it holds {found}; fetch or export it again")


def _check_container(path: Path) -> None:
    """Finds truncation that libsndfile ignores: a WAV or OGG file that ends early."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block
            raise BadAudioError(path, "is not a regular file; replace it by the audio file")
        with open(path, "rb") as file:
            magic = file.read(4)
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                raise BadAudioError(path, "is empty (0 bytes); fetch or export it again")
            if magic in (b"RIFF", b"RF64"):
                _check_wav(path, file, size)
            elif magic == b"OggS":
                _check_ogg(path, file, size)
    except OSError as error:
        raise BadAudioError(path, f"can't be read: {error.strerror or error}") from error


def _check_wav(path: Path, file, size: int) -> None:
    file.seek(12)
    long_data_bytes = None
    while len(header := file.read(8)) == 8:
        name, declared = struct.unpack("<4sI", header)
        if name == b"ds64":  # RF64: the 64-bit sizes of the file and of its data
            if declared < 16 or len(sizes := file.read(16)) < 16:
                break
            long_data_bytes = struct.unpack("<QQ", sizes)[1]
            file.seek(declared - 16, os.SEEK_CUR)
            continue
        if name != b"data":
            file.seek(declared + declared % 2, os.SEEK_CUR)
            continue
        held = size - file.tell()
        if long_data_bytes is not None and declared == 0xFFFFFFFF:
            declared = long_data_bytes
        elif declared in _STREAMING_SIZES:
            return
        if declared == 0 and held > 1:
            raise BadAudioError(
                path,
                f"declares no samples but {held} bytes follow its header: the "
                "recording was never finished; convert it again (ffmpeg -i FILE OUT.wav)",
            )
        if held < declared:
            raise _truncated(path, f"{held} of {declared} bytes of audio")
        if held - declared >= 2**32:  # the size of the audio, modulo 2**32
            raise BadAudioError(
                path,
                "is over 4 GiB, more than a WAV header can declare, so only its start would be "
                "read; convert it to flac or RF64 (ffmpeg -i FILE -rf64 auto OUT.wav)",
            )
        return
    raise _truncated(path, "no audio data after its header")


def _check_ogg(path: Path, file, size: int) -> None:
    file.seek(max(0, size - 2 * _MAX_OGG_PAGE_BYTES))
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    is_last = len(page) >= 27 and page[5] & 4
    if not is_last or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise _truncated(path, "no end-of-stream page")
