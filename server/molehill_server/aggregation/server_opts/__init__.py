"""Server optimisers: the mean change of a round as a gradient."""

from __future__ import annotations

from molehill_server.aggregation.interfaces import ServerOpt

INTERFACE = ServerOpt
WORDS = ("optimiser", "optimizer")
