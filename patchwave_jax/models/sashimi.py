"""SaShiMi (Goel, Gu, Donahue & Re, "It's Raw! Audio Generation with State-Space Models", 2022).

A stack of residual S4 and feed-forward blocks at several resolutions. Each level hands its input,
pooled, to the level below, adds the result (of whole past pooling periods only, which keeps it
causal) and runs its blocks. The defaults are the model of the published YouTube-Mix
rows; the authors' public configuration of today also has `glu=True`.

Parameters: 3,144,832 with 6 layers and 4,072,448 with 8, as many as the public code has without
GLU, and 4,764,160 with it. The published 3.13M for 6 layers counts scalar layer norms and leaves
out A, B and P.

Dimensions as in `patchwave_jax.models.s4`, and `s` the samples of one pooling period.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Complex, Float, Float32, Int32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.errors import UserError
from patchwave_jax.models import s4
from patchwave_jax.models.base import Baseline, Execution, ModelConfig
from patchwave_jax.models.layers import Key, split

# Kept for the backward pass besides each layer's input; the rest is recomputed.
KEPT = jax.checkpoint_policies.save_only_these_names("kernel")
S4_LEARNING_RATE = 1e-3  # as published, beside 0.004 for all others
S4_PARAMETERS = ("log_dt", "log_decay", "frequency", "P", "B")


@dataclasses.dataclass(frozen=True)
class SaShiMiConfig(ModelConfig):
    """The network: everything that shapes its parameters, and its dropout."""

    published_parameters: ClassVar[str] = "4.05M with 8 layers, 3.13M with 6"
    kind: str = "sashimi"
    width: int = 64  # of the highest level
    num_layers: int = 8  # S4 blocks of each level, as many feed-forward blocks between them
    pools: tuple[int, ...] = (4, 4)  # how many samples of each level are one of the next
    expand: int = 2  # how much wider the next level is
    mlp_expand: int = 2  # how much wider a feed-forward block is inside
    state_size: int = 64  # N, states of each channel
    glu: bool = False  # gated linear units after S4
    dropout: float = 0.0  # of what each block adds
    compute_dtype: str = "float32"  # or 'bfloat16': linear layers only

    def check(self, context_samples: int, causal: bool) -> None:
        super().check(context_samples, causal)
        total = math.prod(self.pools)
        for name, ok, what in (
            ("num_layers", self.num_layers >= 1, "must be at least 1"),
            ("state_size", self.state_size % 2 == 0, "must be even"),
            ("dropout", self.dropout < 1, "must be below 1"),
            ("pools", context_samples % (2 * total) == 0,
             f"must divide half of config.context_samples {context_samples}"),
        ):  # fmt: skip
            if not ok:
                raise UserError(f"config.model.{name} {what}, got {getattr(self, name)}")

    def build(
        self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs
    ) -> "SaShiMi":
        return SaShiMi(self, rngs=rngs)

    def own_learning_rate(self) -> tuple[float, Callable[[Any], Any]]:
        """S4's own parameters have no weight decay and a learning rate of their own."""
        return S4_LEARNING_RATE, s4_parameters


class Prepared(NamedTuple):
    """What generation computes once from a level's parameters: those of all blocks, stacked."""

    blocks: Any
    recurrence: s4.Recurrence
    lower: "Prepared | None"


class State(NamedTuple):
    """State of a level and those below it."""

    x: Complex[Array, "layers B D n"]  # the S4 states
    period: Float[Array, "B D s"] | None  # inputs of this pooling period
    above: Float[Array, "B D s"] | None  # output of the level below for it
    lower: "State | None"


