"""The configuration of the patch model, with the paper's as its defaults."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PatchWaveConfig:
    """The patch model: everything that shapes its parameters, and its dropout."""

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
    adaptive_taps: tuple[int, ...] = ()  # of the mixture's adaptive linear predictors; (): none
    adaptive_windows: tuple[int, ...] = ()  # samples each is fitted to
    adaptive_block_samples: int = 100  # they are fitted anew every so many; divides the patch
    denoiser_taps: int = 0  # of the filter against the codes' noise before them; 0: none
    denoiser_window: int = 0  # samples it is fitted to
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
