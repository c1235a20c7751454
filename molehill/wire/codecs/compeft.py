"""ComPEFT: a sparse ternary delta (Yadav, Choshen, Raffel & Bansal 2023, https://arxiv.org/abs/2311.13171)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from molehill.errors import MessageError
from molehill.registry import register
from molehill.wire import positions
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import Segments, split_head
from molehill.wire.tree import Array, Layout, Tree

_HEAD = struct.Struct("<Q")  # kept numbers


@dataclass(frozen=True)
class CompeftParams:
    """Parameters of `Compeft`.

    Attributes:
        density: Fraction of all numbers that is kept; the paper searches 5 % to 50 %.
        scale: ``mean`` of the kept magnitudes (sparse ternary compression, Sattler et al. 2019,
            https://arxiv.org/abs/1903.02891) or ``std`` of all numbers (the paper).
        alpha: Factor on the scale; the paper searches 0.5 to 10 for ``std``. With feedback keep it near 1: a scale
            far above the magnitudes that are sent makes what is left unsent grow.
        over: One scale per ``tensor``, or one for the whole ``tree`` (the paper; A and B differ in size, though).
        positions: How the kept positions are written; ``auto`` is the shortest.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    scale: Literal["mean", "std"] = "mean"
    alpha: Annotated[float, Field(gt=0, le=100)] = 1.0
    over: Literal["tensor", "tree"] = "tensor"
    positions: Literal["auto", "mask", "gap", "golomb"] = "auto"


@register(
    "codec",
    "compeft",
    paper="Yadav et al. 2023, ComPEFT",
    url="https://arxiv.org/abs/2311.13171",
    seeds=("S26",),
    params=CompeftParams,
)
class Compeft(Codec):
    """Keep the largest numbers of the whole tree, send their signs and one scale per tensor.

    ``x ~ s sign(x)`` for the top ``density`` by magnitude, else 0. What is dropped stays in the memory and is sent
    later (error feedback: Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847), so that over the rounds the sum
    of what arrives approaches the sum of what was to be sent.
    """

    feedback = True

    def __init__(self, params: CompeftParams) -> None:
        self.params = params

    def encode(self, tree: Tree, memory: dict[Key, Array] | None = None) -> bytes:
        """Encode; see `Codec.encode`. Ties at the threshold go to the lower index."""
        wanted = _with_memory(tree, memory)
        flat, runs = wanted.flat, self._runs(tree.layout)
        kept = _top(np.abs(flat), self.params.density)
        scales = self._scales(flat, kept, runs)
        if not np.isfinite(scales).all():
            raise MessageError("a scale is above the range of float32", mend="Use a smaller alpha.")
        if memory is not None:
            sent = np.where(kept, np.copysign(runs.spread(scales), flat), np.float32(0))
            left = Tree(tree.layout, flat - sent).require_finite()
            memory.update({key: left[key].copy() for key in left})
        signs = np.packbits(np.signbit(flat[kept]))
        head = _HEAD.pack(int(kept.sum())) + scales.astype("<f4").tobytes() + signs.tobytes()
        return head + positions.encode(kept, self.params.positions)

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Tree:
        """Decode; see `Codec.decode`."""
        runs = self._runs(layout)
        (count,), rest = split_head(payload, _HEAD)
        width = 4 * len(runs)
        start = width + -(-count // 8)
        if count > _most(layout.size, self.params.density) or len(rest) < start:
            raise MessageError(f"payload of {len(rest)} bytes cannot hold {count} of {layout.size} numbers")
        kept = positions.decode(rest[start:], count, layout.size)
        signs = np.unpackbits(np.frombuffer(rest[width:start], np.uint8), count=count)
        ternary = np.zeros(layout.size, np.int8)
        ternary[kept] = 1 - 2 * signs.view(np.int8)
        flat = runs.spread(np.abs(np.frombuffer(rest[:width], "<f4").astype(np.float32)))
        with np.errstate(invalid="ignore"):
            flat *= ternary
        return Tree(layout, flat).require_finite()

    def _runs(self, layout: Layout) -> Segments:
        return Segments.tensors(layout) if self.params.over == "tensor" else Segments.whole(layout)

    def _scales(self, flat: Array, kept: NDArray[np.bool_], runs: Segments) -> Array:
        """One scale per run, ``alpha`` times the mean of the kept magnitudes or the standard deviation of all."""
        wide = flat.astype(np.float64)
        if self.params.scale == "mean":
            counts = runs.sums(kept.astype(np.float64))
            scales = runs.sums(np.where(kept, np.abs(wide), 0)) / np.maximum(counts, 1)
        else:
            mean = runs.sums(wide) / runs.lengths
            scales = np.sqrt(runs.sums((wide - np.repeat(mean, runs.lengths)) ** 2) / runs.lengths)
        with np.errstate(over="ignore"):
            return (self.params.alpha * scales).astype(np.float32)


def _with_memory(tree: Tree, memory: dict[Key, Array] | None) -> Tree:
    """What is to be sent: the tree and what earlier calls left unsent."""
    tree.require_finite()
    known = {key: memory[key] for key in tree if key in memory} if memory else {}
    if not known:
        return tree
    wanted = tree.copy()
    for key, left in known.items():
        if left.shape != tree.layout[key]:
            raise MessageError(
                f"what is left unsent has shape {list(left.shape)}, the tensor {list(tree.layout[key])}",
                where=key.name,
                mend="Start from an empty memory when ranks change.",
            )
        wanted[key][...] += left
    return wanted.require_finite()


def _most(size: int, density: float) -> int:
    """How many of ``size`` numbers are kept at most."""
    return min(size, max(1, round(density * size)))


def _top(sizes: Array, density: float) -> NDArray[np.bool_]:
    """Mark the largest ``density`` of all sizes (at least one, never a zero), ``[n]``."""
    keep = _most(len(sizes), density)
    if keep == len(sizes):
        return np.asarray(sizes > 0)
    least = np.partition(sizes, len(sizes) - keep)[len(sizes) - keep]
    kept: NDArray[np.bool_] = sizes > least
    if least > 0:
        ties = np.flatnonzero(sizes == least)
        kept[ties[: keep - int(kept.sum())]] = True
    return kept
