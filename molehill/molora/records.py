"""Records of equal shape, stacked: losses and diagnostics then cost a few operations, not a few per site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from molehill.molora.distributions import softmax
from molehill.molora.interfaces import Route, RouteRecord, Site
from molehill.molora.tokens import token_counts


class Stack:
    """Routes of R records of one shape; heads count as further tokens.

    Args:
        records: Records whose routes have one shape and whose masks are alike.

    Attributes:
        sites: Site of every record.
        records: The records.
    """

    def __init__(self, records: Sequence[RouteRecord]) -> None:
        self.records = records
        self.sites: list[Site] = [record.site for record in records]

    @property
    def n_experts(self) -> int:
        """Routed experts."""
        return self.records[0].route.logits.shape[-1]

    @cached_property
    def logits(self) -> Tensor:
        """Logits ``[R, B|1, T|1, E]``."""
        return self._stack([record.route.logits for record in self.records])

    @cached_property
    def weights(self) -> Tensor:
        """Final weights, same shape."""
        return self._stack([record.route.weights for record in self.records])

    @cached_property
    def selected(self) -> Tensor:
        """1 for the experts chosen, else 0, same shape."""
        if any("selected" in record.route.aux for record in self.records):
            chosen = self._stack([record.route.selected for record in self.records])
        else:
            chosen = self.weights > 0
        return chosen.to(self.weights.dtype)

    @cached_property
    def probs(self) -> Tensor:
        """Full distributions, same shape."""
        if any(record.route.distribution is not None for record in self.records):
            return self._stack([record.route.probs for record in self.records])
        return softmax(self.logits)

    @cached_property
    def counts(self) -> Tensor:
        """Real tokens behind every entry, ``[R|1, B|1, T|1]``; each of H heads counts 1 / H."""
        like = self.records[0].route.logits
        masks = [record.mask for record in self.records]
        one = all(mask is masks[0] for mask in masks)
        counts = torch.stack([token_counts(mask, like) for mask in (masks[:1] if one else masks)])
        heads = like.shape[2] if like.ndim == 4 else 1
        return counts.repeat_interleave(heads, dim=2) / heads

    @cached_property
    def costs(self) -> Tensor:
        """Relative size of every expert, ``[R, E]``."""
        return torch.stack([record.costs for record in self.records]).to(self.logits.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``[R, B|1, T|1, ...]`` over real tokens, ``[R, ...]``."""
        counts = self.counts.view(*self.counts.shape, *[1] * (values.ndim - 3))
        return (values * counts).sum((1, 2))

    def mean(self, values: Tensor) -> Tensor:
        """Mean of ``[R, B|1, T|1, ...]`` over real tokens, ``[R, ...]``; 0 when there are none."""
        total = self.counts.sum((1, 2)).clamp_min(1)
        return self.sum(values) / total.view(-1, *[1] * (values.ndim - 3))

    @staticmethod
    def _stack(tensors: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(tensors))
        return stacked.flatten(2, 3) if stacked.ndim == 5 else stacked


def stacks(records: Sequence[RouteRecord]) -> Iterator[Stack]:
    """Group records by shape."""
    groups: dict[tuple[object, ...], list[RouteRecord]] = {}
    for record in records:
        mask = None if record.mask is None else record.mask.shape
        types = None if record.types is None else record.types.shape
        groups.setdefault((record.route.logits.shape, mask, types), []).append(record)
    for group in groups.values():
        yield Stack(group)


def by_client(records: Sequence[RouteRecord], clients: int) -> list[list[RouteRecord]]:
    """Cut the records of a pass whose rows are C equal runs, one per client.

    Args:
        records: Of one pass; every route has an entry for every row.
        clients: C.

    Returns:
        The records of every client.
    """
    shared: dict[int, Sequence[Tensor]] = {}  # records that share a mask keep sharing it

    def cut(tensor: Tensor) -> Sequence[Tensor]:
        return torch.split(tensor, tensor.shape[0] // clients)

    def cut_once(tensor: Tensor | None) -> Sequence[Tensor | None]:
        return [None] * clients if tensor is None else shared.setdefault(id(tensor), cut(tensor))

    parts: list[list[RouteRecord]] = [[] for _ in range(clients)]
    for record in records:
        route = record.route
        full = [None] * clients if route.distribution is None else cut(route.distribution)
        aux = {name: cut(tensor) for name, tensor in route.aux.items()}
        columns = (cut(route.logits), cut(route.weights), full, cut_once(record.mask), cut_once(record.types))
        for c, (logits, weights, distribution, mask, types) in enumerate(zip(*columns, strict=True)):
            mine = Route(logits, weights, distribution, {name: tensors[c] for name, tensors in aux.items()})
            parts[c].append(RouteRecord(record.site, mine, mask, record.costs, types))
    return parts


def mean_over_records(records: Sequence[RouteRecord], loss: Callable[[Stack], Tensor]) -> Tensor:
    """Return the mean over records of a loss that gives one value per record of a stack, ``[R]``; 0 without records."""
    if not records:
        return torch.zeros(())
    return torch.stack([loss(stack).sum() for stack in stacks(records)]).sum() / len(records)
