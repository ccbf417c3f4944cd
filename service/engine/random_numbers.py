"""The random number behind each sampled token, keyed by (seed, choice, position): no batch changes it. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MASK = (1 << 64) - 1


def stream_key(seed: int, choice: int) -> int:
    """64 bits that stand for one answer's stream of numbers. The seed may have any sign."""
    return int(_splitmix64(_splitmix64(_words(seed & MASK)) ^ _words(choice))[0])


def uniforms(keys: NDArray[np.uint64], positions: NDArray[np.int32]) -> NDArray[np.float32]:
    """Numbers in (0, 1) with 23 random bits: exact in fp32, and never so near 1 that rounding passes the total."""
    bits = _splitmix64(keys ^ positions.astype(np.uint64)) >> np.uint64(41)
    return ((bits.astype(np.float64) + 0.5) / (1 << 23)).astype(np.float32)


def _words(value: int) -> NDArray[np.uint64]:
    return np.array([value], dtype=np.uint64)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
