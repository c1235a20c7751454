"""Masks: long streams of uniform numbers modulo 2^64 that follow from a short key."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from molehill.secure.keys import Occasion, agree

Numbers = NDArray[np.uint64]

_CHUNK = 2**17  # numbers, 1 MiB


def add_mask(numbers: Numbers, key: bytes, *, subtract: bool = False) -> None:
    """Add the mask of a key to numbers, modulo 2^64 and in place.

    The stream is AES-256 in counter mode from 0, read as little-endian numbers; the processor's own instructions make
    it as fast as memory. A key must be used for one mask only.

    Args:
        numbers: ``[n]``.
        key: 32 bytes.
        subtract: Take the mask off instead.
    """
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    zeros, out = bytes(8 * min(_CHUNK, len(numbers))), bytearray(8 * min(_CHUNK, len(numbers)) + 15)
    for start in range(0, len(numbers), _CHUNK):
        part = numbers[start : start + _CHUNK]
        stream.update_into(memoryview(zeros)[: 8 * len(part)], out)
        mask = np.frombuffer(out, "<u8", len(part))
        if subtract:
            part -= mask
        else:
            part += mask


def add_common_mask(
    numbers: Numbers, key: bytes, name: str, other_key: bytes, other: str, occasion: Occasion, *, undo: bool = False
) -> None:
    """Add the mask that a client has in common with another one, who subtracts it.

    Args:
        numbers: ``[n]``, changed in place.
        key: The client's private key.
        name: The client.
        other_key: The public key of the other one.
        other: The other one.
        occasion: What the keys are for.
        undo: Take it off again.

    Raises:
        MessageError: The public key is none.
    """
    secret = agree(key, other_key, occasion.label("mask", *sorted((name, other))))
    add_mask(numbers, secret, subtract=(name > other) != undo)
