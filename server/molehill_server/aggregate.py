"""One aggregation: updates in, the next global model out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from molehill import registry
from molehill.config import Federation
from molehill.errors import ConfigError, FederationError
from molehill_server.aggregation.coordinates import CoordinateSum
from molehill_server.aggregation.interfaces import (
    CensusRule,
    Combined,
    CoordRule,
    Lower,
    ServerOpt,
    Space,
    Sum,
    WeightRule,
)
from molehill_server.aggregation.lowrank import concat, distance, fold, norm
from molehill_server.aggregation.robust import ballots
from molehill_server.aggregation.sums import factors
from molehill_server.records import AggOut, Global, Update


@dataclass(frozen=True)
class Aggregator:
    """Space x rule x lower x server optimiser.

    Attributes:
        space: What is combined.
        rule: How much each client counts.
        lower: How the result comes back to factors.
        server_opt: What the combined change does to the model.
        seed: Of the run; for lowers that draw fresh factors.
    """

    space: Space
    rule: WeightRule
    lower: Lower
    server_opt: ServerOpt
    seed: int = 0

    @classmethod
    def from_config(cls, federation: Federation, seed: int = 0) -> Aggregator:
        """Build the four parts from a configuration.

        Raises:
            ConfigError: A part is unknown, or two of them make no sense together.
        """
        for keys, why in conflicts(federation):
            raise ConfigError(why, where=" with ".join(keys))
        return cls(*_parts(federation), seed)

    def __call__(self, glob: Global, updates: Iterable[Update]) -> tuple[Global, dict[str, float]]:
        """Merge the updates of one round.

        Updates are pulled one at a time and dropped once they are added, unless the rule must see all of them. A
        tensor that nobody sent, and an expert to which nobody routed a token, keeps its value bit for bit.

        Args:
            glob: The model the clients started from; it is not changed.
            updates: Validated updates, in any order.

        Returns:
            The next model, and a report: ``updates``, ``experts_kept`` (experts that nobody trained), what the lower
            reports, and where the space knows the products: ``factor_bias`` and ``residual``, the relative errors of
            the averaged factors and of the returned model against the mean of products.

        Raises:
            FederationError: There is no update, fewer than the rule needs, or one does not fit the space.
            MessageError: An update holds foreign tensors.
        """
        total = CoordinateSum(glob, self.rule) if isinstance(self.rule, CoordRule) else self.space.start(glob)
        count, votes = 0, isinstance(self.rule, CensusRule)
        for batch in _batches(updates, one_by_one=self.rule.additive):
            count += self._add(total, ballots(batch, glob) if votes else batch, glob)
            del batch  # or it would still be in memory while the next update is decoded
        if not count:
            raise FederationError("no update to aggregate", where=f"round {glob.round + 1}")
        if count < self.rule.least:
            raise FederationError(
                f"{count} updates, and the rule needs {self.rule.least} to tell which of them are wrong",
                where=f"round {glob.round + 1}",
                mend=f"Have more clients take part, or use rule {registry.those('rule', sums=True)}.",
            )
        combined = total.finish()
        out = self.lower.lower(combined, glob, self.seed)
        tree, state = self.server_opt.apply(glob.tree, out.tree, combined.touched, glob.state)
        patches = dict(glob.patches)
        for pair, patch in out.patch.items():
            patches[pair] = fold(concat([patches[pair], patch]) if pair in patches else patch)
        kept = len(glob.tree.layout.experts - glob.tree.layout.where(combined.touched.__contains__).experts)
        report = {"updates": count, "experts_kept": kept, **out.report, **_exactness(combined, glob, out)}
        return Global(tree, patches, state, glob.round + 1), report

    def _add(self, total: Sum, batch: list[Update], glob: Global) -> int:
        for update, weight in zip(batch, self.rule.weights(batch, glob), strict=True):
            total.add(update, weight)
        return len(batch)


def _parts(federation: Federation) -> tuple[Space, WeightRule, Lower, ServerOpt]:
    return (
        federation.space.build("space"),
        federation.rule.build("rule"),
        federation.lower.build("lower"),
        federation.server_opt.build("server_opt"),
    )


def conflicts(federation: Federation) -> Iterator[tuple[tuple[str, ...], str]]:
    """Combinations within ``[federation]`` that cannot work: the keys, and one sentence with the reason."""
    space, rule, lower, server_opt = _parts(federation)
    keys: tuple[str, ...] = ("federation.space", "federation.lower")
    names = f"space {federation.space.name!r} with lower {federation.lower.name!r}"
    if lower.needs_products and not space.products:
        why = "the lower reads the mean of products, which this space never forms"
        yield keys, f"{names}: {why}; use space {registry.those('space', products=True)}"
    if not (lower.needs_products or space.closed):
        able = registry.those("lower", needs_products=True)
        yield keys, f"{names}: the mean of products would be dropped; use lower {able}"
    yield from _robust(federation, space, rule, lower)
    keys = ("federation.server_opt", "federation.lower")
    names = f"server_opt {federation.server_opt.name!r} with lower {federation.lower.name!r}"
    if lower.patches and server_opt.moves:
        why = "a patch holds what the new factors lack, and the optimiser would then put other factors in their place"
        yield keys, f"{names}: {why}; use server_opt {registry.those('server_opt', moves=False)}"
    elif server_opt.stateful and not lower.fixed_gauge:
        why = "factors are made anew every round, so moments kept from the last round belong to other axes"
        yield keys, f"{names}: {why}; use server_opt {registry.those('server_opt', stateful=False)}"


def _robust(
    federation: Federation, space: Space, rule: WeightRule, lower: Lower
) -> Iterator[tuple[tuple[str, ...], str]]:
    keys: tuple[str, ...] = ("federation.rule", "federation.space")
    names = f"rule {federation.rule.name!r} with space {federation.space.name!r}"
    if rule.needs_products and not space.products:
        why = (
            "one and the same update B A can be written with factors as far apart as one likes, (B G, G^-1 A), so "
            "neither distances nor orders of factors tell who is wrong; use space "
            f"{registry.those('space', products=True)}"
        )
        yield keys, f"{names}: {why}"
    elif isinstance(rule, CoordRule) and not (space.folds and lower.tails):
        why = (
            f"merged number by number, products have full rank, which only space {registry.those('space', folds=True)} "
            f"with lower {registry.those('lower', tails=True)} brings back to factors"
        )
        yield (*keys, "federation.lower"), f"{names} and lower {federation.lower.name!r}: {why}"


def _batches(updates: Iterable[Update], *, one_by_one: bool) -> Iterable[list[Update]]:
    return map(_single, updates) if one_by_one else [list(updates)]


def _single(update: Update) -> list[Update]:
    return [update]


def _exactness(combined: Combined, glob: Global, out: AggOut) -> dict[str, float]:
    """Relative errors against the mean of products, over all pairs together; nothing when no product is known."""
    whole, biases, residuals = [], [], []
    for pair, product in combined.products.items():
        new = factors(out.tree, glob.tree, pair)
        returned = concat([new, out.patch[pair]]) if pair in out.patch else new
        tail = combined.tails.get(pair, 0.0)
        whole.append(np.hypot(norm(product), tail))
        residuals.append(np.hypot(distance(returned, product), tail))
        if not combined.tails:  # else no factors were averaged
            biases.append(distance(factors(combined.tree, glob.tree, pair), product))
    size = float(np.linalg.norm(whole))
    if not size:
        return {}
    bias = {"factor_bias": float(np.linalg.norm(biases)) / size} if biases else {}
    return {**bias, "residual": float(np.linalg.norm(residuals)) / size}
