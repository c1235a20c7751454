"""Running combinations that the spaces are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

import torch

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Layout, Shape, Tree
from molehill_server.aggregation.interfaces import Combined, Weight
from molehill_server.aggregation.lowrank import concat, fold
from molehill_server.records import Global, LowRank, Pair, Update, pairs


class FactorSum:
    """Weighted mean of every tensor, one update in memory at a time.

    The mean is kept normalised: update k moves it by ``w_k / (w_1 + .. + w_k)`` of the way, in place. So a tensor
    whose weights are all 0 is never written, a single client comes back bit for bit, and no second pass divides.
    Neighbouring tensors that move by the same step are one operation; equal weights make it one per update.

    Args:
        glob: The model the round started from.
    """

    def __init__(self, glob: Global) -> None:
        self._old = glob.tree
        self._tree = glob.tree.copy()
        self._flat = torch.from_numpy(self._tree.flat)
        self._totals = dict.fromkeys(glob.tree, 0.0)
        self._rows: dict[Key, int] = {}  # of A, sent by anybody
        self._layout = Layout({})
        self._slots: list[_Slot] = []

    def add(self, update: Update, weight: Weight) -> None:
        """Move the mean towards one update.

        Raises:
            MessageError: The update holds a tensor the model does not have, or a larger one.
        """
        if update.tree.layout != self._layout:  # most updates of a round have the same
            self._slots = _slots(update, self._tree.layout)
            self._layout = update.tree.layout
        source = _tensor(update.tree.flat)
        for theirs, ours, step in _runs(self._fitting(update, weight)):
            self._flat[ours].lerp_(source[theirs], step)

    def _fitting(self, update: Update, weight: Weight) -> Iterator[tuple[_Slot, float]]:
        """Tensors with weight and the step each one takes; those of another shape are dealt with on the way."""
        totals = self._totals
        for slot in self._slots:
            key = slot.key
            w = weight.of(key)
            if w <= 0:
                continue
            totals[key] += w
            if slot.rank:
                self._rows[key] = max(self._rows.get(key, 0), slot.rank)
            if slot.fits:
                yield slot, w / totals[key]
            else:
                self._pad(key, _tensor(update.tree[key]), w / totals[key], update.client)

    def _pad(self, key: Key, theirs: torch.Tensor, step: float, client: str) -> None:
        """Average a factor of lower rank, as if filled up with zeros (HetLoRA, https://arxiv.org/abs/2401.06432)."""
        require_fit(key, tuple(theirs.shape), self._tree.layout, client)
        ours = torch.from_numpy(self._tree[key])
        ours = ours.T if key.role == "B" else ours  # rank first
        theirs = theirs.T if key.role == "B" else theirs
        ours[: len(theirs)].lerp_(theirs, step)
        ours[len(theirs) :].mul_(1.0 - step)

    def finish(self) -> Combined:
        """The means; the sum must not be used afterwards.

        Rows of A beyond every client's rank are the old ones. Their columns of B are 0, so the product is the same,
        but with both at 0 they would never learn again.
        """
        for key, rows in self._rows.items():
            self._tree[key][rows:] = self._old[key][rows:]
        return Combined(self._tree, frozenset(key for key, total in self._totals.items() if total))


class ProductSum:
    """Weighted mean of every tensor, and of the product ``B A`` of every pair.

    A factor that a client did not send is the one it was sent.

    Args:
        glob: The model the round started from.
        folded: Keep at most min(d_out, d_in) columns per pair, so that memory does not grow with the number of
            clients; False keeps the clients' own factors side by side.
    """

    def __init__(self, glob: Global, *, folded: bool) -> None:
        self._glob = glob
        self._folded = folded
        self._means = FactorSum(glob)
        self._points: dict[Pair, list[tuple[float, LowRank]]] = {}

    def add(self, update: Update, weight: Weight) -> None:
        """Take in one update; its factors stay in memory until they are folded."""
        self._means.add(update, weight)
        for pair in pairs(update.tree):
            w = weight.experts[pair]
            if w > 0:
                points = self._points.setdefault(pair, [])
                points.append((w, factors(update.tree, self._glob.tree, pair)))
                if self._folded and sum(p.rank for _, p in points) > min(points[0][1].shape):
                    total, mean = _mean(points)
                    points[:] = [(total, fold(mean))]

    def finish(self) -> Combined:
        """The means; the sum must not be used afterwards."""
        combined = self._means.finish()
        products = {pair: _mean(points)[1] for pair, points in self._points.items()}
        return Combined(combined.tree, combined.touched, products)


def require_fit(key: Key, shape: Shape, ours: Layout, client: str) -> None:
    """Refuse a tensor that is not the model's; a factor may be of lower rank.

    Raises:
        MessageError: The model has no such tensor, or one of another shape.
    """
    if key not in ours:
        raise MessageError(f"the model has no tensor {key.name}", where=client)
    theirs, wanted = (shape[::-1], ours[key][::-1]) if key.role == "B" else (shape, ours[key])  # rank first
    smaller = key.role in ("A", "B") and theirs[1:] == wanted[1:] and theirs[0] <= wanted[0]
    if not (shape == ours[key] or smaller):
        raise MessageError(f"tensor {key.name} does not fit {list(ours[key])}", where=client)


def factors(tree: Tree, old: Tree, pair: Pair) -> LowRank:
    """The product of one expert; a factor that ``tree`` lacks comes from ``old``, cut to the other one's rank."""
    a, b = Key(*pair, "A"), Key(*pair, "B")
    rank = tree.layout[a][0] if a in tree else tree.layout[b][1]
    return LowRank(
        B=tree[b] if b in tree else old[b][:, :rank],
        A=tree[a] if a in tree else old[a][:rank],
    )


def _mean(points: list[tuple[float, LowRank]]) -> tuple[float, LowRank]:
    total = sum(w for w, _ in points)
    return total, concat([point for _, point in points], [w / total for w, _ in points])


class _Slot(NamedTuple):
    """Where a tensor lies in an update's flat vector and in the model's."""

    key: Key
    theirs: int
    ours: int
    size: int  # numbers
    rank: int  # rows of A; 0 for anything else
    fits: bool  # same shape in both


def _slots(update: Update, ours: Layout) -> list[_Slot]:
    theirs = update.tree.layout
    slots = []
    for key, shape in theirs.items():
        if key not in ours:
            raise MessageError(f"the model has no tensor {key.name}", where=update.client)
        rank = shape[0] if key.role == "A" else 0
        slots.append(_Slot(key, theirs.offsets[key], ours.offsets[key], prod(shape), rank, shape == ours[key]))
    return slots


def _runs(steps: Iterable[tuple[_Slot, float]]) -> Iterator[tuple[slice, slice, float]]:
    """Longest stretches that lie side by side in both flat vectors and take the same step."""
    start = target = length = 0
    last = 0.0
    for slot, step in steps:
        if step == last and slot.theirs == start + length and slot.ours == target + length:
            length += slot.size
            continue
        if length:
            yield slice(start, start + length), slice(target, target + length), last
        start, target, length, last = slot.theirs, slot.ours, slot.size, step
    if length:
        yield slice(start, start + length), slice(target, target + length), last


def _tensor(array: Array) -> torch.Tensor:
    """A tensor over the same memory; a copy when the array is read-only, which torch cannot express."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
