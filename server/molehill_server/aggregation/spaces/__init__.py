"""Spaces: what is combined."""

from __future__ import annotations

from molehill_server.aggregation.interfaces import Space

INTERFACE = Space
WORDS = ("aggregation", "aggregator")
