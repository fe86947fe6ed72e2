"""The adaptive predictors one sample at a time, for `patchwave_jax.models.patchwave.incremental`.

Dimensions as in `patchwave_jax.models.predictors.bank`; `R` samples that are remembered, `past` as
in `patchwave_jax.models.patchwave.incremental`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.data import quantisers
from patchwave_jax.models.predictors.bank import Prediction, Predictors, noise_of, waveform_of
from patchwave_jax.models.predictors.kalman import KalmanState


class Adaptive(NamedTuple):
    """What is remembered of `B` streams; their newest sample is not taken in yet."""

    fitted: list[Float32[Array, "B K"]]  # the predictors' coefficients in this block
    predicted: Float32[Array, "B R J"]  # what they made of the newest samples
    clean: Float32[Array, "B R"]  # the newest samples as they read them
    belief: KalmanState | None  # of the denoiser, where there is one


class AdaptiveStream:
    """The step of one set of predictors, and what prepares it."""

    def __init__(self, predictors: Predictors, quantiser: str):
        self.predictors, self.quantiser = predictors, quantiser

    def heard(
        self, codes: UInt8[Array, "B T"]
    ) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
        """The waveform of codes, and its noise."""
        return waveform_of(codes, self.quantiser), noise_of(codes, self.quantiser)

    def empty(self, rows: int) -> Adaptive:
        """A state of `rows` streams to be primed."""
        predictors, belief = self.predictors, None
        if predictors.denoiser:
            filters, each = jnp.zeros((predictors.denoiser.taps, rows)), jnp.zeros(rows)
            belief = KalmanState(filters, each, filters, each, each, each)
        return Adaptive(
            [jnp.zeros((rows, taps)) for taps in predictors.taps],
            jnp.zeros((rows, predictors.error_history, len(predictors.taps))),
            jnp.zeros((rows, predictors.fit_window)),
            belief,
        )

    def prime(self, history: UInt8[Array, "B T"], now: Array, past: Array) -> Adaptive:
        """The state before target `past`, which is number `now` of `history`."""
        predictors, reach = self.predictors, self.predictors.lookback
        memory, read = predictors.error_history, predictors.fit_window
        age = (past - 1) % predictors.block_samples  # of the newest sample, in its block
        # The block may not be over: what stands in its remaining samples is not looked at.
        padded = jnp.pad(history, ((0, 0), (0, predictors.block_samples)))
        length = reach + predictors.block_samples
        known = lax.dynamic_slice_in_dim(padded, now - 1 - age - reach, length, 1)
        waveform, noise = self.heard(known)
        predicted = predictors.predict(waveform, noise, reach - memory)
        newest, kept = predictors.denoise(waveform, noise, reach - read)
        before = kept[:, reach - read + 1 : reach + 1].at[:, -1].set(newest[:, reach])
        kept = jnp.pad(kept, ((0, 0), (0, 1)))  # of the sample before each
        belief = None
        if predictors.denoiser:

            def observe(i: Array, belief: KalmanState) -> KalmanState:
                return belief.observe(waveform[:, reach + i], noise[:, reach + i])

            belief = predictors.denoiser.begin(waveform[:, :reach], noise[:, :reach])
            belief = lax.fori_loop(0, age, observe, belief)
        return Adaptive(
            predictors.coefficients(before),
            lax.dynamic_slice_in_dim(predicted, age + 1, memory, 1),
            lax.dynamic_slice_in_dim(kept, reach + age - read + 2, read, 1),
            belief,
        )

    def extend(self, state: Adaptive, chunk: int) -> Adaptive:
        """With room for `chunk` more samples."""
        return state._replace(
            predicted=jnp.pad(state.predicted, ((0, 0), (0, chunk), (0, 0))),
            clean=jnp.pad(state.clean, ((0, 0), (0, chunk))),
        )

    def shorten(self, extended: Adaptive, count: Array) -> Adaptive:
        """The state after `count` steps from an extended one."""
        memory, read = self.predictors.error_history, self.predictors.fit_window
        return extended._replace(
            predicted=lax.dynamic_slice_in_dim(extended.predicted, count, memory, 1),
            clean=lax.dynamic_slice_in_dim(extended.clean, count, read, 1),
        )

    def step(self, state: Adaptive, recent: UInt8[Array, "B R"], i: Array, past: Array) -> Adaptive:
        """Takes in the newest of `recent` samples, and predicts target `past`.

        The predictors are fitted anew where a block begins. `i` were added since `extend`.
        """
        predictors, read = self.predictors, self.predictors.fit_window
        value, noise = (x[:, 0] for x in self.heard(recent[:, -1:]))
        belief, clean = state.belief, state.clean
        if belief is not None:
            belief = belief.observe(value, noise)
            value = belief.past[0]
            clean = lax.dynamic_update_slice(clean, belief.past[1][:, None], (0, read - 2 + i))

        def begin() -> tuple[list[Array], KalmanState | None, Array]:
            begun = predictors.denoiser and predictors.denoiser.begin(*self.heard(recent))
            newest = value if begun is None else begun.past[0]
            before = lax.dynamic_slice_in_dim(clean, i, read, 1).at[:, -1].set(newest)
            return predictors.coefficients(before), begun, newest

        begins = past % predictors.block_samples == 0
        fitted, belief, value = lax.cond(begins, begin, lambda: (state.fitted, belief, value))
        clean = lax.dynamic_update_slice(clean, value[:, None], (0, read - 1 + i))
        longest = max(predictors.taps)
        newest = lax.dynamic_slice_in_dim(clean, read - longest + i, longest, 1)
        made = predictors.apply(fitted, [newest[:, longest - taps :] for taps in predictors.taps])
        place = (0, predictors.error_history + i, 0)
        predicted = lax.dynamic_update_slice(state.predicted, made[:, None], place)
        return Adaptive(fitted, predicted, clean, belief)

    def describe(
        self, state: Adaptive, recent: UInt8[Array, "B R"], i: Array, past: Array
    ) -> Prediction:
        """What the head is told of target `past`, after the step."""
        predictors, memory = self.predictors, self.predictors.error_history
        known = jnp.pad(recent[:, recent.shape[1] - memory :], ((0, 0), (0, 1)))
        age = (past % predictors.block_samples).astype(jnp.float32)[None]
        return predictors.describe(
            lax.dynamic_slice_in_dim(state.predicted, i, memory + 1, 1),
            waveform_of(known, self.quantiser),
            age,
            quantisers.get(self.quantiser).edges,
        )
