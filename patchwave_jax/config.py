"""The configuration: typed, with the paper's recipe as its defaults.

`patchwave_jax.config_dict` makes it from what a file in `configs/` and the command line give.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx

from patchwave_jax.data import quantisers
from patchwave_jax.errors import require
from patchwave_jax.models.base import Execution, Model, ModelConfig
from patchwave_jax.models.megabyte import MegabyteConfig
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.models.sashimi import SaShiMiConfig
from patchwave_jax.models.wavenet import WaveNetConfig

# All models, by `kind`. A new one is a line here.
MODELS: dict[str, type[ModelConfig]] = {
    config.kind: config
    for config in (PatchWaveConfig, WaveNetConfig, SampleRNNConfig, SaShiMiConfig, MegabyteConfig)
}
OBJECTIVES = ("last", "dense")
ZERO_ALLOWED = {
    "seed", "num_layers", "distinct_positions", "micro_batch_size", "warmup_steps",
    "patience_evals", "eval_targets", "phase_chunk", "encode_chunk_patches",
    "sample_every_steps", "denoiser_taps", "plan_block_samples", "denoiser_window",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where windows come from."""

    dataset: str = "youtube_mix"  # youtube_mix, maestro, audio_folder or piano_demo
    data_dir: str = ""  # of datasets, or gs://; empty: $PATCHWAVE_DATA_DIR or the user's cache
    quantiser: str = "mulaw"  # mulaw, linear or sashimi
    skip_damaged: bool = False  # draw another window where the train split can't be read
    distinct_positions: int = 10_000_000  # windows of one epoch, fixed by the seed; 0: all
    gain_db: float = 0.0  # augmentation: gain, uniform in +- this
    pitch_semitones: float = 0.0  # augmentation: pitch by resampling, uniform in +- this

    def check(self) -> None:
        """Raises `UserError` naming the field that is wrong."""
        check_numbers("data", self)
        one_of("data.quantiser", self.quantiser, quantisers.NAMES)
        for name, value, most in (
            ("gain_db", self.gain_db, 60),
            ("pitch_semitones", self.pitch_semitones, 24),
        ):
            require(value <= most, f"data.{name}", f"must be at most {most}, got {value}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe."""

    batch_size: int = 40  # windows or segments of one step, over all devices
    micro_batch_size: int = 8  # rows a device computes at once, at most; 0: all it has
    num_steps: int = 1_000_000  # a limit; the paper stops when the validation loss is flat
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "drop"  # 'drop': to final_learning_rate at decay_steps; 'cosine': down to it
    decay_steps: int = 250_000
    final_learning_rate: float = 5e-6  # the paper: "0.5*1e-5"
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float = 0.0  # global gradient norm; 0: no clipping
    patience_evals: int = 10  # stop after so many validations without a gain past decay_steps
    max_minutes: float = 0.0  # end after so much training time ('cosine' only); 0: no limit

    def check(self) -> None:
        """Raises `UserError` naming the field that is wrong."""
        check_numbers("train", self)
        one_of("train.schedule", self.schedule, ("drop", "cosine"))
        rate = self.learning_rate
        require(rate > 0, "train.learning_rate", f"must be above 0, got {rate}")
        require(self.beta2 < 1, "train.beta2", f"must be below 1, got {self.beta2}")
        require(
            self.max_minutes == 0 or self.schedule == "cosine",
            "train.max_minutes",
            f"needs config.train.schedule='cosine', got {self.schedule!r}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What does not change what is learned."""

    log_every_steps: int = 10
    eval_every_steps: int = 1_000
    eval_targets: int = 1_000_000  # validation targets during training; 0: the whole split
    save_every_steps: int = 1_000
    keep_checkpoints: int = 2  # the newest ones; the best is kept besides
    sample_every_steps: int = 5_000  # between clips to listen to, in WORKDIR/samples; 0: none
    sample_seconds: float = 2.0  # of each of the two clips
    phase_chunk: int = 0  # phases the Transformer runs at once; 0: chosen for the memory
    encode_chunk_patches: int = 0  # patches the dense encoder runs at once; 0: chosen
    context_devices: int = 1  # that share each row of a batch ('dense' only); for long contexts
    debug_nans: bool = False  # stop at the operation that makes a NaN; slow

    def check(self, patch_samples: int, patches: int) -> None:
        """Raises `UserError` naming the field that is wrong."""
        check_numbers("run", self)
        for name, chunk, total in (
            ("phase_chunk", self.phase_chunk, patch_samples),
            ("encode_chunk_patches", self.encode_chunk_patches, patches),
        ):
            what = "phases" if name == "phase_chunk" else "patches"
            require(
                chunk == 0 or total % chunk == 0,
                f"run.{name}",
                f"{chunk} does not divide the {total} {what}",
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    objective: str = "last"  # 'last': one target a window, bidirectional; 'dense': all, causal
    context_samples: int = 128_000  # T, a whole number of patches
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=PatchWaveConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    @property
    def causal(self) -> bool:
        """Whether every sample of a window is a target, with only those before it in view."""
        return self.objective == "dense"

    @property
    def window_unit(self) -> int:
        """Samples of the unit that windows are counted in: a patch, or half a window."""
        return self.model.window_unit(self.context_samples)

    @property
    def window_units(self) -> int:
        """Units of one context: N, the tokens of the patch model."""
        return self.context_samples // self.window_unit

    @property
    def history(self) -> int:
        """Samples in front of a window that predictions in it may read."""
        return self.model.history(self.causal)

    @property
    def window_samples(self) -> int:
        """Samples of one row of a batch: the context and its target, or a segment."""
        return self.model.training_window(self.context_samples, self.causal)

    @property
    def silent_samples(self) -> int:
        """Samples zeroed before the first target of every second row, as they are of a clip."""
        return self.window_samples - self.context_samples if self.causal else 0

    @property
    def segments(self) -> int:
        """Steps that walk through a row of a batch, from the carried state of one to the next."""
        return self.model.segments(self.context_samples)

    @property
    def targets_per_step(self) -> int:
        """Targets of one training step, over all rows."""
        targets = self.context_samples // self.segments if self.causal else 1
        return self.train.batch_size * targets

    def build_model(self, rngs: nnx.Rngs, execution: Execution | None = None) -> Model:
        """The model, with new parameters."""
        return self.model.build(
            quantiser=self.data.quantiser,
            causal=self.causal,
            execution=execution or Execution(),
            rngs=rngs,
        )

    def abstract_model(self, execution: Execution | None = None) -> tuple[Any, Any]:
        """The model's graph definition and its parameters' shapes; nothing is computed."""
        execution = execution or Execution()
        return _abstract_model(self.model, self.data.quantiser, self.causal, execution)

    def check(self) -> None:
        """Raises `UserError` naming the field that is wrong."""
        one_of("objective", self.objective, OBJECTIVES)
        one_of("model.compute_dtype", self.model.compute_dtype, ("float32", "bfloat16"))
        check_numbers("model", self.model)
        self.data.check()
        self.train.check()
        require(
            0 < self.context_samples < 2**31,  # what a device counts in 32 bits
            "context_samples",
            f"must be above 0 and below 2**31, got {self.context_samples}",
        )
        require(0 <= self.seed < 2**31, "seed", f"must be in [0, 2**31), got {self.seed}")
        self.model.check(self.context_samples, self.causal)
        self.run.check(self.window_unit, self.window_units)


@functools.cache  # tracing the initialisation takes half a second
def _abstract_model(
    model: ModelConfig, quantiser: str, causal: bool, execution: Execution
) -> tuple[Any, Any]:
    def build() -> Model:
        return model.build(
            quantiser=quantiser, causal=causal, execution=execution, rngs=nnx.Rngs(0)
        )

    graphdef, params = nnx.split(nnx.eval_shape(build))
    return graphdef, params


def one_of(field: str, value: str, names: tuple[str, ...]) -> None:
    require(value in names, field, f"must be one of {', '.join(names)}, got {value!r}")


def check_numbers(section: str, part: Any) -> None:
    """Raises `UserError` for a number of a section that is negative, or 0 where it may not be."""
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f"{section}.{field.name}"
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, bool) or not isinstance(item, (int, float)):
                continue
            minimum = 0 if isinstance(item, float) or field.name in ZERO_ALLOWED else 1
            require(item >= minimum, name, f"must be at least {minimum}, got {item}")
            if isinstance(item, int) and field.name != "distinct_positions":
                require(item < 2**31, name, f"must be below 2**31, got {item}")
            if field.name.endswith("_dropout") or field.name == "dropout":
                require(item < 1, name, f"must be below 1, got {item}")
