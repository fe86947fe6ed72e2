"""The configuration: typed, with the paper's recipe as its defaults.

`patchwave_jax.config_dict` makes it of what a file in `configs/` and the command line give.
"""

import dataclasses

from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.models.sashimi import SaShiMiConfig
from patchwave_jax.models.wavenet import WaveNetConfig

OBJECTIVES = ("last", "dense")


Baseline = WaveNetConfig | SampleRNNConfig | SaShiMiConfig
MODELS: dict[str, type] = {  # by `kind`; the patch model has none
    "wavenet": WaveNetConfig,
    "samplernn": SampleRNNConfig,
    "sashimi": SaShiMiConfig,
}


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


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The recipe."""

    batch_size: int = 40  # windows or segments of one step, over all devices
    micro_batch_size: int = 8  # rows a device computes at once, at most; 0: all it has
    hop: int = 1  # 'dense' only: a target at every hop-th sample; divides the patch
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
    shard_parameters: bool = False  # split them and their moments over all devices; larger models
    debug_nans: bool = False  # stop at the operation that makes a NaN; slow


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    objective: str = "last"  # 'last': one target a window, bidirectional; 'dense': all, causal
    context_samples: int = 128_000  # T, a whole number of patches
    seed: int = 0
    model: PatchWaveConfig | Baseline = dataclasses.field(default_factory=PatchWaveConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    @property
    def is_baseline(self) -> bool:
        return not isinstance(self.model, PatchWaveConfig)

    @property
    def patch_model(self) -> PatchWaveConfig:
        """The model of a run that is no baseline's."""
        if not isinstance(self.model, PatchWaveConfig):
            raise TypeError(f"{self.model.kind} has no patches")
        return self.model

    @property
    def patch_samples(self) -> int:
        """P, the step that windows are measured in: a baseline's have two."""
        return self.context_samples // 2 if self.is_baseline else self.patch_model.patch_samples

    @property
    def patches(self) -> int:
        """N, the tokens of one context."""
        return self.context_samples // self.patch_samples

    @property
    def window_samples(self) -> int:
        """Samples of one row of a batch: the context and its target, or a segment."""
        if self.objective == "last":
            return self.context_samples + 1
        return self.context_samples + (0 if self.is_baseline else self.patch_samples)

    @property
    def silent_samples(self) -> int:
        """So many before the first target are silence in every other row, as they are of a clip."""
        return self.window_samples - self.context_samples if self.objective == "dense" else 0

    @property
    def segments(self) -> int:
        """Steps that walk through a row of a batch, from the carried state of one to the next."""
        if isinstance(self.model, SampleRNNConfig):
            return self.context_samples // self.model.segment_samples
        return 1

    @property
    def targets_per_row(self) -> int:
        """Of one step."""
        if self.objective == "last":
            return 1
        return self.context_samples // self.segments // self.train.hop
