"""How a bundle compares with what it was made from, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import this one
    from molehill_protos.v1.bundle_pb2 import Parity


def told(parity: Parity) -> dict[str, Any]:
    """What was measured at export; the figures of labelled rows are None without any."""
    found: dict[str, Any] = {
        "texts": parity.texts,
        "logit_error": parity.logit_error,
        "agreement": parity.agreement,
        "router_agreement": parity.router_agreement,
        "rows": parity.rows,
    }
    names, values = ("accuracy_original", "accuracy_bundle"), (parity.accuracy_original, parity.accuracy_bundle)
    if parity.figure:
        found["figure"] = parity.figure
        names, values = ("figure_original", "figure_bundle"), (parity.figure_original, parity.figure_bundle)
    return found | dict(zip(names, values if parity.rows else (None, None), strict=True))


def figure_row(found: Mapping[str, Any]) -> tuple[str, str]:
    """What the figure of labelled rows is called, and what it is of both; empty without any.

    Args:
        found: Of `told`.
    """
    if not found["rows"]:
        return "", ""
    if "figure" in found:
        return found["figure"], f"{found['figure_bundle']:.4g}, originally {found['figure_original']:.4g}"
    return "accuracy", f"{found['accuracy_bundle']:.1%}, originally {found['accuracy_original']:.1%}"
