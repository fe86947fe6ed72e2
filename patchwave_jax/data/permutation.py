"""A keyed pseudo-random permutation of [0, size), computed pointwise: no table, size to 2**62.

A Feistel network on the next even number of bits, with cycle walking: points that are mapped beyond
`size` are mapped again until they are not. The network is a bijection for any round function, and
so is cycle walking.
"""

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 8
MAX_SIZE = 2**62


def permute(index: Int64[np.ndarray, " n"], size: int, *key: int) -> Int64[np.ndarray, " n"]:
    """The image of each index under the permutation of [0, size) given by `key`.

    Args:
      index: Integers in [0, size).
      size: From 1 to 2**62.
      *key: Integers in [0, 2**64). Different keys give unrelated permutations.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= size <= MAX_SIZE or (index < 0).any() or (index >= size).any():
        raise ValueError(f"index outside [0, {size}), or size outside [1, 2**62]")
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = random_bits(_ROUNDS, *key)
    point = _feistel(index.astype(np.uint64), half_bits, round_keys)
    while (outside := point >= size).any():
        point[outside] = _feistel(point[outside], half_bits, round_keys)
    return point.astype(np.int64)


def random_bits(count: int, *key: int) -> UInt64[np.ndarray, " count"]:
    """Random 64-bit words, a function of all parts of `key`."""
    # SeedSequence pads with zeros and joins the words of large integers: use fixed widths.
    words = [len(key), *(word for part in key for word in (part & 0xFFFFFFFF, part >> 32))]
    return np.random.SeedSequence(words).generate_state(count, np.uint64)


def _feistel(
    point: UInt64[np.ndarray, " n"], half_bits: np.uint64, round_keys: UInt64[np.ndarray, " r"]
) -> UInt64[np.ndarray, " n"]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = point >> half_bits, point & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return left << half_bits | right


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014). Arithmetic is modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
