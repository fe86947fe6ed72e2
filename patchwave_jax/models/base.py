"""The contract between models and everything that trains, measures or samples them.

A *config* (`ModelConfig`) answers what follows from sizes alone; a *model* (`Model`), an NNX module
built from it, computes. Nothing outside this package asks what kind of model it deals with. A new
model is a subclass of each (a baseline: of `Baseline`) and a line in `config.MODELS`.

Windows are counted in a unit of the model's own, `window_unit` samples: a patch of the patch model,
half a window of a baseline. A segment is a window with `history` samples in front, which
predictions in the window may read; what precedes the clip is silence.

Dimensions: `B` batch, `T` samples, `n` targets.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int32, Int64, UInt8

from patchwave_jax.errors import UserError
from patchwave_jax.models.context_parallel import Shards
from patchwave_jax.models.layers import Key

Read = Callable[[], tuple[Array, Callable[[Array], Array]]]  # see `Model.step`


@dataclasses.dataclass(frozen=True)
class Execution:
    """How much of a window is computed at once, and by whom: changes no result."""

    phase_chunk: int | None = None  # phases the Transformer runs at once; None: all
    encode_chunk_patches: int | None = None  # patches the dense encoder runs at once; None: all
    shards: Shards | None = None  # the devices that share each row; None: it is on one


class Memory(NamedTuple):
    """Of one device."""

    bytes: float  # that a program gets
    on_chip: bool  # whether it is fast only where it fits in caches or vector memory


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model's configuration answers; subclasses are frozen dataclasses with a `kind`.

    The defaults are a baseline's. `causal` says that there is a target at every sample of a window,
    each with only the samples before it in view (objective 'dense'); otherwise one target follows
    the window (objective 'last').
    """

    kind: str = ""
    compute_dtype: str = "float32"  # or 'bfloat16'
    published_parameters: ClassVar[str]
    latent_size: ClassVar[int] = 0  # latent variables of a block
    min_rows: ClassVar[int] = 1  # that are worth computing at once

    def check(self, context_samples: int, causal: bool) -> None:
        """Raises `UserError` naming the field that is wrong, alone or for such windows."""
        if not causal:
            raise UserError(f"config.objective must be 'dense' for the model {self.kind!r}")
        if context_samples % 2:
            raise UserError(
                f"config.context_samples must be even for the model {self.kind!r}, whose windows "
                f"have two halves, got {context_samples}"
            )

    def build(
        self, *, quantiser: str, causal: bool, execution: Execution, rngs: nnx.Rngs
    ) -> "Model":
        """The model with new parameters."""
        raise NotImplementedError

    def window_unit(self, context_samples: int) -> int:
        """Samples of the unit that windows are counted in."""
        return context_samples // 2

    @property
    def linear_taps(self) -> int:
        """Taps of the linear prediction of the train split that it starts from; 0: none."""
        return 0

    @property
    def latent_block(self) -> int:
        """Samples for which latent variables are drawn at once; 0: there are none."""
        return 0

    def history(self, causal: bool) -> int:
        """Samples before a window that predictions in it may read."""
        del causal
        return 0

    def training_window(self, context_samples: int, causal: bool) -> int:
        """Samples of one row of a training batch."""
        del causal
        return context_samples

    def segments(self, context_samples: int) -> int:
        """Training steps that walk through a row, each from the state the one before carried."""
        del context_samples
        return 1

    def context_of(self, index: Int64[np.ndarray, " n"], older: int) -> Int64[np.ndarray, " n"]:
        """Samples that the prediction of each target sees, where the clip has as many.

        `index` counts a window's targets, the first of which has `older` samples of the window
        before it.
        """
        return older + index

    def context_for(self, samples: int, context_samples: int, causal: bool) -> int:
        """The shortest context that predicts a clip of `samples` as `context_samples` would."""
        del samples, causal
        return context_samples

    def execution(
        self, context_samples: int, causal: bool, rows: int, memory: Memory, **chosen: Any
    ) -> Execution:
        """What to compute at once for `rows` windows; `chosen` are fields of `Execution` or 0."""
        del context_samples, causal, rows, memory
        return Execution(shards=chosen.get("shards"))

    def shared_axes(self, context_samples: int, causal: bool) -> dict[str, int]:
        """What devices that share a window split evenly, by name; {}: they can't share one."""
        del context_samples, causal
        return {}

    def useful_flops(self, context_samples: int, causal: bool) -> float | None:
        """FLOPs of a training step on one row that can't be saved; None: not counted."""
        del context_samples, causal
        return None

    def own_learning_rate(self) -> tuple[float, Callable[[Any], Any]] | None:
        """A learning rate of some parameters, and a mask of them; they have no weight decay."""
        return None

    @property
    def has_dropout(self) -> bool:
        return any(value for name, value in vars(self).items() if name.endswith("dropout"))


