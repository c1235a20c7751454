"""Every expert is everybody's."""

from __future__ import annotations

from collections.abc import Mapping

from molehill.registry import register
from molehill_server.planning.assigning import Assignment, Leaning, Seen


@register("assignment", "none", paper="house")
class NoAssignment(Assignment):
    """Every client trains all experts, and leans on none."""

    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """Nothing is decided."""
        return seen.known
