"""Diagnostics as one client tells them and as all of them are added up."""

from __future__ import annotations

import pytest
import torch

from molehill import registry
from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.molora import probes
from molehill.molora.interfaces import RouteContext, Site
from molehill.wire.keys import Key

REFS = [MethodRef(name=method.name) for method in registry.methods("diagnostic")]
KEYS = [
    *(Key("a", f"e{e}", "A") for e in range(3)),
    Key("a", "shared0", "A"),
    *(Key("b", f"e{e}", role) for e in range(2) for role in ("A", "B")),
    Key("b", "-", "gate.weight"),
    Key("-", "-", "head.weight"),
]


def seen(record, *seeds):
    """Fresh diagnostics that have seen a pass for every seed, with three experts at ``a`` and two at ``b``."""
    found = probes.build(REFS)
    for seed in seeds:
        torch.manual_seed(seed)
        for name, n in (("a", 3), ("b", 2)):
            site = Site(0, name, 1, 8, 8)
            route = registry.build("selector", "top_k", {"k": 2})(
                torch.randn(2, 5, n), RouteContext(torch.zeros(2, 5, 8), site)
            )
            for probe in found.values():
                probe.update([record(route, site=site)])
    return found


def test_what_clients_tell_adds_up_to_what_one_would_have_seen(record):
    told = [probes.told(seen(record, 1)), probes.told(seen(record, 2)), {}]
    for each in told[:2]:
        probes.require_fitting(each, REFS, KEYS)
    figures = probes.merged(REFS, told, KEYS)
    for name, probe in seen(record, 1, 2).items():
        assert figures[name] == pytest.approx(probe.report())
        assert figures[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.pop("load"), "its probes are"),
        (lambda told: told.update(other={}), "its probes are"),
        (lambda told: told["load"].update(c=[1.0] * 6), "of site 'c'"),
        (lambda told: told["load"].update(b=[1.0] * 8), "probe 'load' has 8 sums of site 'b'"),
        (lambda told: told["coactivation"].update(b=[]), "probe 'coactivation' has 0 sums"),
    ],
)
def test_sums_that_the_model_cannot_have_are_refused(change, message, record):
    told = probes.told(seen(record, 1))
    change(told)
    with pytest.raises(MessageError, match=message):
        probes.require_fitting(told, REFS, KEYS)


def test_who_is_asked_for_nothing_tells_nothing(record):
    probes.require_fitting({}, [], KEYS)
    with pytest.raises(MessageError, match="its probes are"):
        probes.require_fitting(probes.told(seen(record, 1)), [], KEYS)