class Model(nnx.Module):
    """What a model computes. Codes are uint8, log-probabilities float32 in nats."""

    def init_carry(self, batch: int) -> Any:
        """What is carried into a row's first segment; () if nothing is carried."""
        del batch
        return ()

    def loss(
        self, codes: UInt8[Array, "B T"], carry: Any, first: Array | bool, key: Key
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " B"], Any]]:
        """Mean NLL, in nats, of the targets of rows, with each row's mean and the next carry.

        `first` says that these are the rows' first segments: then `carry` is not used. `key` is for
        dropout. Only the first result has a gradient.
        """
        raise NotImplementedError

    def log_probs(
        self,
        segment: UInt8[Array, "B S"],
        last_n: int,
        latents: Int32[Array, "B blocks Z"] | None = None,
    ) -> Float32[Array, "B n"]:
        """Log-probabilities of the `last_n` samples of segments.

        Those of a block's latent variables are added to its first sample's. They are inferred from
        the samples unless given.
        """
        raise NotImplementedError

    def logits(self, segment: UInt8[Array, "B S"], every: int) -> Float32[Array, "B n 256"]:
        """Logits of every `every`-th sample of the segments' windows, from the first on."""
        raise NotImplementedError

    def start_from(self, taps: Float64[np.ndarray, " K"], scale: float) -> None:
        """Sets parameters from a linear prediction with `linear_taps` taps (oldest sample first)
        and the scale of its logistic error."""
        raise NotImplementedError

    # Generation, one sample at a time. Positions count the samples of the clip.

    def prepare(self) -> Any:
        """What steps need of the parameters, computed once."""
        return ()

    def init_state(self, batch: int, context_samples: int) -> Any:
        """The state before a clip. Every array but scalars has the batch as an axis."""
        raise NotImplementedError

    def steps_from(self, position: int, start: int) -> int | None:
        """Where to begin to step through known samples to have the state at `position`.

        `start` is where the window begins. None: the model has a `prime` instead.
        """
        del position
        return start

    def prime(
        self, prepared: Any, state: Any, segment: UInt8[Array, "B S"], position: Array, start: Array
    ) -> Any:
        """The state before `position` of a window that starts at `start`; overwrites `state`.

        `segment` holds the samples from `history` before `start` on, the window in whole units that
        reach past `position - 1`; what follows that sample is not used.
        """
        raise NotImplementedError

    @property
    def slides(self) -> bool:
        """Whether `slide` gives the state in the next window; otherwise it is primed again."""
        return False

    def slide(self, state: Any, samples: int) -> Any:
        """The state when the window starts `samples` later."""
        del samples
        return state

    def latents(self, state: Any) -> Int32[Array, "B Z"]:
        """Latent variables of the block that the newest `step` was in."""
        raise NotImplementedError

    def visible(self, past: int, context_samples: int) -> tuple[int, int]:
        """A static argument of `step` for window positions from `past` on, and where it ends."""
        del past
        return 0, context_samples

    def step(
        self,
        prepared: Any,
        state: Any,
        code: UInt8[Array, " B"],
        position: Int32[Array, ""],
        start: Int32[Array, ""],
        visible: int,
        uniforms: Float32[Array, "B Z"] | None = None,
    ) -> tuple[Any, Read]:
        """The state after `code`, the sample before `position`, in the window from `start` on.

        From `uniforms` a model draws the latent variables of the block that `position` is in.

        Returns:
          The state, and a function that reads the distribution of sample `position` from it:
          logits [B, 256] to draw from, and a function from codes to their log-probabilities.
        """
        raise NotImplementedError


class Baseline(Model):
    """A network that reads a window of samples from its beginning, as published.

    A subclass has `window_logits` and, for generation, `init_state` and `step_logits`.
    """

    def window_logits(
        self, codes: UInt8[Array, "B T"], key: Key = None
    ) -> Float32[Array, "B T 256"]:
        """Logits of all samples of windows, each from those before it."""
        raise NotImplementedError

    def step_logits(
        self, prepared: Any, state: Any, code: Array, position: Array, start: Array
    ) -> tuple[Any, Float32[Array, "B 256"]]:
        """The state after `code`, and the logits of sample `position`, which follows it."""
        raise NotImplementedError

    def loss(
        self, codes: UInt8[Array, "B T"], carry: Any, first: Array | bool, key: Key
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " B"], Any]]:
        row_nats = -log_prob(self.window_logits(codes, key), codes).mean(1)
        return row_nats.mean(), (row_nats, carry)

    def log_probs(
        self, segment: UInt8[Array, "B S"], last_n: int, latents: Array | None = None
    ) -> Float32[Array, "B n"]:
        return self._read(segment, last_n, log_prob)

    def logits(self, segment: UInt8[Array, "B S"], every: int) -> Float32[Array, "B n 256"]:
        return self._read(segment, segment.shape[1], lambda logits, _: logits)[:, ::every]

    def _read(self, segment: UInt8[Array, "B S"], last_n: int, of: Callable[..., Array]) -> Array:
        """`of` logits and codes, for the `last_n` samples."""
        return of(self.window_logits(segment), segment)[:, -last_n:]

    def step(
        self,
        prepared: Any,
        state: Any,
        code: Array,
        position: Array,
        start: Array,
        visible: int,
        uniforms: Float32[Array, "B Z"] | None = None,
    ) -> tuple[Any, Read]:
        state, logits = self.step_logits(prepared, state, code, position, start)
        return state, lambda: (logits, functools.partial(log_prob, logits))


def log_prob(
    logits: Float32[Array, "*shape 256"], codes: UInt8[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Log-probabilities of `codes`."""
    own = jnp.take_along_axis(logits, codes[..., None].astype(jnp.int32), -1)[..., 0]
    return own - jax.nn.logsumexp(logits, -1)


def count_parameters(params: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
