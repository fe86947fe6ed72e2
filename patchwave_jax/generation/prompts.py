"""The settings of a generation run, and the audio that it continues."""

import dataclasses

import numpy as np
from jaxtyping import Int16, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import audio, quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import Split, open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.errors import UserError
from patchwave_jax.generation.clips import MAX_SAMPLES
from patchwave_jax.generation.sampling_params import SamplingParams

# Flags in the commands that `train` and `report` suggest: noise is rarer than at temperature 1.
CONTINUATION = (
    "--prompt_split=validation --prompt_seconds=4 --seconds=4 --temperature=0.9 --top_p=0.98"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that determines the audio; stored beside it for `--resume`."""

    workdir: str
    step: int | None = None
    num: int = 1
    seconds: float = 10.0
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stride_patches: int | None = None
    prompt: list[str] = dataclasses.field(default_factory=list)
    prompt_seconds: float | None = None
    prompt_split: str | None = None
    data_dir: str | None = None

    def sampling(self) -> SamplingParams:
        return SamplingParams(self.seed, self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Raises `UserError` for invalid settings, before anything is loaded."""
        self.sampling().check()
        if self.num < 1:
            raise UserError(f"--num must be at least 1, got {self.num}")
        for name in ("seconds", "prompt_seconds"):
            value = getattr(self, name)
            if value is not None and not 1 / SAMPLE_RATE <= value <= MAX_SAMPLES / SAMPLE_RATE:
                most = MAX_SAMPLES // SAMPLE_RATE
                raise UserError(f"--{name} must be from one sample to {most} seconds, got {value}")
        if self.seconds + (self.prompt_seconds or 0) > MAX_SAMPLES / SAMPLE_RATE:
            raise UserError(f"--seconds: a clip can't last more than {MAX_SAMPLES // SAMPLE_RATE}")
        if self.prompt and self.prompt_split:
            raise UserError("--prompt and --prompt_split: use one of them")
        if self.prompt_split and self.prompt_seconds is None:
            raise UserError("--prompt_split needs --prompt_seconds, the length of a prompt")
        if self.num < len(self.prompt):
            raise UserError(f"--num={self.num} is less than the {len(self.prompt)} prompts")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The beginning of a clip; `original` is its real continuation, if known."""

    source: str
    pcm: Int16[np.ndarray, " T"]
    original: Int16[np.ndarray, " S"] | None = None


def read_prompts(settings: Settings, config: Config) -> list[Prompt]:
    """The prompt of each clip, all of one length; empty without prompts.

    Raises:
      UserError: if a prompt can't be read, is too short or silent.
    """
    if settings.prompt_split:
        return _split_prompts(settings, open_data(settings, config, settings.prompt_split))
    if not settings.prompt:
        return [Prompt("silence", np.zeros(0, np.int16))] * settings.num
    pieces = [audio.read(path) for path in settings.prompt]
    lengths = [piece.size for piece in pieces]
    wanted = lengths[0]
    if settings.prompt_seconds is not None:
        wanted = round(settings.prompt_seconds * SAMPLE_RATE)
    elif len(set(lengths)) > 1:
        raise UserError(
            f"the prompts last {min(lengths) / SAMPLE_RATE:g} to {max(lengths) / SAMPLE_RATE:g} "
            "seconds; set with --prompt_seconds how much of each to use"
        )
    prompts = []
    for path, piece in zip(settings.prompt, pieces, strict=True):
        if piece.size < wanted:
            raise UserError(
                f"{path} lasts {piece.size / SAMPLE_RATE:g} seconds, too short for "
                f"--prompt_seconds={settings.prompt_seconds:g}"
            )
        if not piece[:wanted].any():
            raise UserError(
                f"{path} is silent for the first {wanted / SAMPLE_RATE:g} seconds; "
                "use another prompt or a longer --prompt_seconds"
            )
        prompts.append(Prompt(path, piece[:wanted]))
    return [prompts[i % len(prompts)] for i in range(settings.num)]


def _split_prompts(settings: Settings, split: Split) -> list[Prompt]:
    assert settings.prompt_seconds is not None
    length = round(settings.prompt_seconds * SAMPLE_RATE)
    total = length + round(settings.seconds * SAMPLE_RATE)
    starts = np.array([max(0, r.num_samples - total + 1) for r in split.recordings])
    if starts.sum() == 0:
        longest = max(r.num_samples for r in split.recordings) / SAMPLE_RATE
        raise UserError(
            f"no recording of {split.dataset} {split.name} is as long as a prompt and its "
            f"continuation, {total / SAMPLE_RATE:g} seconds; the longest lasts {longest:g}"
        )
    prompts = []
    for i in range(settings.num):
        place = int((i + 0.5) * starts.sum() / settings.num)
        recording = int(np.searchsorted(np.cumsum(starts), place, side="right"))
        start = place - int(starts[:recording].sum())
        pcm = split.read(recording, start, total)
        name = f"{split.dataset} {split.name}: {split.recordings[recording].name} from {start}"
        prompts.append(Prompt(name, pcm[:length], pcm))
    return prompts


def open_data(settings: Settings, config: Config, split: str) -> Split:
    """A split of the data that the model was trained on."""
    data_dir = settings.data_dir or config.data.data_dir or default_data_dir()
    ensure_built(config.data.dataset, data_dir)
    return open_split(data_dir, config.data.dataset, split)


def encode(prompts: list[Prompt], quantiser: str) -> UInt8[np.ndarray, "B T"]:
    pcm = np.stack([prompt.pcm for prompt in prompts])
    return quantisers.get(quantiser).encode(pcm) if pcm.size else pcm.astype(np.uint8)
