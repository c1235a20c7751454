"""Which experts a text used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from molehill_edge import gates
from molehill_protos.v1.bundle_pb2 import Manifest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RouterReport:
    """What one router did with a text.

    Attributes:
        router: Path of the first module that uses it.
        experts: Their ids, in the order of the router; empty slots are left out.
        shares: Mean weight of each over the tokens and heads; they add up to about 1 for a softmax.
        best: Id of the expert of largest weight for each token; empty unless asked for.
    """

    router: str
    experts: tuple[str, ...]
    shares: tuple[float, ...]
    best: tuple[str, ...] = ()


def outputs(manifest: Manifest) -> list[str]:
    """Names of the graph's outputs of weights."""
    return [f"route.{i}" for i in range(len(manifest.routers))]


def report(manifest: Manifest, weights: list[Array], tokens: int, *, per_token: bool) -> list[RouterReport]:
    """Sum the weights of one text up.

    Args:
        manifest: Of the bundle, with the experts that it has now.
        weights: ``[1, T|1, (H,) E]`` of every router.
        tokens: Tokens of the text.
        per_token: Whether to name the best expert of each.
    """
    reports = []
    for router, found in zip(manifest.routers, weights, strict=True):
        ids = [manifest.slots[slot].id for slot in router.slots]
        kept = [i for i, name in enumerate(ids) if name]
        per = found[0].reshape(found.shape[1], -1, len(ids)).mean(1)[:, kept]  # over heads: [T|1, experts]
        best: tuple[str, ...] = ()
        if per_token:
            chosen = np.broadcast_to(per.argmax(1), (tokens,)) if len(per) == 1 else per.argmax(1)
            best = tuple(ids[kept[i]] for i in chosen)
        shares = tuple(float(share) for share in per.mean(0))
        reports.append(RouterReport(router.name, tuple(ids[i] for i in kept), shares, best))
    return reports


def usage(manifest: Manifest, reports: list[RouterReport]) -> dict[str, float]:
    """Mean share of each expert over the routers that know it."""
    names = dict.fromkeys(manifest.slots[slot].id for slot in gates.slots(manifest) if manifest.slots[slot].id)
    found = {name: [dict(zip(r.experts, r.shares, strict=True)).get(name) for r in reports] for name in names}
    return {name: float(np.mean([share for share in shares if share is not None])) for name, shares in found.items()}
