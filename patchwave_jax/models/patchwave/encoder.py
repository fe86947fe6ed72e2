"""The patch encoder: strided convolutions, the same ones dilated at every offset, or cached.

Dimensions as in `patchwave_jax.models.patchwave.model`; `k` taps of a layer, `d` its dilation,
`F` filters.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models import ring
from patchwave_jax.models.layers import Key, split, value
from patchwave_jax.models.patchwave.config import PatchWaveConfig


class EncoderState(NamedTuple):
    """Newest inputs of each layer of `B` streams; the newest sample is not encoded yet."""

    codes: UInt8[Array, "B 2k"]  # ring
    layers: list[Float[Array, "B d K F"]]  # rings of every d-th input, after the first layer


class Encoder(nnx.Module):
    """Convolutions and a linear layer: the samples of a patch to one vector.

    There is no padding, and all is aligned to the newest sample of a patch. Besides the token each
    form gives the skip connection: projections of the newest output of every layer (None without
    `skip_connections`).
    """

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

    def patch(
        self, codes: UInt8[Array, "B P"], key: Key = None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"] | None]:
        """The patch form: encodes one patch with strides."""
        tokens, skip = self._convolve(codes, 1, True, key)
        return tokens[:, 0], None if skip is None else skip[:, 0]

    def every_offset(
        self, codes: UInt8[Array, "B T"], count: int, key: Key = None
    ) -> tuple[Float[Array, "B n D"], Float[Array, "B n D"] | None]:
        """The dense form: encodes the `count` patches that end at the newest `count` samples."""
        return self._convolve(codes, count, False, key)

    def _convolve(
        self, codes: Array, count: int, strided: bool, key: Key
    ) -> tuple[Array, Array | None]:
        config, keys = self.config, split(key, len(self.convs))
        needed = config.receptive_field + count - 1
        x, skip = self.inputs(codes[:, codes.shape[1] - needed :]), None
        for i, (stride, dilation) in enumerate(zip(config.strides, self._dilations, strict=False)):
            stride, dilation = (stride, 1) if strided else (1, dilation)
            x = convolve(x, value(self.convs[i].kernel), stride, dilation)
            x = self._activate(i, x)
            x = self.dropout(x, deterministic=key is None, rngs=keys[i])
            skip = self._add_skip(i, skip, x[:, x.shape[1] - count :])
        kernel = value(self.linear.kernel).reshape(config.final_frames, -1, config.width)
        tokens = convolve(x, kernel, 1, 1 if strided else self._dilations[-1])
        return (tokens + value(self.linear.bias)).astype(x.dtype), skip

    @property
    def _dilations(self) -> list[int]:
        """Samples between the inputs of each layer, the linear one last."""
        strides = self.config.strides
        return [math.prod(strides[:i]) for i in range(len(strides) + 1)]

    def _activate(self, i: int, x: Array) -> Array:
        return jax.nn.relu(x + value(self.convs[i].bias).astype(x.dtype))

    def _add_skip(self, i: int, skip: Array | None, x: Array) -> Array | None:
        if not self.config.skip_connections:
            return None
        return self.skips[i](x) + (0 if skip is None else skip)

    # Generation, one sample at a time.

    def init_state(self, rows: int) -> EncoderState:
        """A state of `rows` streams to be primed."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        kernels = [*[config.kernel_size] * (len(config.filters) - 1), config.final_frames]
        return EncoderState(
            jnp.full((rows, 2 * config.kernel_size), quantisers.SILENCE, jnp.uint8),
            [
                jnp.zeros((rows, dilation, 2 * kernel, filters), dtype)
                for kernel, dilation, filters in zip(
                    kernels, self._dilations[1:], config.filters, strict=True
                )
            ],
        )

    def prime(
        self, codes: UInt8[Array, "B R"], state: EncoderState, position: Int32[Array, ""]
    ) -> EncoderState:
        """The state before sample `position - 1`, from a receptive field of samples before it.

        `state` gives the shapes.
        """
        layers, x = [], self.inputs(codes[:, 1:])
        for i, buffer in enumerate(state.layers):
            dilation = self._dilations[i]
            x = self._activate(i, convolve(x, value(self.convs[i].kernel), 1, dilation))
            layers.append(_phased(x, buffer, position - 1))
        newest = codes[:, codes.shape[1] - self.config.kernel_size :]
        return EncoderState(ring.from_newest(newest, position - 1), layers)

    def step(
        self, state: EncoderState, code: UInt8[Array, " B"], position: Int32[Array, ""]
    ) -> tuple[EncoderState, Float[Array, "B D"], Float[Array, "B D"] | None]:
        """Token and skip of the patch that ends with `code`, the sample before `position`."""
        time, skip, layers = position - 1, None, []
        codes = ring.put(state.codes, time, code)
        taps = self.inputs(ring.newest(codes, time, self.config.kernel_size))
        for i, buffer in enumerate(state.layers):
            x = self._activate(i, _newest_output(taps, value(self.convs[i].kernel)))
            skip = self._add_skip(i, skip, x)
            buffer, taps = _put_phased(buffer, time, x)
            layers.append(buffer)
        token = _newest_output(taps, value(self.linear.kernel)) + value(self.linear.bias)
        return EncoderState(codes, layers), token.astype(taps.dtype), skip


