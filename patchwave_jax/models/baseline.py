"""The baselines as training, evaluation and the report see a model, beside `PatchWave`.

A window has two halves, where the patch model's has `N` patches. SampleRNN and SaShiMi read a
window from its beginning, WaveNet sees its receptive field before every sample, of what lies before
the window too. What lies before the clip is silence.

Dimensions: `B` batch, `T` samples of a window, `P` of half a window.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float32, UInt8

from patchwave_jax.config import Config
from patchwave_jax.models.layers import Key
from patchwave_jax.models.samplernn import Carry, SampleRNN, SampleRNNConfig
from patchwave_jax.models.sashimi import SaShiMi, SaShiMiConfig
from patchwave_jax.models.wavenet import WaveNet, WaveNetConfig

NETWORKS: dict[type, Any] = {
    WaveNetConfig: WaveNet,
    SampleRNNConfig: SampleRNN,
    SaShiMiConfig: SaShiMi,
}


def picked(logits: Float32[Array, "B n 256"], codes: UInt8[Array, "B n"]) -> Float32[Array, "B n"]:
    """Log-probabilities of `codes`, in nats."""
    own = jnp.take_along_axis(logits, codes[..., None].astype(jnp.int32), -1)[..., 0]
    return own - jax.nn.logsumexp(logits, -1)


class Baseline(nnx.Module):
    """A network with the methods of `PatchWave` that are called from elsewhere."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.half = config.patch_samples
        self.network = NETWORKS[type(config.model)](config.model, rngs=rngs)

    def start(self, batch: int) -> Any:
        """What is carried into a clip's first segment; () of a network that carries nothing."""
        return self.network.start(batch) if isinstance(self.network, SampleRNN) else ()

    def nats(
        self, codes: UInt8[Array, "B T"], carry: Any, first: Array, key: Key
    ) -> tuple[Float32[Array, ""], tuple[Float32[Array, " B"], Any]]:
        """The loss: mean NLL, in nats, of a segment, each row's, and the carry for the next one.

        `first` says that clips begin here; then `carry` is not looked at. `key` is for dropout.
        """
        network = self.network
        if isinstance(network, SaShiMi):
            logits = network.logits(codes, key)
        elif isinstance(network, WaveNet):
            logits = network.logits(codes)
        else:
            carry = jax.tree.map(
                lambda new, old: jnp.where(first, new, lax.stop_gradient(old)),
                network.start(codes.shape[0]),
                carry,
            )
            logits, carry = network.segment(network.prepare(), codes, carry)
        row_nats = -picked(logits, codes).mean(1)
        return row_nats.mean(), (row_nats, carry)

    def dense_log_prob(
        self,
        segment: UInt8[Array, "B T+P"],
        *,
        newest: int | None = None,
        phase_chunk: int = 0,
        chunk_patches: int = 0,
        shards: None = None,
    ) -> Float32[Array, "B n"]:
        """Log-probabilities, in nats, of the newest halves of a window; None: of all.

        `segment` is a window, and half a window before it. There are no chunks to choose, and a
        row is on one device.
        """
        del phase_chunk, chunk_patches, shards
        count = (newest or segment.shape[1] // self.half - 1) * self.half
        return self._read(segment, count, picked)

    def dense_logits(self, segment: UInt8[Array, "B T+P"], hop: int) -> Float32[Array, "B n 256"]:
        """Logits of a window's samples 0, hop, 2 hop, ..."""
        count = segment.shape[1] - self.half
        return self._read(segment, count, lambda logits, _: logits)[:, ::hop]

    def _read(self, segment: UInt8[Array, "B T+P"], count: int, of: Any) -> Array:
        """What `of` makes of logits and codes, for the newest `count` samples."""
        network, codes = self.network, segment[:, self.half :]
        if isinstance(network, WaveNet):
            before = segment.shape[1] - count
            history = segment[:, before - network.config.receptive_field : before]
            return of(network.logits(segment[:, before:], history), segment[:, before:])
        if isinstance(network, SaShiMi):
            return of(network.logits(codes), codes)[:, -count:]
        prepared, size = network.prepare(), network.config.segment_samples

        def read(carry: Carry, codes: Array) -> tuple[Carry, Array]:
            logits, carry = network.segment(prepared, codes, carry)
            return carry, of(logits, codes)

        pieces = codes.reshape(codes.shape[0], -1, size).swapaxes(0, 1)
        _, found = lax.scan(read, network.start(codes.shape[0]), pieces)
        found = found.swapaxes(0, 1)
        return found.reshape(codes.shape[0], -1, *found.shape[3:])[:, -count:]