class SaShiMi(Baseline):
    """The whole model, over embedded codes."""

    def __init__(self, config: SaShiMiConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(1.0)
        self.embedding = nnx.Embed(
            quantisers.NUM_CODES, config.width, embedding_init=normal, rngs=rngs
        )
        self.level = Level(config, config.width, config.pools, rngs=rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-5, rngs=rngs)
        self.head = _linear(config, config.width, quantisers.NUM_CODES, rngs)

    def window_logits(
        self, codes: UInt8[Array, "B T"], key: Key = None
    ) -> Float32[Array, "B T 256"]:
        """The logits of every sample given those before it; the first follows silence.

        Raises:
          ValueError: if `T` is no multiple of the product of `pools`.
        """
        total = math.prod(self.config.pools)
        if codes.shape[1] % total:
            raise ValueError(
                f"{codes.shape[1]} samples are not a multiple of {total}, the product of "
                f"config.model.pools {self.config.pools}"
            )
        before = jnp.pad(codes[:, :-1], ((0, 0), (1, 0)), constant_values=quantisers.SILENCE)
        return self._read_out(self.level(self._embed(before), key))

    def prepare(self) -> Prepared:
        """What `step` needs besides, computed from the parameters once."""
        return self.level.prepare()

    def init_state(self, batch: int, context_samples: int) -> State:
        return self.level.empty(batch)

    def step_logits(
        self, prepared: Prepared, state: State, code: UInt8[Array, " B"],
        position: Int32[Array, ""], start: Int32[Array, ""],
    ) -> tuple[State, Float32[Array, "B 256"]]:  # fmt: skip
        state, x = self.level.step(prepared, state, self._embed(code), position)
        return state, self._read_out(x)

    def _embed(self, codes: UInt8[Array, "*shape"]) -> Float[Array, "*shape D"]:
        return self.embedding(codes.astype(jnp.int32))

    def _read_out(self, x: Float[Array, "*shape D"]) -> Float32[Array, "*shape 256"]:
        return self.head(self.norm(x)).astype(jnp.float32)


class Level(nnx.Module):
    """One resolution, with all that are lower: the U of the paper's figure, from the outside in."""

    def __init__(
        self, config: SaShiMiConfig, width: int, pools: tuple[int, ...], *, rngs: nnx.Rngs
    ):
        self.config, self.width, self.pool = config, width, pools[0] if pools else 1
        inner = width * config.expand
        self.lower = Level(config, inner, pools[1:], rngs=rngs) if pools else None
        if pools:
            self.down = _linear(config, width * self.pool, inner, rngs)
            self.up = _linear(config, inner, width * self.pool, rngs)
        self.blocks = nnx.List([Block(config, width, rngs=rngs) for _ in range(config.num_layers)])

    def __call__(self, x: Float[Array, "B T D"], key: Key = None) -> Float[Array, "B T D"]:
        keys = split(key, 2)
        if self.lower is not None:
            batch, samples, width = x.shape
            periods = jnp.swapaxes(x.reshape(batch, -1, self.pool, width), 2, 3)
            above = self._above(self.lower(self._below(periods), keys[0]))
            # Whole past periods only: a period's output is known from its end on.
            above = jnp.pad(above[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
            x = x + jnp.swapaxes(above, 2, 3).reshape(batch, samples, width)

        graphdef, stacked = self._stacked()

        @partial(jax.checkpoint, policy=KEPT)
        def run(x: Array, layer: tuple[Any, Key]) -> tuple[Array, None]:
            block, block_key = layer
            return nnx.merge(graphdef, block)(x, block_key), None

        block_keys = None if keys[1] is None else jax.random.split(keys[1], len(self.blocks))
        return x + lax.scan(run, x, (stacked, block_keys))[0]

    def prepare(self) -> Prepared:
        graphdef, stacked = self._stacked()
        recurrence = jax.vmap(lambda block: nnx.merge(graphdef, block).s4.recurrence())(stacked)
        return Prepared(stacked, recurrence, self.lower and self.lower.prepare())

    def empty(self, batch: int) -> State:
        x = jnp.zeros(
            (len(self.blocks), batch, self.width, self.config.state_size // 2), jnp.complex64
        )
        if self.lower is None:
            return State(x, None, None, None)
        period = jnp.zeros((batch, self.width, self.pool))
        return State(x, period, period, self.lower.empty(batch))

    def step(
        self, prepared: Prepared, state: State, x: Float[Array, "B D"], index: Int32[Array, ""]
    ) -> tuple[State, Float[Array, "B D"]]:
        """As the whole, one sample at a time; the level below runs at the end of its period."""
        period, above, lower = state.period, state.above, state.lower
        inner = self.lower
        if inner is not None:
            assert prepared.lower is not None
            lower_prepared, phase = prepared.lower, index % self.pool
            period = lax.dynamic_update_index_in_dim(period, x, phase, 2)
            x = x + lax.dynamic_index_in_dim(above, phase, 2, keepdims=False)

            def below(period: Array, above: Array, lower: State) -> tuple[Array, State]:
                x = self._below(period)
                lower, y = inner.step(lower_prepared, lower, x, index // self.pool)
                return self._above(y), lower

            def wait(period: Array, above: Array, lower: State) -> tuple[Array, State]:
                return above, lower

            above, lower = lax.cond(phase == self.pool - 1, below, wait, period, above, lower)

        graphdef, _ = nnx.split(self.blocks[0])

        def run(y: Array, layer: tuple[Any, s4.Recurrence, Array]) -> tuple[Array, Array]:
            block, recurrence, s4_state = layer
            s4_state, y = nnx.merge(graphdef, block).step(recurrence, s4_state, y)
            return y, s4_state

        y, s4_states = lax.scan(run, x, (prepared.blocks, prepared.recurrence, state.x))
        return State(s4_states, period, above, lower), x + y

    def _below(self, periods: Float[Array, "*shape D s"]) -> Float[Array, "*shape E"]:
        """Down-pooling: a linear map of each whole period."""
        y = self.down(periods.reshape(*periods.shape[:-2], -1))
        return y.astype(periods.dtype)

    def _above(self, y: Float[Array, "*shape E"]) -> Float[Array, "*shape D s"]:
        """Up-pooling: a linear map to each whole period."""
        return self.up(y).astype(y.dtype).reshape(*y.shape[:-1], self.width, self.pool)

    def _stacked(self) -> tuple[Any, Any]:
        """The blocks' common structure, and their parameters stacked for a loop over them."""
        graphdef, _ = nnx.split(self.blocks[0])
        return graphdef, jax.tree.map(lambda *x: jnp.stack(x), *map(nnx.state, self.blocks))


class Block(nnx.Module):
    """A residual S4 block and a residual feed-forward block."""

    def __init__(self, config: SaShiMiConfig, width: int, *, rngs: nnx.Rngs):
        self.glu = config.glu
        self.s4_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.s4 = s4.S4(width, config.state_size, rngs=rngs)
        self.mix = _linear(config, width, 2 * width if config.glu else width, rngs)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.mlp_in = _linear(config, width, config.mlp_expand * width, rngs)
        self.mlp_out = _linear(config, config.mlp_expand * width, width, rngs)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: Float[Array, "B T D"], key: Key = None) -> Float[Array, "B T D"]:
        return self._rest(x, self.s4(self.s4_norm(x)), key)

    def step(
        self, recurrence: s4.Recurrence, state: Complex[Array, "B D n"], x: Float[Array, "B D"]
    ) -> tuple[Complex[Array, "B D n"], Float[Array, "B D"]]:
        state, y = s4.step(recurrence, state, self.s4_norm(x))
        return state, self._rest(x, y)

    def _rest(self, x: Array, y: Array, key: Key = None) -> Array:
        """What follows S4's output `y`, for one sample or many."""
        keys = split(key, 2)
        y = self.mix(jax.nn.gelu(y, approximate=False))
        y = jax.nn.glu(y) if self.glu else y
        x = x + self.dropout(y, deterministic=key is None, rngs=keys[0])
        y = self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x)), approximate=False))
        return x + self.dropout(y, deterministic=key is None, rngs=keys[1])


def s4_parameters(params: Any) -> Any:
    """True for the parameters with their own learning rate and no weight decay.

    As published: dt, A (Lambda and P) and B of every S4 layer; C and D are like the others.
    """

    def is_one(path: tuple[Any, ...], _: Array) -> bool:
        return any(getattr(entry, "key", None) in S4_PARAMETERS for entry in path)

    return jax.tree_util.tree_map_with_path(is_one, params)


def _linear(config: SaShiMiConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts as PyTorch's, uniform in +- 1/sqrt(inputs), with no bias."""
    uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    dtype = jnp.dtype(config.compute_dtype)
    return nnx.Linear(inputs, outputs, kernel_init=uniform, dtype=dtype, rngs=rngs)
