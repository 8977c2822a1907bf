"""Pseudo-random integers that never change: functions of a key alone, in integer arithmetic and SHA-256.

numpy does not promise that its generators' streams stay the same from one version to the next. Data order and
generated text are part of an experiment's identity, so they come from here.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray


class Draws:
    """A stream of 64-bit integers: SHA-256 over (key, counter), four draws a block."""

    def __init__(self, *key: int | str) -> None:
        self._key = repr(key).encode()
        self._block = 0
        self._words: list[int] = []

    def bits(self) -> int:
        if not self._words:
            digest = hashlib.sha256(self._key + self._block.to_bytes(8, "little")).digest()
            self._words = list(struct.unpack("<4Q", digest))
            self._block += 1
        return self._words.pop()

    def below(self, n: int) -> int:
        """A draw from 0 .. n-1; the bias of the modulo is below n / 2**64."""
        return self.bits() % n


def scatter(values: NDArray[np.uint64], *key: int | str) -> NDArray[np.uint64]:
    """64-bit hashes of 64-bit integers under a key: a bijection, so different values never collide.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 17; constants of Stafford's variant 13).
    """
    z = np.asarray(values, np.uint64) + np.uint64(Draws(*key).bits())
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def permutation(n: int, *key: int | str) -> NDArray[np.int64]:
    """0 .. n-1 in an order that depends on n and the key alone."""
    # The increment is SplitMix64's: consecutive integers must not enter the finaliser as neighbours.
    spread = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return np.argsort(scatter(spread, *key), kind="stable").astype(np.int64)
