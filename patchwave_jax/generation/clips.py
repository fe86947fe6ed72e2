"""The files of a generation run: `000.wav`, `000.codes` and `000.json` per clip, and `run.json`.

`NNN.codes` holds the clip's 8-bit codes, one byte each, from which the audio is decoded and which
`--resume` continues. All files grow together by appending; `run.json` records how much of them is
valid and is replaced last, in one rename. So whatever stops a run, the files up to that point are
valid, and a WAV file can be played at any time.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int16, UInt8

import patchwave_jax
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.runtime.storage import Lock, write_atomically

RECORD = "run.json"
WAV_HEADER_BYTES = 44
MAX_SAMPLES = 2**31 - 2**16  # of a clip: what a WAV header can express, 37 hours


def wav_header(num_samples: int) -> bytes:
    """The header of a WAV file of `num_samples` 16-bit samples, mono, 16 kHz."""
    data_bytes = 2 * num_samples
    riff = struct.pack("<4sI4s", b"RIFF", WAV_HEADER_BYTES - 8 + data_bytes, b"WAVE")
    layout = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    return riff + layout + struct.pack("<4sI", b"data", data_bytes)


def write_wav(path: Path, pcm: Int16[np.ndarray, " T"]) -> None:
    with _says_what_failed(path):
        path.write_bytes(wav_header(pcm.size) + pcm.astype("<i2").tobytes())


class Outputs:
    """The files of one run. `record` is what `run.json` holds:

    settings: the user's settings.
    shared: what all clips share: checkpoint, quantiser, context.
    clips: for each, its prompt and the sum of its samples' -log p in nats.
    prompt_samples, made_samples: in each clip; the prompt is included in made_samples.
    """

    def __init__(self, directory: Path, record: dict[str, Any], lock: Lock):
        """Use `create` or `resume`."""
        self.directory, self.record, self.lock = directory, record, lock
        self._quantiser = quantisers.get(record["shared"]["quantiser"])

    @property
    def made(self) -> int:
        """Samples of each clip, prompt included."""
        return self.record["made_samples"]

    def path(self, clip: int, suffix: str) -> Path:
        return self.directory / f"{clip:03d}{suffix}"

    @classmethod
    def create(
        cls,
        directory: Path,
        settings: dict[str, Any],
        shared: dict[str, Any],
        prompts: list[str],
        codes: UInt8[np.ndarray, "B T"],
    ) -> "Outputs":
        """New files that hold the prompts, which `prompts` describes.

        Raises:
          UserError: if the directory already holds such files, or can't be written.
        """
        lock = Lock(directory, "--out")
        with _says_what_failed(directory):
            there = [p.name for p in directory.iterdir() if p.suffix in (".wav", ".codes")]
        there += [RECORD] * (directory / RECORD).exists()
        if there:
            raise UserError(f"{directory} already holds {there[0]}; use another --out or --resume")
        record = {
            "settings": settings,
            "shared": shared | {"code_version": patchwave_jax.__version__},
            "clips": [{"prompt": prompt, "nats": 0.0} for prompt in prompts],
            "prompt_samples": codes.shape[1],
            "made_samples": 0,
        }
        outputs = cls(directory, record, lock)
        for clip in range(len(prompts)):
            write_wav(outputs.path(clip, ".wav"), np.zeros(0, np.int16))
            with _says_what_failed(outputs.path(clip, ".codes")):
                outputs.path(clip, ".codes").touch()
        outputs.append(codes, np.zeros(codes.shape, np.float32))
        return outputs

    @classmethod
    def resume(cls, directory: Path) -> "Outputs":
        """The files of a stopped run, truncated to what its record says is valid.

        Raises:
          UserError: if there is no run, or its files are damaged.
        """
        path = directory / RECORD
        try:
            record = json.loads(path.read_text())
            outputs = cls(directory, record, Lock(directory, "--out"))
            made, clips = record["made_samples"], range(len(record["clips"]))
        except FileNotFoundError:
            raise UserError(f"{directory} holds no run to resume: no {RECORD}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); start again in another --out") from error
        for clip in clips:
            for suffix, size in ((".codes", made), (".wav", WAV_HEADER_BYTES + 2 * made)):
                file = outputs.path(clip, suffix)
                with _says_what_failed(file):
                    if file.stat().st_size < size:
                        raise UserError(f"{file} is shorter than {RECORD} says; start again")
                    os.truncate(file, size)
                    if suffix == ".wav":
                        with file.open("r+b") as wav:
                            wav.write(wav_header(made))
        return outputs

    def codes(self, first: int, end: int) -> UInt8[np.ndarray, "B n"]:
        """The codes of samples `first` to `end` of all clips."""
        clips = range(len(self.record["clips"]))
        return np.stack(
            [
                np.fromfile(self.path(clip, ".codes"), np.uint8, end - first, offset=first)
                for clip in clips
            ]
        )

    def append(
        self, codes: UInt8[np.ndarray, "B n"], log_probs: Float32[np.ndarray, "B n"]
    ) -> None:
        """Adds samples to all clips.

        Raises:
          UserError: if they can't be written; what was there before stays valid.
        """
        made = self.made + codes.shape[1]
        sums = log_probs.sum(1, dtype=np.float64)
        for clip, row in enumerate(codes):
            with _says_what_failed(path := self.path(clip, ".codes")), path.open("r+b") as file:
                file.seek(self.made)
                file.write(row.tobytes())
            pcm = self._quantiser.decode(row).astype("<i2")
            with _says_what_failed(path := self.path(clip, ".wav")), path.open("r+b") as file:
                file.seek(WAV_HEADER_BYTES + 2 * self.made)
                file.write(pcm.tobytes())
                file.flush()
                file.seek(0)
                file.write(wav_header(made))
        clips = [
            entry | {"nats": entry["nats"] - float(total)}
            for entry, total in zip(self.record["clips"], sums, strict=True)
        ]
        record = self.record | {"clips": clips, "made_samples": made}
        self._replace(self.directory / RECORD, record)
        self.record = record
        for clip in range(len(clips)):
            self._replace(self.path(clip, ".json"), self.describe(clip))

    def describe(self, clip: int) -> dict[str, Any]:
        """The content of the JSON file of a clip."""
        record, entry = self.record, self.record["clips"][clip]
        generated = self.made - record["prompt_samples"]
        nats = entry["nats"] / generated if generated else None
        return {
            "prompt": entry["prompt"],
            "prompt_samples": record["prompt_samples"],
            "generated_samples": generated,
            "stream": clip,
            "nats_per_sample": nats,  # of the generated samples, under the model at temperature 1
            "bits_per_sample": None if nats is None else nats / LN2,
            **record["shared"],
            "settings": record["settings"],
        }

    def _replace(self, path: Path, content: dict[str, Any]) -> None:
        with _says_what_failed(path):
            write_atomically(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def _says_what_failed(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror or error}. What was made before is kept; "
            "free some space, then continue with --resume"
        ) from error
