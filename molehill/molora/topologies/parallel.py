"""Experts beside every adapted linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from molehill.registry import register


@register("topology", "parallel", paper="house: every expert is a delta on the frozen output of its own linear")
class Parallel:
    """Every site adds its experts' mixed delta to its own output."""

    scope: Literal["block"] | None = None

    def roles(self, site_names: Sequence[str]) -> Mapping[str, Literal["plain", "expand", "contract"]]:
        """All sites are plain."""
        return dict.fromkeys(site_names, "plain")
