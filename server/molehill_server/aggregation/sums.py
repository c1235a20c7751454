"""Running combinations that the spaces are made of."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Layout, Tree
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
        self._totals: dict[Key, float] = {}
        self._rows: dict[Key, int] = {}  # of A, sent by anybody

    def add(self, update: Update, weight: Weight) -> None:
        """Move the mean towards one update.

        Raises:
            MessageError: The update holds a tensor the model does not have, or a larger one.
        """
        source = _tensor(update.tree.flat)
        steps = self._steps(update, weight)
        for theirs, ours, step in _runs(update.tree.layout, self._tree.layout, steps):
            self._flat[ours].lerp_(source[theirs], step)
        for key, step in steps.items():
            if step and update.tree.layout[key] != self._tree.layout[key]:
                self._pad(key, _tensor(update.tree[key]), step, update.client)

    def _steps(self, update: Update, weight: Weight) -> dict[Key, float]:
        steps = {}
        for key, shape in update.tree.layout.items():
            if key not in self._tree:
                raise MessageError(f"the model has no tensor {key.name}", where=update.client)
            w = weight.of(key)
            if w > 0:
                self._totals[key] = self._totals.get(key, 0.0) + w
                if key.role == "A":
                    self._rows[key] = max(self._rows.get(key, 0), shape[0])
            steps[key] = w / self._totals[key] if w > 0 else 0.0
        return steps

    def _pad(self, key: Key, theirs: torch.Tensor, step: float, client: str) -> None:
        """Average a factor of lower rank, as if filled up with zeros (HetLoRA, https://arxiv.org/abs/2401.06432)."""
        ours = torch.from_numpy(self._tree[key])
        ours = ours.T if key.role == "B" else ours  # rank first
        theirs = theirs.T if key.role == "B" else theirs
        if key.role not in ("A", "B") or theirs.shape[1:] != ours.shape[1:] or len(theirs) > len(ours):
            raise MessageError(f"tensor {key.name} does not fit {list(self._tree.layout[key])}", where=client)
        ours[: len(theirs)].lerp_(theirs, step)
        ours[len(theirs) :].mul_(1.0 - step)

    def finish(self) -> Combined:
        """The means; the sum must not be used afterwards.

        Rows of A beyond every client's rank are the old ones. Their columns of B are 0, so the product is the same,
        but with both at 0 they would never learn again.
        """
        for key, rows in self._rows.items():
            self._tree[key][rows:] = self._old[key][rows:]
        return Combined(self._tree, frozenset(self._totals))


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


def _runs(theirs: Layout, ours: Layout, steps: dict[Key, float]) -> Iterator[tuple[slice, slice, float]]:
    """Longest stretches that lie side by side in both flat vectors and take the same step."""
    start = target = length = 0
    last = 0.0
    for key, shape in theirs.items():
        step, size = steps[key], prod(shape)
        if shape != ours[key]:
            step = 0.0  # padded on its own
        here, there = theirs.offsets[key], ours.offsets[key]
        if step == last and here == start + length and there == target + length:
            length += size
            continue
        if last:
            yield slice(start, start + length), slice(target, target + length), last
        start, target, length, last = here, there, size, step
    if last:
        yield slice(start, start + length), slice(target, target + length), last


def _tensor(array: Array) -> torch.Tensor:
    """A tensor over the same memory; a copy when the array is read-only, which torch cannot express."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
