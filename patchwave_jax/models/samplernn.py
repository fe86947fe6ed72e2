"""SampleRNN (Mehri et al. 2017) as SaShiMi's authors compare with it: 3 tiers, 35.03M parameters.

A tier of frames of `n` samples reads the `n` samples before each frame (as numbers of up to +-2)
and a conditioning vector from the slower tier, runs a GRU over the frames, and conditions each
frame of the next faster tier within. The fastest tier conditions a perceptron at every sample,
which also reads the embedded codes of the newest samples. Weights are normalised except those of
GRUs and of the embedding.

A clip is read in segments: `segment` takes the state of the samples before, so that training stops
gradients where segments meet (truncated backpropagation) and memory does not grow with the clip.

Dimensions: `B` batch, `T` samples, `S` frames, `H` width, `k` frames of the next faster tier (or
samples) in a frame, `L` samples that the slowest tier reads.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, UInt8

from patchwave_jax.data.quantisers import NUM_CODES, SILENCE
from patchwave_jax.errors import UserError
from patchwave_jax.models.base import Baseline, Execution, ModelConfig, log_prob
from patchwave_jax.models.layers import Key


@dataclasses.dataclass(frozen=True)
class SampleRNNConfig(ModelConfig):
    """The defaults are those of the published comparison."""

    published_parameters: ClassVar[str] = "35.03M"
    min_rows: ClassVar[int] = 8  # a step reads all weights for however few rows
    kind: str = "samplernn"
    frame_sizes: tuple[int, ...] = (8, 2, 2)  # the fastest tier's in samples, then in frames
    width: int = 1024
    embedding_width: int = 256
    segment_samples: int = 1024  # that gradients flow through
    compute_dtype: str = "float32"  # or 'bfloat16'; parameters, GRU states and logits: float32

    @property
    def frame_samples(self) -> tuple[int, ...]:
        """Samples of a frame of each tier."""
        return tuple(itertools.accumulate(self.frame_sizes, operator.mul))

    @property
    def lookback(self) -> int:
        """Samples that the slowest tier reads."""
        return self.frame_samples[-1]

    def check(self, context_samples: int, causal: bool) -> None:
        super().check(context_samples, causal)
        segment = self.segment_samples
        if not self.frame_sizes:
            raise UserError("config.model.frame_sizes must name a tier, such as '(8, 2, 2)'")
        if segment % self.lookback:
            raise UserError(
                f"config.model.segment_samples {segment} is not a multiple of {self.lookback}, the "
                f"frame of the slowest tier that config.model.frame_sizes {self.frame_sizes} give"
            )
        if context_samples % (2 * segment):
            raise UserError(
                f"config.context_samples {context_samples} is not a multiple of {2 * segment}, two "
                "segments of config.model.segment_samples"
            )

    def build(
        self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs
    ) -> "SampleRNN":
        return SampleRNN(self, rngs=rngs)

    def segments(self, context_samples: int) -> int:
        return context_samples // self.segment_samples


def loudness() -> Float32[np.ndarray, "256"]:
    """What the tiers read for each code: twice its mu-law level, at the lower edge of its bin.

    As in the published code, for every quantiser.
    """
    level = np.arange(NUM_CODES) / 128 - 1
    return (2 * np.sign(level) * (256.0 ** np.abs(level) - 1) / 255).astype(np.float32)


class WeightNorm(nnx.Module):
    """A matrix with separately learned directions and lengths (Salimans and Kingma 2016).

    `scale` has one length for each index of the axis `kept`.
    """

    def __init__(self, shape: tuple[int, ...], kept: int, fan_in: int, *, rngs: nnx.Rngs):
        self.kept = kept
        bound = (3 / fan_in) ** 0.5
        direction = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        self.direction = nnx.Param(direction)
        self.scale = nnx.Param(jnp.sqrt(self._squares()))

    def _squares(self) -> Array:
        others = tuple(i for i in range(self.direction[...].ndim) if i != self.kept)
        return jnp.square(self.direction[...]).sum(others)

    def __call__(self) -> Float32[Array, "..."]:
        ratio = self.scale[...] / jnp.sqrt(self._squares())
        shape = [-1 if i == self.kept else 1 for i in range(self.direction[...].ndim)]
        return self.direction[...] * ratio.reshape(shape)


class Tier(nnx.Module):
    """A frame-level tier: a GRU whose initial state is learned."""

    def __init__(self, config: SampleRNNConfig, tier: int, *, rngs: nnx.Rngs):
        width, self.frames = config.width, config.frame_sizes[tier]
        samples = config.frame_samples[tier]
        self.expand = WeightNorm((samples, width), 1, samples, rngs=rngs)
        self.expand_bias = nnx.Param(jnp.zeros(width))
        gates = (width, 3 * width)  # reset, update, new
        draw = jax.nn.initializers.lecun_uniform()
        self.input_kernel = nnx.Param(draw(rngs.params(), gates))
        self.state_kernel = nnx.Param(draw(rngs.params(), gates))
        self.input_bias = nnx.Param(jnp.zeros(3 * width))
        self.state_bias = nnx.Param(jnp.zeros(3 * width))
        self.initial = nnx.Param(jnp.zeros(width))
        self.upsampling = WeightNorm((width, self.frames, width), 0, width, rngs=rngs)
        self.upsampling_bias = nnx.Param(jnp.zeros((self.frames, width)))

    def prepare(self, dtype: Any) -> dict[str, Array]:
        """The weights in the form that is computed with."""
        weights = {
            "expand": self.expand(),
            "input": self.input_kernel[...],
            "state": self.state_kernel[...],
            "upsampling": self.upsampling(),
        }
        biases = {
            "expand_bias": self.expand_bias[...],
            "input_bias": self.input_bias[...],
            "state_bias": self.state_bias[...],
            "upsampling_bias": self.upsampling_bias[...],
        }
        return {name: x.astype(dtype) for name, x in weights.items()} | biases


def read_frames(
    weights: dict[str, Array],
    samples: Float32[Array, "B S n"],
    conditioning: Float[Array, "B S H"] | None,
    hidden: Float32[Array, "B H"],
) -> tuple[Float32[Array, "B H"], Float32[Array, "B S k H"]]:
    """A tier over `S` frames: its state after them, and conditioning for the next faster tier."""
    dtype = weights["input"].dtype

    def product(x: Array, name: str) -> Array:
        kernel = weights[name]
        return jnp.tensordot(x.astype(dtype), kernel, 1, preferred_element_type=jnp.float32)

    inputs = product(samples, "expand") + weights["expand_bias"]
    if conditioning is not None:
        inputs = inputs + conditioning
    gates = product(inputs, "input") + weights["input_bias"]

    def advance(hidden: Array, gates: Array) -> tuple[Array, Array]:
        own = product(hidden, "state") + weights["state_bias"]
        reset, update = jnp.split(jax.nn.sigmoid((gates + own)[:, : -hidden.shape[1]]), 2, -1)
        new = jnp.tanh(gates[:, -hidden.shape[1] :] + reset * own[:, -hidden.shape[1] :])
        hidden = (1 - update) * new + update * hidden
        return hidden, hidden

    hidden, states = lax.scan(advance, hidden, gates.swapaxes(0, 1))
    conditioning = product(states.swapaxes(0, 1), "upsampling") + weights["upsampling_bias"]
    return hidden, conditioning


class Carry(NamedTuple):
    """State of `B` streams where a segment begins."""

    codes: UInt8[Array, "B L"]  # the newest samples
    hidden: list[Float32[Array, "B H"]]  # of the tiers, fastest first


class State(NamedTuple):
    """State of `B` streams before a sample."""

    carry: Carry
    conditioning: list[Float32[Array, "B k H"]]  # from each tier, for its current frame


class SampleRNN(Baseline):
    """The whole network."""

    def __init__(self, config: SampleRNNConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, depth = config.width, config.embedding_width
        self.tiers = nnx.List([Tier(config, i, rngs=rngs) for i in range(len(config.frame_sizes))])
        self.embedding = nnx.Embed(NUM_CODES, depth, rngs=rngs)
        newest = config.frame_sizes[0]
        self.input = WeightNorm((newest, depth, width), 2, newest * depth, rngs=rngs)
        self.hidden = WeightNorm((width, width), 1, width, rngs=rngs)
        self.hidden_bias = nnx.Param(jnp.zeros(width))
        self.output = WeightNorm((width, NUM_CODES), 1, width, rngs=rngs)
        self.output_bias = nnx.Param(jnp.zeros(NUM_CODES))

    def prepare(self) -> dict[str, Any]:
        """The weights in the form that is computed with.

        The perceptron's first layer becomes a table of what each code adds at each place.
        """
        dtype = jnp.dtype(self.config.compute_dtype)
        embedding = self.embedding.embedding[...].astype(dtype)
        table = jnp.einsum("ce,neh->nch", embedding, self.input().astype(dtype))
        return {
            "tiers": [tier.prepare(dtype) for tier in self.tiers],
            "table": table,
            "hidden": self.hidden().astype(dtype),
            "hidden_bias": self.hidden_bias[...],
            "output": self.output().astype(dtype),
            "output_bias": self.output_bias[...],
        }

    def init_carry(self, batch: int) -> Carry:
        """The beginning of a clip: silence, and the learned states."""
        codes = jnp.full((batch, self.config.lookback), SILENCE, jnp.uint8)
        wide = (batch, self.config.width)
        return Carry(codes, [jnp.broadcast_to(tier.initial[...], wide) for tier in self.tiers])

    def loss(
        self, codes: UInt8[Array, "B T"], carry: Carry, first: Array | bool, key: Key
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " B"], Carry]]:
        carry = jax.tree.map(
            lambda new, old: jnp.where(first, new, lax.stop_gradient(old)),
            self.init_carry(codes.shape[0]),
            carry,
        )
        logits, carry = self.segment(self.prepare(), codes, carry)
        row_nats = -log_prob(logits, codes).mean(1)
        return row_nats.mean(), (row_nats, carry)

    def window_logits(
        self, codes: UInt8[Array, "B T"], key: Key = None
    ) -> Float32[Array, "B T 256"]:
        """Logits of every sample of clips that begin here; `T` is a multiple of the frames."""
        return self.segment(self.prepare(), codes, self.init_carry(codes.shape[0]))[0]

    def _read(self, segment: UInt8[Array, "B S"], last_n: int, of: Callable[..., Array]) -> Array:
        prepared, size = self.prepare(), self.config.segment_samples

        def read(carry: Carry, codes: Array) -> tuple[Carry, Array]:
            logits, carry = self.segment(prepared, codes, carry)
            return carry, of(logits, codes)

        rows = segment.shape[0]
        pieces = segment.reshape(rows, -1, size).swapaxes(0, 1)
        _, found = lax.scan(read, self.init_carry(rows), pieces)
        found = found.swapaxes(0, 1)
        return found.reshape(rows, -1, *found.shape[3:])[:, -last_n:]

    def segment(
        self, prepared: dict[str, Any], codes: UInt8[Array, "B T"], carry: Carry
    ) -> tuple[Float32[Array, "B T 256"], Carry]:
        """Logits of samples that follow those of `carry`, and the carry after them."""
        batch, count = codes.shape
        known, lookback = jnp.concatenate([carry.codes, codes], 1), self.config.lookback
        amplitudes, conditioning, hidden = jnp.asarray(loudness())[known], None, []
        for samples, weights, before in reversed(
            list(zip(self.config.frame_samples, prepared["tiers"], carry.hidden, strict=True))
        ):
            frames = amplitudes[:, lookback - samples : lookback - samples + count]
            frames = frames.reshape(batch, count // samples, samples)
            after, conditioning = read_frames(weights, frames, conditioning, before)
            conditioning = conditioning.reshape(batch, -1, self.config.width)
            hidden.insert(0, after)
        newest = self.config.frame_sizes[0]
        begins = range(lookback - newest, lookback)
        recent = jnp.stack([known[:, begin : begin + count] for begin in begins], -1)
        return self._perceptron(prepared, recent, conditioning), Carry(known[:, -lookback:], hidden)

    def _perceptron(
        self, prepared: dict[str, Any], recent: UInt8[Array, "*shape n"], conditioning: Any
    ) -> Float32[Array, "*shape 256"]:
        """Logits from the newest codes, oldest first, and the fastest tier's conditioning."""
        table = prepared["table"]
        seen = sum(table[i][recent[..., i]].astype(jnp.float32) for i in range(recent.shape[-1]))
        x = jax.nn.relu(seen + conditioning)
        for name in ("hidden", "output"):
            kernel = prepared[name]
            x = jnp.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
            x = x + prepared[f"{name}_bias"]
            x = jax.nn.relu(x) if name == "hidden" else x
        return x

    # One sample at a time.

    def init_state(self, batch: int, context_samples: int) -> State:
        frames = self.config.frame_sizes
        conditioning = [jnp.zeros((batch, count, self.config.width)) for count in frames]
        return State(self.init_carry(batch), conditioning)

    def step_logits(
        self, prepared: dict[str, Any], state: State, code: UInt8[Array, " B"], position: Array,
        start: Array,
    ) -> tuple[State, Float32[Array, "B 256"]]:  # fmt: skip
        """As the contract says. A tier runs where one of its frames begins."""
        (codes, hidden), conditioning = state.carry, list(state.conditioning)
        hidden, lookback = list(hidden), self.config.lookback
        codes = jnp.concatenate([codes[:, 1:], code[:, None]], 1)
        amplitudes, slower = jnp.asarray(loudness())[codes], None
        for i in reversed(range(len(conditioning))):
            samples, weights = self.config.frame_samples[i], prepared["tiers"][i]

            def run(samples=samples, weights=weights, i=i, slower=slower):
                frames = amplitudes[:, None, lookback - samples :]
                above = None if slower is None else slower[:, None]
                after, given = read_frames(weights, frames, above, hidden[i])
                return after, given[:, 0]

            def wait(i=i):
                return hidden[i], conditioning[i]

            hidden[i], conditioning[i] = lax.cond(position % samples == 0, run, wait)
            each = samples // self.config.frame_sizes[i]  # samples for each vector
            slower = lax.dynamic_index_in_dim(
                conditioning[i], position % samples // each, 1, keepdims=False
            )
        recent = codes[:, lookback - self.config.frame_sizes[0] :]
        return State(Carry(codes, hidden), conditioning), self._perceptron(prepared, recent, slower)
