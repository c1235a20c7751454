"""Running combinations that the spaces are made of."""

from __future__ import annotations

from itertools import compress

import numpy as np
import torch

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill.wire.tree import Array, Layout, Shape, Tree
from molehill_server.aggregation.interfaces import Combined, Weight
from molehill_server.aggregation.lowrank import concat, fold
from molehill_server.aggregation.stretches import Stretches
from molehill_server.records import Global, LowRank, Pair, Update, pairs


class FactorSum:
    """Weighted mean of every tensor, one update in memory at a time.

    The mean is kept normalised: update k moves it by ``w_k / (w_1 + .. + w_k)`` of the way, in place. So a tensor
    whose weights are all 0 is never written, a single client comes back bit for bit, and no second pass divides.
    Neighbouring tensors are one operation, be their steps the same or not; see `Stretches`.

    Args:
        glob: The model the round started from.
    """

    def __init__(self, glob: Global) -> None:
        self._old = glob.tree
        self._tree = glob.tree.copy()
        self._flat = torch.from_numpy(self._tree.flat)
        self._keys = list(glob.tree)
        self._totals = np.zeros(len(self._keys))
        self._rows = np.zeros(len(self._keys), np.intp)  # of A, sent by anybody
        self._layout: Layout | None = None
        self._stretches = Stretches(Layout({}), glob.tree.layout, "")

    def add(self, update: Update, weight: Weight) -> None:
        """Move the mean towards one update.

        Raises:
            MessageError: The update holds a tensor the model does not have, or a larger one.
        """
        if update.tree.layout != self._layout:  # most updates of a round have the same
            self._stretches = Stretches(update.tree.layout, self._tree.layout, update.client)
            self._layout = update.tree.layout
        lie = self._stretches
        weights = lie.weights(weight)
        move, at = weights > 0, lie.index
        weights[~move] = 0.0
        self._totals[at] += weights
        self._rows[at] = np.maximum(self._rows[at], lie.rows * move)
        steps = np.divide(weights, self._totals[at], out=np.zeros_like(weights), where=move)
        source = _tensor(update.tree.flat)
        for block in lie.blocks(move & lie.fits, steps):
            theirs, ours = (flat.view(len(block.steps), -1) for flat in (source[block.theirs], self._flat[block.ours]))
            ours.lerp_(theirs, torch.from_numpy(block.steps[:, None].astype(np.float32)))
        for place in np.flatnonzero(move & ~lie.fits):
            key = lie.keys[place]
            self._pad(key, _tensor(update.tree[key]), float(steps[place]), update.client)

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
        for key, rows, total in zip(self._keys, self._rows.tolist(), self._totals.tolist(), strict=True):
            if key.role == "A" and total and rows < len(self._tree[key]):
                self._tree[key][rows:] = self._old[key][rows:]
        return Combined(self._tree, frozenset(compress(self._keys, self._totals)))


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


def _tensor(array: Array) -> torch.Tensor:
    """A tensor over the same memory; a copy when the array is read-only, which torch cannot express."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
