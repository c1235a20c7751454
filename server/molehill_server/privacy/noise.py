"""Gaussian noise that nobody can predict."""

from __future__ import annotations

import secrets

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

_KEY = 32  # bytes
_UNIFORM = 2.0**-53


class Noise:
    """A stream of independent standard normal numbers from ChaCha20 (RFC 8439).

    The key is 256 fresh bits of the operating system's generator (`secrets`), so that nothing which is stored or
    configured, such as the run's seed, gives the noise away. The sampler is Box-Muller on 53-bit uniform numbers; each
    number is half the sum of four draws, since the float grid of a single draw can betray what it was added to
    (Mironov 2012, https://doi.org/10.1145/2382196.2382264; the cure is that of Holohan & Braghin 2021,
    https://arxiv.org/abs/2107.10138, which Opacus uses too).

    Args:
        key: 32 bytes, for tests only.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = secrets.token_bytes(_KEY) if key is None else key
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def normal(self, count: int) -> NDArray[np.float64]:
        """The next ``count`` numbers, ``[count]``."""
        raw = np.frombuffer(self._stream.update(bytes(4 * 8 * count)), "<u8").reshape(4, count) >> 11
        uniform = (raw + 1.0) * _UNIFORM  # above 0, at most 1
        radius, angle = np.sqrt(-2 * np.log(uniform[:2])), 2 * np.pi * uniform[2:]
        draws: NDArray[np.float64] = (radius * np.cos(angle) + radius * np.sin(angle)).sum(axis=0) / 2
        return draws
