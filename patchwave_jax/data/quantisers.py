"""8-bit quantisers between 16-bit PCM and the 256 codes of the models.

An NLL means nothing without its quantiser, so the quantiser's name is part of every configuration,
checkpoint and result.

| name      | codes                                                                         |
|-----------|-------------------------------------------------------------------------------|
| `mulaw`   | mu-law, mu 255, full scale 32768, rounded to the nearest level (the default)   |
| `linear`  | the upper 8 bits                                                               |
| `sashimi` | each clip scaled by its own minimum and maximum to [-1, 1], then mu-law, then  |
|           | `trunc(u * 255.99 + 0.005)`: how the published YouTube-Mix numbers were made.  |
|           | It looks ahead at the clip's peak: for comparison only                         |
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Float32, Int16, UInt8

from patchwave_jax.errors import UserError

NUM_CODES = 256
SILENCE = 128  # the code of PCM 0, and of samples before the start
FULL_SCALE = 32768
NAMES = ("mulaw", "linear", "sashimi")


def _compress(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.log1p(255 * np.abs(x)) / np.log1p(255)


def _expand(y: np.ndarray) -> np.ndarray:
    return np.sign(y) * np.expm1(np.abs(y) * np.log1p(255)) / 255


@dataclasses.dataclass(frozen=True, eq=False)
class Quantiser:
    """One quantiser. `centres` and `edges` are its 256 bins in the waveform, full scale 1."""

    name: str
    centres: Float32[np.ndarray, "256"]
    edges: Float32[np.ndarray, "257"]

    def encode(self, pcm: Int16[np.ndarray, "*clips T"]) -> UInt8[np.ndarray, "*clips T"]:
        """Codes of `pcm`. `sashimi` scales each clip (the last axis) by its own extremes."""
        pcm = np.asarray(pcm)
        if pcm.dtype != np.int16:
            raise TypeError(f"encode takes int16 PCM, got {pcm.dtype}")
        if self.name == "sashimi":
            return sashimi_encode(pcm.astype(np.float32) / np.float32(FULL_SCALE))
        return _table(self.name)[pcm.view(np.uint16)]

    def decode(self, codes: UInt8[np.ndarray, "*shape"]) -> Int16[np.ndarray, "*shape"]:
        """PCM at the centre of each code's bin (for `sashimi`, of a clip that fills the scale)."""
        pcm = np.round(self.centres.astype(np.float64) * FULL_SCALE)
        return np.clip(pcm, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)[codes]


def sashimi_encode(waveform: Float[np.ndarray, "*clips T"]) -> UInt8[np.ndarray, "*clips T"]:
    """The published pipeline's codes, in its float32 arithmetic (Goel et al. 2022, code)."""
    one, eps = np.float32(1), np.float32(1e-6)
    x = waveform.astype(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scaled = (x - low) / (high - low + eps) * np.float32(2) - one
    magnitude = np.log1p(np.float32(255) * np.abs(scaled + np.float32(1e-8)))
    unit = (np.sign(scaled) * magnitude / np.log1p(np.float32(255)) + one) / np.float32(2)
    return np.trunc(unit * np.float32(255.99) + np.float32(0.005)).astype(np.uint8)


@functools.cache
def _table(name: str) -> UInt8[np.ndarray, "65536"]:
    """Code of every int16 value, indexed by its bits as uint16."""
    pcm = np.arange(65536, dtype=np.uint16).view(np.int16)
    if name == "linear":
        return ((pcm.astype(np.int32) + FULL_SCALE) >> 8).astype(np.uint8)
    level = (_compress(pcm.astype(np.float64) / FULL_SCALE) + 1) / 2 * 255
    return np.floor(level + 0.5).astype(np.uint8)


@functools.cache
def get(name: str) -> Quantiser:
    """The quantiser called `name`, one of `NAMES`."""
    codes, borders = np.arange(256, dtype=np.float64), np.arange(257, dtype=np.float64)
    if name == "mulaw":
        centres, edges = _expand(codes / 255 * 2 - 1), _expand((borders - 0.5) / 255 * 2 - 1)
    elif name == "linear":
        centres, edges = (codes + 0.5) / 128 - 1, borders / 128 - 1
    elif name == "sashimi":
        edges = _expand((borders - 0.005) / 255.99 * 2 - 1)
        centres = _expand((codes + 0.495) / 255.99 * 2 - 1)
    else:
        raise UserError(f"quantiser {name!r} is unknown; use one of {', '.join(NAMES)}")
    return Quantiser(name, centres.astype(np.float32), edges.astype(np.float32))
