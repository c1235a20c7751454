"""Probes: the diagnostics of a run, as they are told by one client and added up over all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, TypeAlias

import torch

from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.molora.interfaces import Diagnostic
from molehill.wire.keys import Key

if TYPE_CHECKING:
    from molehill.molora.model import MoLoRAModel

Told: TypeAlias = dict[str, dict[str, list[float]]]
"""Sums by name of the probe and site."""


def build(refs: Iterable[MethodRef]) -> dict[str, Diagnostic]:
    """Fresh diagnostics by name."""
    return {ref.name: ref.build("diagnostic") for ref in refs}


@contextmanager
def looking(model: MoLoRAModel, probes: Mapping[str, Diagnostic]) -> Iterator[None]:
    """Have a model keep the records of its passes, where anybody looks at them."""
    model.state.collect = bool(probes)
    try:
        yield
    finally:
        model.state.collect = False


def told(probes: Mapping[str, Diagnostic]) -> Told:
    """What several probes have added up."""
    return {
        name: {site: sums.flatten().tolist() for site, sums in probe.state.items()} for name, probe in probes.items()
    }


def require_fitting(found: Told, refs: Sequence[MethodRef], layout: Iterable[Key]) -> None:
    """Refuse sums that nobody asked for, or that this model cannot have.

    Args:
        found: What a client told.
        refs: The probes that it was asked for.
        layout: Keys of the model.

    Raises:
        MessageError: There are some.
    """
    experts = routed(layout)
    probes = build(refs)
    if found.keys() != probes.keys():
        raise MessageError(f"its probes are {sorted(found)!s:.200}, not {sorted(probes)}")
    for name, probe in probes.items():
        for site, sums in found[name].items():
            if site not in experts or len(sums) != prod(probe.shape(experts[site])):
                raise MessageError(f"probe {name!r} has {len(sums)} sums of site {site!r:.80}")


def merged(refs: Iterable[MethodRef], clients: Iterable[Told], layout: Iterable[Key]) -> dict[str, dict[str, float]]:
    """Figures of the probes over all clients.

    Args:
        refs: The probes.
        clients: What each client told; those that told nothing count for nothing.
        layout: Keys of the model.

    Returns:
        By name of the probe and by ``site/figure``.
    """
    experts = routed(layout)
    probes = build(refs)
    for found in clients:
        for name, probe in probes.items():
            for site, sums in found.get(name, {}).items():
                probe.add(site, torch.tensor(sums, dtype=torch.float64).view(probe.shape(experts[site])))
    return {name: probe.report() for name, probe in probes.items()}


def routed(layout: Iterable[Key]) -> dict[str, int]:
    """Routed experts of every site."""
    found: dict[str, set[str]] = {}
    for key in layout:
        if key.routed:
            found.setdefault(key.site, set()).add(key.expert)
    return {site: len(experts) for site, experts in found.items()}
