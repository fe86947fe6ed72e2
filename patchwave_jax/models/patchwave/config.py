"""The configuration of the patch model, with the paper's as its defaults."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from flax import nnx
from jaxtyping import Int64

from patchwave_jax.errors import require
from patchwave_jax.models.base import Execution, Memory, Model, ModelConfig
from patchwave_jax.models.patchwave import cost
from patchwave_jax.models.predictors.adaptive import AdaptivePredictors
from patchwave_jax.models.predictors.bank import PredictorBank
from patchwave_jax.models.predictors.kalman import Denoiser


@dataclasses.dataclass(frozen=True)
class PatchWaveConfig(ModelConfig):
    """The patch model: everything that shapes its parameters, and its dropout."""

    published_parameters: ClassVar[str] = "3.14M"
    latent_size: ClassVar[int] = 6  # levels of a plan
    kind: str = "patchwave"
    patch_samples: int = 2000  # P
    kernel_size: int = 7
    filters: tuple[int, ...] = (256, 256, 128, 128, 32)
    strides: tuple[int, ...] = (2, 3, 2, 3, 2)  # the paper: "alternating between 2 and 3"
    width: int = 128  # D
    num_layers: int = 3
    num_heads: int = 8  # H
    head_size: int = 128  # K; only heads as wide as the model give the paper's 3.14M parameters
    mlp_width: int = 256
    readout_width: int = 1024
    input: str = "waveform"  # 'waveform': the code as a number; 'embedding': a learned vector
    embedding_width: int = 32
    skip_connections: bool = False  # the newest output of every encoder layer, to the readout
    head: str = "softmax"  # 'softmax' or 'logistic_mixture'
    mixture_components: int = 8
    predictor_taps: int = 64  # samples the mixture's learned linear predictor sees
    adaptive_taps: tuple[int, ...] = ()  # orders of the adaptive linear predictors; (): none
    adaptive_windows: tuple[int, ...] = ()  # samples each is fitted to
    adaptive_block_samples: int = 100  # samples between refits; divides the patch
    denoiser_taps: int = 0  # order of the denoiser in front of them; 0: none
    denoiser_window: int = 0  # samples it is fitted to
    plan_block_samples: int = 0  # samples whose levels are drawn before them (0: no plan)
    conv_dropout: float = 0.2
    mlp_dropout: float = 0.2
    head_dropout: float = 0.2
    token_dropout: float = 0.1  # whole tokens, at the input and after every layer
    compute_dtype: str = "float32"  # or 'bfloat16'; parameters, norms, softmax, loss: float32

    @property
    def final_frames(self) -> int:
        """Time steps that the last convolution leaves of a patch."""
        frames = self.patch_samples
        for stride in self.strides:
            frames = (frames - self.kernel_size) // stride + 1
        return frames

    @property
    def receptive_field(self) -> int:
        """Samples of a patch that its token depends on, always the newest ones."""
        field, step = 1, 1
        for stride in self.strides:
            field += (self.kernel_size - 1) * step
            step *= stride
        return field + (self.final_frames - 1) * step

    @property
    def linear_taps(self) -> int:
        """Taps of the mixture's learned linear predictor, which starts from least squares."""
        learned = self.head == "logistic_mixture" and not self.plan_block_samples
        return self.predictor_taps if learned else 0

    def predictor_bank(self, quantiser: str) -> PredictorBank:
        """The predictors that the mixture is built around. A new kind is added here."""
        block, predictors = self.adaptive_block_samples, []
        if self.adaptive_taps:
            denoiser = None
            if self.denoiser_taps:
                denoiser = Denoiser(self.denoiser_taps, self.denoiser_window, block)
            sizes = self.adaptive_taps, self.adaptive_windows
            predictors.append(AdaptivePredictors(*sizes, block, denoiser))
        return PredictorBank(tuple(predictors), block, quantiser)

    def readout_inputs(self, quantiser: str) -> int:
        """Width of what the readout reads: a token, and the head's features."""
        bank = self.predictor_bank(quantiser)
        planned = 2 * self.latent_size + 2 if self.plan_block_samples else 0
        return self.width + planned + (bank.num_features if self.head == "logistic_mixture" else 0)

    # The contract.

    def build(self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs) -> Model:
        from patchwave_jax.models.patchwave.model import PatchWave

        return PatchWave(self, quantiser=quantiser, causal=causal, execution=execution, rngs=rngs)

    @property
    def latent_block(self) -> int:
        return self.plan_block_samples

    def window_unit(self, context_samples: int) -> int:
        return self.patch_samples

    def history(self, causal: bool) -> int:
        return self.patch_samples

    def training_window(self, context_samples: int, causal: bool) -> int:
        return context_samples + (self.patch_samples if causal else 1)

    def context_of(self, index: Int64[np.ndarray, " n"], older: int) -> Int64[np.ndarray, " n"]:
        return older + (index // self.patch_samples + 1) * self.patch_samples

    def context_for(self, samples: int, context_samples: int, causal: bool) -> int:
        needed = -(-samples // self.patch_samples) * self.patch_samples
        return min(context_samples, needed) if causal else context_samples

    def execution(
        self, context_samples: int, causal: bool, rows: int, memory: Memory, **chosen: Any
    ) -> Execution:
        return cost.execution(self, context_samples, causal, rows, memory, **chosen)

    def shared_axes(self, context_samples: int, causal: bool) -> dict[str, int]:
        axes = {"patches": context_samples // self.patch_samples, "phases": self.patch_samples}
        return axes if causal and not self.plan_block_samples else {}

    def useful_flops(self, context_samples: int, causal: bool) -> float:
        return sum(cost.useful_flops(self, context_samples, causal).values())

    # What is checked.

    def check(self, context_samples: int, causal: bool) -> None:
        for name, names in (
            ("input", ("waveform", "embedding")),
            ("head", ("softmax", "logistic_mixture")),
        ):
            value = getattr(self, name)
            require(
                value in names,
                f"model.{name}",
                f"must be one of {', '.join(names)}, got {value!r}",
            )
        require(self.width % 2 == 0, "model.width", f"must be even, got {self.width}")
        require(
            0 < len(self.strides) == len(self.filters),
            "model.strides",
            f"must have one entry for each of the {len(self.filters)} model.filters",
        )
        size = self.patch_samples
        require(
            self.final_frames >= 1,
            "model.patch_samples",
            f"{size} is too short for model.strides {self.strides}",
        )
        require(
            self.predictor_taps <= size,
            "model.predictor_taps",
            f"{self.predictor_taps} is more than model.patch_samples, {size}",
        )
        self._check_predictors(causal)
        if self.plan_block_samples:
            self._check_plan()
        require(
            context_samples > 0 and context_samples % size == 0,
            "context_samples",
            f"{context_samples} is not a whole number of patches of {size} samples; "
            f"the nearest is {max(1, round(context_samples / size)) * size}",
        )

    def _check_plan(self) -> None:
        block, grid = self.plan_block_samples, self.adaptive_block_samples
        require(
            bool(self.adaptive_taps),
            "model.plan_block_samples",
            "needs adaptive predictors, whose errors are planned: set model.adaptive_taps",
        )
        require(
            block > 1 and block % grid == 0 and self.patch_samples % block == 0,
            "model.plan_block_samples",
            f"must be a multiple of model.adaptive_block_samples, {grid}, that divides "
            f"model.patch_samples, {self.patch_samples}; got {block}",
        )

    def _check_predictors(self, causal: bool) -> None:
        taps, windows = self.adaptive_taps, self.adaptive_windows
        require(
            len(taps) == len(windows),
            "model.adaptive_windows",
            f"must have one entry for each of the {len(taps)} model.adaptive_taps",
        )
        if not taps:
            return
        fits = [("model.adaptive_windows", *pair) for pair in zip(taps, windows, strict=True)]
        if self.denoiser_taps:
            require(self.denoiser_taps > 1, "model.denoiser_taps", "must be 0, or at least 2")
            fits.append(("model.denoiser_window", self.denoiser_taps, self.denoiser_window))
        for name, count, window in fits:
            minimum = max(2 * count, 33)  # the taper falls over 32
            require(
                minimum <= window,
                name,
                f"{window} samples are too few to fit {count} taps to; give at least {minimum}",
            )
        require(
            self.head == "logistic_mixture" and causal,
            "model.adaptive_taps",
            "needs config.model.head='logistic_mixture' and config.objective='dense'",
        )
        block = self.adaptive_block_samples
        require(
            self.patch_samples % block == 0,
            "model.adaptive_block_samples",
            f"{block} does not divide the patch of {self.patch_samples}",
        )
