"""How expert weights become small: per-rank scales, so that every expert can be replaced without touching another.

An expert's part of a site is ``delta = ((x A) * gate) B`` with A ``[d_in, R]`` and B ``[R, d_out]``. A rank's column of
A and row of B may be rescaled against each other, so both carry one scale per rank, and the two are multiplied into
the scale of A's column, where the integer product needs one anyway. B keeps a second scale per output that all experts
of the site share; it is chosen once, when the bundle is made. This costs one number per rank and one per output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.float32]
_TINY = np.float32(1e-20)
# Processors without VNNI add two products in 16 bits, so 255 * LEVELS8 * 2 has to stay below 2**15: full 8 bits
# would be cut off there in silence, with errors of several percent.
LEVELS8 = 64
_LEVELS = {8: LEVELS8, 4: 7}


class Quantised(NamedTuple):
    """The factors of some ranks at one site as integers.

    Attributes:
        a: ``[d_in, R]`` int8 in the range of the width.
        a_scale: One per rank ``[R]``, or per block of inputs and rank ``[ceil(d_in / block), R]``; B's is absorbed.
        b: ``[R, d_out]`` int8.
    """

    a: NDArray[np.int8]
    a_scale: Float
    b: NDArray[np.int8]


def output_scale(b: Float) -> Float:
    """The scale per output that the experts of a site share.

    Args:
        b: ``[R, d_out]`` of all experts.

    Returns:
        ``[d_out]``, 1 where all is zero: the largest part that an output has in any rank.
    """
    share = np.abs(b) / np.maximum(np.abs(b).max(1, keepdims=True, initial=0), _TINY)
    scale = share.max(0, initial=0)
    return np.where(scale > 0, scale, 1).astype(np.float32)


def quantise(a: Float, b: Float, b_scale: Float, bits: int, block: int | None = None) -> Quantised:
    """Round the factors of some ranks.

    Args:
        a: ``[d_in, R]``.
        b: ``[R, d_out]``.
        b_scale: ``[d_out]``, of `output_scale`.
        bits: 8 or 4; values are symmetrical around 0.
        block: Inputs that share a scale of A; all when None.
    """
    top = _LEVELS[bits]
    scaled = b / b_scale
    rank = np.maximum(np.abs(scaled).max(1, keepdims=True, initial=0), _TINY) / top
    blocks = _blocks(a, block)  # [n, block, R]
    size = np.maximum(np.abs(blocks).max(1, keepdims=True, initial=0), _TINY) / top
    rounded = np.rint(blocks / size).astype(np.int8).reshape(-1, a.shape[1])[: len(a)]
    scale = (size[:, 0] * rank.T).astype(np.float32)
    return Quantised(rounded, scale if block else scale[0], np.rint(scaled / rank).astype(np.int8))


def pack4(q: NDArray[np.int8], block: int) -> NDArray[np.uint8]:
    """Weights as MatMulNBits stores them.

    Args:
        q: ``[K, N]`` in -8..7.
        block: Inputs of a block, at least 16 and a power of two.

    Returns:
        ``[N, ceil(K / block), block / 2]``: two to a byte, the earlier one low, 8 for zero.
    """
    values = _blocks((q + 8).astype(np.uint8), block, fill=8).transpose(2, 0, 1)
    return np.ascontiguousarray(values[..., ::2] | (values[..., 1::2] << 4))


def unpack4(packed: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    """Undo `pack4`; ``size`` is K."""
    values = np.stack([packed & 15, packed >> 4], -1).astype(np.int8) - 8
    return np.ascontiguousarray(values.reshape(len(packed), -1).T[:size])


def block_of(size: int, largest: int) -> int:
    """The block of a product over ``size`` inputs: ``largest``, or less where that holds them all; at least 16."""
    block = 16
    while block < min(size, largest):
        block *= 2
    return block


def _blocks(values: NDArray[Any], block: int | None, fill: float = 0) -> NDArray[Any]:
    """``[K, R]`` to ``[n, block, R]``, padded."""
    block = block or len(values)
    short = -len(values) % block
    if short:
        values = np.concatenate([values, np.full((short, *values.shape[1:]), fill, values.dtype)])
    return values.reshape(-1, block, *values.shape[1:])