library = functools.partial(
    lax.conv_general_dilated, padding="VALID", dimension_numbers=("NWC", "WIO", "NWC")
)


def convolve(
    x: Float[Array, "B T C"], kernel: Float[Array, "k C F"], stride: int, dilation: int
) -> Float[Array, "B n F"]:
    """A convolution without padding, in the form that is fast where it runs (docs/speed.md)."""
    kernel = kernel.astype(x.dtype)
    plain = functools.partial(library, window_strides=(stride,), rhs_dilation=(dilation,))
    if dilation > 1:  # on a GPU the library's gradient takes ten times as long
        phases = functools.partial(by_phases, dilation=dilation)
        return lax.platform_dependent(x, kernel, cuda=phases, default=plain)
    if stride > 1:  # on a CPU a stride's gradient is slow
        blocks = functools.partial(by_blocks, stride=stride)
        return lax.platform_dependent(x, kernel, cpu=blocks, default=plain)
    return plain(x, kernel)


def by_phases(
    x: Float[Array, "B T C"], kernel: Float[Array, "k C F"], dilation: int
) -> Float[Array, "B n F"]:
    """A dilated convolution, where samples `dilation` apart are a row of their own."""
    rows, samples, channels = x.shape
    outputs = samples - (kernel.shape[0] - 1) * dilation
    x = jnp.pad(x, ((0, 0), (0, -samples % dilation), (0, 0)))
    x = x.reshape(rows, -1, dilation, channels).swapaxes(1, 2)
    y = library(x.reshape(rows * dilation, -1, channels), kernel, (1,))
    y = y.reshape(rows, dilation, -1, kernel.shape[2]).swapaxes(1, 2)
    return y.reshape(rows, -1, kernel.shape[2])[:, :outputs]


def by_blocks(
    x: Float[Array, "B T C"], kernel: Float[Array, "k C F"], stride: int
) -> Float[Array, "B n F"]:
    """A strided convolution as one over blocks of `stride` samples."""
    taps, channels, filters = kernel.shape
    outputs, blocks = (x.shape[1] - taps) // stride + 1, -(-taps // stride)
    length = (outputs + blocks - 1) * stride
    x = jnp.pad(x, ((0, 0), (0, max(0, length - x.shape[1])), (0, 0)))[:, :length]
    x = x.reshape(x.shape[0], -1, stride * channels)
    kernel = jnp.pad(kernel, ((0, blocks * stride - taps), (0, 0), (0, 0)))
    return library(x, kernel.reshape(blocks, stride * channels, filters), (1,))


def _newest_output(taps: Float[Array, "B *k F"], kernel: Array) -> Float[Array, "B D"]:
    """The one output of a convolution whose inputs are `taps`."""
    flat = taps.reshape(taps.shape[0], -1)
    return flat @ kernel.reshape(flat.shape[1], -1).astype(flat.dtype)


# Rings of a dilated layer's inputs, [B, d, K = 2k, F]: time t is in ring t % d, at its time t // d.


def _phased(
    x: Float[Array, "B T F"], buffer: Float[Array, "B d K F"], position: Array
) -> Float[Array, "B d K F"]:
    """A buffer like `buffer` of the inputs `x` of the times up to `position - 1`."""
    rows, dilation, double, filters = buffer.shape
    size = double // 2 * dilation
    x = jnp.pad(x, ((0, 0), (size, 0), (0, 0)))[:, x.shape[1] :]
    x = jnp.roll(x, position % size, 1).reshape(rows, double // 2, dilation, filters)
    return jnp.tile(jnp.swapaxes(x, 1, 2), (1, 1, 2, 1))


def _put_phased(
    buffer: Float[Array, "B d K F"], time: Array, x: Float[Array, "B F"]
) -> tuple[Float[Array, "B d K F"], Float[Array, "B 1 K//2 F"]]:
    """Stores the input of one time; gives it and the `k - 1` before it, `d` apart, oldest first."""
    rows, dilation, double, filters = buffer.shape
    phase, place = time % dilation, time // dilation % (double // 2)
    for at in (place, place + double // 2):
        buffer = lax.dynamic_update_slice(buffer, x[:, None, None], (0, phase, at, 0))
    shape = (rows, 1, double // 2, filters)
    return buffer, lax.dynamic_slice(buffer, (0, phase, place + 1, 0), shape)
