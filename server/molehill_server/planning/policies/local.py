"""Share nothing."""

from __future__ import annotations

from molehill.registry import register
from molehill_server.planning.shares import Shares


@register("policy", "local", paper="house")
def local(round_number: int) -> Shares:
    """Every client trains alone from the common start; nothing is sent and the global model stays as it started."""
    del round_number
    return Shares(A="personal", B="personal", dense="personal", gate="personal", head="personal", other="personal")
