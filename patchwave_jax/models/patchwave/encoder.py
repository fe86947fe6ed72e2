"""The patch encoder: strided convolutions, or the same ones dilated, at every offset.

Dimensions as in `patchwave_jax.models.patchwave.model`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, UInt8

from patchwave_jax.config import PatchWaveConfig
from patchwave_jax.data import quantisers
from patchwave_jax.models.layers import Key, split, value


class Encoder(nnx.Module):
    """Strided convolutions and one linear layer: a patch's samples to a vector."""

    def __init__(self, config: PatchWaveConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        features = config.embedding_width if config.input == "embedding" else 1
        if config.input == "embedding":
            self.embed = nnx.Embed(quantisers.NUM_CODES, features, dtype=dtype, rngs=rngs)
        he = nnx.initializers.he_normal()
        convs, skips = [], []
        for filters in config.filters:
            convs.append(
                nnx.Conv(
                    features, filters, config.kernel_size, kernel_init=he, dtype=dtype, rngs=rngs
                )
            )
            skips.append(nnx.Linear(filters, config.width, use_bias=False, dtype=dtype, rngs=rngs))
            features = filters
        self.convs = nnx.List(convs)
        if config.skip_connections:
            self.skips = nnx.List(skips)
        self.linear = nnx.Linear(
            config.final_frames * features, config.width, dtype=dtype, rngs=rngs
        )
        self.dropout = nnx.Dropout(config.conv_dropout)

    def inputs(self, codes: UInt8[Array, "B T"]) -> Float[Array, "B T C"]:
        """Codes as the companded waveform in [-1, 1), or embedded."""
        if self.config.input == "embedding":
            return self.embed(codes.astype(jnp.int32))
        scaled = (codes.astype(jnp.float32) - quantisers.SILENCE) / quantisers.SILENCE
        return scaled[..., None].astype(self.config.compute_dtype)

    def __call__(
        self, codes: UInt8[Array, "B T"], hop: int, count: int, key: Key = None
    ) -> tuple[Float[Array, "B n D"], Float[Array, "B n D"] | None]:
        """Encodes the `count` patches that end `hop` samples apart, the last at the last sample.

        `hop = 0` encodes one patch with its strides (the patch form). Otherwise layer l, whose
        cumulative stride is S, needs its features on a grid of gcd(S, hop) samples only.
        """
        config = self.config
        need = config.receptive_field + max(count - 1, 0) * hop
        x, skip, grid = self.inputs(codes[:, codes.shape[1] - need :]), None, 1
        keys = split(key, len(self.convs))
        for i, conv in enumerate(self.convs):
            before, after = math.prod(config.strides[:i]), math.prod(config.strides[: i + 1])
            if hop:
                finer = math.gcd(after, hop)
                stride, dilation = finer // grid, before // grid
                grid = finer
            else:
                stride, dilation = config.strides[i], 1
            bias = value(conv.bias).astype(x.dtype)
            x = jax.nn.relu(convolve(x, value(conv.kernel), stride, dilation) + bias)
            x = self.dropout(x, deterministic=key is None, rngs=keys[i])
            if config.skip_connections:
                step = hop // grid if hop else 1
                newest = x[:, x.shape[1] - 1 - (count - 1) * step :: step]
                skip = self.skips[i](newest) + (0 if skip is None else skip)
        kernel = value(self.linear.kernel).reshape(config.final_frames, -1, config.width)
        dilation = math.prod(config.strides) // grid if hop else 1
        tokens = convolve(x, kernel, max(hop // grid, 1), dilation) + value(self.linear.bias)
        return tokens.astype(x.dtype), skip


def convolve(x, kernel, stride: int, dilation: int):
    """A convolution without padding: [B, T, C] with [k, C, F]."""
    kernel = kernel.astype(x.dtype)
    library = functools.partial(
        lax.conv_general_dilated,
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    if stride == 1 or dilation > 1:
        return library(x, kernel, (stride,), rhs_dilation=(dilation,))

    def by_blocks(x, kernel):
        """The same sums over blocks of `stride` samples: a stride's gradient is slow on CPUs."""
        taps, channels, filters = kernel.shape
        outputs, blocks = (x.shape[1] - taps) // stride + 1, -(-taps // stride)
        length = (outputs + blocks - 1) * stride
        x = jnp.pad(x, ((0, 0), (0, max(0, length - x.shape[1])), (0, 0)))[:, :length]
        x = x.reshape(x.shape[0], -1, stride * channels)
        kernel = jnp.pad(kernel, ((0, blocks * stride - taps), (0, 0), (0, 0)))
        return library(x, kernel.reshape(blocks, stride * channels, filters), (1,))

    strided = functools.partial(library, window_strides=(stride,))
    return lax.platform_dependent(x, kernel, cpu=by_blocks, default=strided)
