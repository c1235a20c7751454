"""Rules: how much each client counts."""

from __future__ import annotations

from molehill_server.aggregation.interfaces import WeightRule

INTERFACE = WeightRule
WORDS = ("aggregation", "aggregator", "averaging", "robust")
