"""Building blocks of the codecs: bounded zstd, 16-bit floats with a common exponent, segments of the flat vector."""

from __future__ import annotations

import math
import struct
from typing import TypeAlias

import numpy as np
import zstandard
from numpy.typing import NDArray

from molehill.errors import MessageError
from molehill.wire.tree import Array, Layout

Ints: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]

_LEVEL = 3
_HALF_EXPONENT = 15  # the largest value of a scaled vector lies in [2^14, 2^15): inside float16, whose end is 65504
_SHORTEST_RUN = 64
_MAX_EXPONENT = 200  # float32 needs -148 to 128


def compress(data: bytes) -> bytes:
    """Compress to one zstd frame that declares its content size."""
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(data)


def expand(data: bytes | memoryview, most: int) -> bytes:
    """Expand one zstd frame of at most ``most`` bytes of content; the size is checked before memory is taken.

    Raises:
        MessageError: Not exactly one frame with a declared size of at most ``most``, or damaged.
    """
    try:
        # CONTENTSIZE_UNKNOWN and CONTENTSIZE_ERROR are above every real bound.
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= most:
            raise MessageError(f"compressed part declares {size} bytes, at most {most} fit here")
        content = zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MessageError(f"compressed part is damaged ({error})") from None
    if len(content) != size:
        raise MessageError(f"compressed part holds {len(content)} bytes but declares {size}")
    return content


def expand_exactly(data: bytes | memoryview, size: int) -> bytes:
    """Expand one zstd frame of exactly ``size`` bytes of content.

    Raises:
        MessageError: As `expand`, or another size.
    """
    content = expand(data, size)
    require_length(len(content), size)
    return content


def split_head(payload: bytes | memoryview, head: struct.Struct) -> tuple[tuple[int, ...], memoryview]:
    """The whole numbers at the start of a payload, and the rest.

    Raises:
        MessageError: The payload is shorter than its head.
    """
    view = memoryview(payload)
    if len(view) < head.size:
        raise MessageError(f"payload holds {len(view)} bytes, its head alone needs {head.size}")
    return head.unpack_from(view), view[head.size :]


def require_length(found: int, expected: int) -> None:
    """Refuse a payload of another length.

    Raises:
        MessageError: ``found`` is not ``expected`` (both in bytes).
    """
    if found != expected:
        raise MessageError(f"payload holds {found} bytes, its layout needs {expected}")


def pack(data: Bytes, *, zstd: bool) -> bytes:
    """Bytes of an array, compressed if asked for."""
    return compress(data.tobytes()) if zstd else data.tobytes()


def unpack(data: bytes | memoryview, size: int, *, zstd: bool) -> Bytes:
    """Undo `pack` for an array of ``size`` bytes.

    Raises:
        MessageError: Another size, or damaged.
    """
    if zstd:
        data = expand_exactly(data, size)
    require_length(len(data), size)
    return np.frombuffer(data, np.uint8)


def planes(values: NDArray[np.generic]) -> Bytes:
    """All first bytes of the values, then all second bytes, and so on: like bytes side by side compress better."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.ravel()


def unplanes(data: Bytes, dtype: str) -> NDArray[np.generic]:
    """Undo `planes`."""
    width = np.dtype(dtype).itemsize
    values = np.empty((len(data) // width, width), np.uint8)
    for index, plane in enumerate(data.reshape(width, -1)):  # a transposed copy takes six times as long
        values[:, index] = plane
    return values.view(dtype).ravel()


def to_half(values: Array) -> tuple[int, NDArray[np.float16]]:
    """Round to float16 after scaling by a common power of two, so that nothing overflows and little underflows.

    Plain float16 loses the small steps of a fine-tune (below 6e-5 its precision falls); scaled, 28 binary orders
    under the largest value keep all 11 bits. A power of two costs no precision.

    Args:
        values: Finite, any shape.

    Returns:
        The exponent ``e`` and the float16 values; the original is about ``half * 2**e``.
    """
    peak = float(np.abs(values).max(initial=0.0))
    if peak == 0:
        return 0, np.zeros(values.shape, "<f2")
    mantissa, exponent = math.frexp(peak)
    exponent += math.frexp(float(np.float16(mantissa)))[1]  # 1 more when rounding carries, so that encoding repeats
    shift = _HALF_EXPONENT - exponent
    return -shift, times_power(values, shift).astype("<f2")


def from_half(half: NDArray[np.generic], exponent: int) -> Array:
    """Undo `to_half`; values out of range become infinite.

    Raises:
        MessageError: No float32 has this exponent.
    """
    if abs(exponent) > _MAX_EXPONENT:
        raise MessageError(f"exponent {exponent} is out of range")
    return times_power(half.astype(np.float32), exponent)


def times_power(values: Array, exponent: int) -> Array:
    """``values * 2**exponent`` for exponents up to 250 either way, though float32 has only 2^-126 to 2^127 exactly."""
    first = exponent // 2
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if -126 <= exponent <= 127:
            return values * np.float32(2.0**exponent)
        return values * np.float32(2.0**first) * np.float32(2.0 ** (exponent - first))


class Segments:
    """A partition of the flat vector into runs that share one scale.

    Args:
        starts: First index of every run, ascending from 0.
        size: Numbers in the flat vector.

    Attributes:
        lengths: Length of every run.
    """

    def __init__(self, starts: Ints, size: int) -> None:
        self.starts = starts
        self.size = size
        self.lengths: Ints = np.diff(starts, append=size)

    @classmethod
    def within(cls, layout: Layout, lengths: list[int]) -> Segments:
        """Runs of these lengths in each tensor, in the order of the layout; the last of a tensor may be shorter."""
        sizes = np.array([math.prod(shape) for shape in layout.values()], np.int64)
        runs = np.maximum(np.array(lengths, np.int64), 1)
        counts = -(-sizes // runs)
        index = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        return cls(np.repeat(np.cumsum(sizes) - sizes, counts) + index * np.repeat(runs, counts), layout.size)

    @classmethod
    def rows(cls, layout: Layout) -> Segments:
        """One run per row (last dimension) of every tensor; rows of less than 64 numbers are joined up to that.

        A scale for each of the short rows of ``B [d_out, r]`` would cost as much as a quarter of its numbers.
        """
        widths = [shape[-1] if shape else 1 for shape in layout.values()]
        return cls.within(layout, [width * -(-_SHORTEST_RUN // max(width, 1)) for width in widths])

    @classmethod
    def groups(cls, layout: Layout, size: int) -> Segments:
        """Runs of ``size`` numbers, none across two tensors."""
        return cls.within(layout, [size] * len(layout))

    @classmethod
    def tensors(cls, layout: Layout) -> Segments:
        """One run per tensor."""
        return cls.within(layout, [math.prod(shape) for shape in layout.values()])

    @classmethod
    def whole(cls, layout: Layout) -> Segments:
        """One run over all tensors."""
        return cls(np.zeros(min(1, layout.size), np.int64), layout.size)

    def __len__(self) -> int:
        return len(self.starts)

    def peaks(self, flat: Array) -> Array:
        """The largest magnitude of every run."""
        return np.maximum.reduceat(np.abs(flat), self.starts) if len(self) else np.zeros(0, np.float32)

    def sums(self, flat: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of every run."""
        return np.add.reduceat(flat, self.starts) if len(self) else np.zeros(0)

    def spread(self, per_run: Array) -> Array:
        """One value per run -> one value per number, ``[size]``."""
        return np.repeat(per_run, self.lengths)
