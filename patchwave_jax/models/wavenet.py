"""WaveNet (van den Oord et al. 2016) as SaShiMi's authors compare with it: 4.24M parameters.

Cycles of causal convolutions of two taps, their dilation doubling from layer to layer; in each a
gated unit that feeds a residual and a skip connection. As in the published code (Goel et al. 2022)
the convolutions have no biases, the codes come in through an embedding, and a last linear layer of
256 follows WaveNet's own two. A sample is predicted from the `receptive_field` samples before it.

A convolution of two taps is a linear layer of two frames, the older one first.

Dimensions: `B` batch, `T` samples, `R` receptive field, `D` residual channels.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Float32, Int64, UInt8

from patchwave_jax.data.quantisers import NUM_CODES, SILENCE
from patchwave_jax.errors import UserError
from patchwave_jax.models.base import Baseline, Execution, ModelConfig
from patchwave_jax.models.layers import Key


@dataclasses.dataclass(frozen=True)
class WaveNetConfig(ModelConfig):
    """The defaults are those of the published comparison."""

    published_parameters: ClassVar[str] = "4.24M"
    kind: str = "wavenet"
    cycles: int = 4
    cycle_layers: int = 10  # dilations 1, 2, 4, ...
    residual_channels: int = 64
    dilation_channels: int = 64  # of the gated unit
    skip_channels: int = 1024
    end_channels: int = 512
    embedding_width: int = 256
    compute_dtype: str = "float32"  # or 'bfloat16'; parameters and logits: float32

    @property
    def dilations(self) -> list[int]:
        return [2**layer for layer in range(self.cycle_layers)] * self.cycles

    @property
    def receptive_field(self) -> int:
        """Samples that a prediction sees."""
        return 1 + sum(self.dilations)

    def check(self, context_samples: int, causal: bool) -> None:
        super().check(context_samples, causal)
        if self.cycle_layers > 20 or 2 * self.receptive_field > context_samples:
            raise UserError(
                f"config.context_samples {context_samples} is less than twice the receptive field "
                f"that {self.cycles} x {self.cycle_layers} layers have; make it longer, or lower "
                "config.model.cycles or config.model.cycle_layers"
            )

    def build(
        self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs
    ) -> "WaveNet":
        return WaveNet(self, rngs=rngs)

    def history(self, causal: bool) -> int:
        return self.receptive_field

    def context_of(self, index: Int64[np.ndarray, " n"], older: int) -> Int64[np.ndarray, " n"]:
        return np.full_like(index, self.receptive_field)


class Layer(nnx.Module):
    """A dilated convolution with a gated unit, and the residual connection around it."""

    def __init__(self, config: WaveNetConfig, *, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            dtype = jnp.dtype(config.compute_dtype)
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        residual, dilation = config.residual_channels, config.dilation_channels
        self.filter_and_gate = linear(2 * residual, 2 * dilation)
        self.residual = linear(dilation, residual)
        self.skip = linear(dilation, config.skip_channels)

    def __call__(
        self, older: Float[Array, "*shape D"], newer: Float[Array, "*shape D"]
    ) -> tuple[Float[Array, "*shape D"], Float[Array, "*shape G"]]:
        """The next layer's input at the time of `newer`, and the gated units."""
        both = self.filter_and_gate(jnp.concatenate([older, newer], -1))
        filtered, gate = jnp.split(both, 2, -1)
        gated = jnp.tanh(filtered) * jax.nn.sigmoid(gate)
        return newer + self.residual(gated), gated


class State(NamedTuple):
    """State of `B` streams: a queue of each layer's newest inputs."""

    queues: list[Float[Array, "B dilation D"]]  # sample t is at place t % dilation


class WaveNet(Baseline):
    """The whole network."""

    def __init__(self, config: WaveNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        width = config.embedding_width
        self.embedding = nnx.Embed(NUM_CODES, width, dtype=dtype, rngs=rngs)
        self.start = nnx.Linear(
            width, config.residual_channels, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in config.dilations])
        self.end1 = nnx.Linear(config.skip_channels, config.end_channels, dtype=dtype, rngs=rngs)
        self.end2 = nnx.Linear(config.end_channels, NUM_CODES, dtype=dtype, rngs=rngs)
        self.head = nnx.Linear(NUM_CODES, NUM_CODES, dtype=dtype, rngs=rngs)

    @property
    def slides(self) -> bool:
        return True  # the queues know nothing of windows

    def window_logits(
        self,
        codes: UInt8[Array, "B T"],
        key: Key = None,
        history: UInt8[Array, "B R"] | None = None,
    ) -> Float32[Array, "B T 256"]:
        """Logits of every sample, from those before it and `history`; None is silence."""
        count, field = codes.shape[1], self.config.receptive_field
        if history is None:
            history = jnp.full((codes.shape[0], field), SILENCE, jnp.uint8)
        x = self._start(jnp.concatenate([history, codes[:, :-1]], 1))
        units = []
        for layer, dilation in zip(self.layers, self.config.dilations, strict=True):
            x, gated = layer(x[:, :-dilation], x[:, dilation:])
            units.append(gated[:, -count:])
        return self._end(units)

    def _read(self, segment: UInt8[Array, "B S"], last_n: int, of: Callable[..., Array]) -> Array:
        field = self.config.receptive_field
        first = segment.shape[1] - min(last_n, segment.shape[1] - field)
        codes, history = segment[:, first:], segment[:, first - field : first]
        return of(self.window_logits(codes, history=history), codes)

    def _start(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape D"]:
        return self.start(self.embedding(codes.astype(jnp.int32)))

    def _end(self, units: list[Float[Array, "*shape G"]]) -> Float32[Array, "*shape 256"]:
        # The sum over the layers' skip connections, as one product.
        kernels = jnp.concatenate([layer.skip.kernel[...] for layer in self.layers])
        together = jnp.concatenate(units, -1)
        x = jax.nn.relu(together @ kernels.astype(together.dtype))
        x = self.end2(jax.nn.relu(self.end1(x)))
        return self.head(x).astype(jnp.float32)

    # One sample at a time: the queues of "fast WaveNet" (Le Paine et al. 2016).

    def steps_from(self, position: int, start: int) -> int:
        return max(0, position - self.config.receptive_field)

    def init_state(self, batch: int, context_samples: int) -> State:
        """The state after endless silence."""
        x, queues = self._start(jnp.full(batch, SILENCE, jnp.uint8)), []
        for layer, dilation in zip(self.layers, self.config.dilations, strict=True):
            queues.append(jnp.broadcast_to(x[:, None], (batch, dilation, x.shape[-1])))
            x, _ = layer(x, x)
        return State(queues)

    def step_logits(
        self, prepared: tuple[()], state: State, code: UInt8[Array, " B"], position: Array,
        start: Array,
    ) -> tuple[State, Float32[Array, "B 256"]]:  # fmt: skip
        x, queues, units = self._start(code), [], []
        for layer, dilation, queue in zip(
            self.layers, self.config.dilations, state.queues, strict=True
        ):
            place = position % dilation
            older = lax.dynamic_index_in_dim(queue, place, 1, keepdims=False)
            queues.append(lax.dynamic_update_index_in_dim(queue, x, place, 1))
            x, gated = layer(older, x)
            units.append(gated)
        return State(queues), self._end(units)
