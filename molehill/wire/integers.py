"""Symmetric integers of 8 or 4 bits with one float16 step per run: what the integer codecs share."""

from __future__ import annotations

import struct
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.wire.packing import (
    Bytes,
    Segments,
    from_half,
    pack,
    planes,
    split_head,
    to_half,
    unpack,
    unplanes,
)
from molehill.wire.tree import Array

Bits: TypeAlias = Literal[4, 8]

_HEAD = struct.Struct("<h")  # common exponent of the steps
_NORMAL = np.float16(2.0**-14)  # below it float16 has fewer than 11 bits


def encode(flat: Array, runs: Segments, bits: Bits, *, zstd: bool) -> bytes:
    """Encode ``x ~ q s`` with whole ``|q| <= m = 2^(bits-1) - 1`` and ``s = max|run| / m`` per run.

    The error is at most ``s / 2`` (1 + 2^-11). A run whose step is 2^29 times below the largest becomes 0. Encoding
    what was decoded gives the same bytes.

    Args:
        flat: Finite, ``[n]``.
        runs: Which numbers share a step.
        bits: Of each number.
        zstd: Compress.
    """
    most = 2 ** (bits - 1) - 1
    exponent, half = to_half(runs.peaks(flat) / np.float32(most))
    half[half < _NORMAL] = 0
    steps = from_half(half, exponent)
    steps[steps == 0] = np.inf  # so that their numbers become 0
    codes = np.rint(flat / runs.spread(steps)).clip(-most, most).astype(np.int8).view(np.uint8)
    return _HEAD.pack(exponent) + pack(np.concatenate([planes(half), _join(codes, bits)]), zstd=zstd)


def decode(payload: bytes | memoryview, runs: Segments, bits: Bits, *, zstd: bool) -> Array:
    """Undo `encode`; values may be infinite or NaN when the payload was forged.

    Raises:
        MessageError: The payload is damaged or has another length than ``runs`` asks for.
    """
    (exponent,), rest = split_head(payload, _HEAD)
    width, size = 2 * len(runs), runs.size
    data = unpack(rest, width + -(-size * bits // 8), zstd=zstd)
    steps = from_half(unplanes(data[:width], "<f2"), exponent)
    with np.errstate(over="ignore", invalid="ignore"):
        return _part(data[width:], bits, size).astype(np.float32) * runs.spread(steps)


def _join(codes: Bytes, bits: Bits) -> Bytes:
    """Two's complement codes, ``[n]`` -> bytes; of 4 bits the even index is the low half of its byte."""
    if bits == 8:
        return codes
    pairs = np.zeros(len(codes) + len(codes) % 2, np.uint8)
    pairs[: len(codes)] = codes
    return np.asarray((pairs[::2] & 15) | (pairs[1::2] << 4), np.uint8)


def _part(data: Bytes, bits: Bits, size: int) -> NDArray[np.int8]:
    """Undo `_join`."""
    if bits == 8:
        return data.view(np.int8)
    codes = np.empty(2 * len(data), np.int8)
    # Shifting right as a signed number brings the sign of the half byte along.
    codes[::2] = (data << 4).view(np.int8) >> 4
    codes[1::2] = data.view(np.int8) >> 4
    return codes[:size]
