"""Routing losses: extra gradient for the router. Each is a mean over records, and padding never counts."""

from __future__ import annotations

from molehill.molora.interfaces import RoutingLoss

INTERFACE = RoutingLoss
WORDS = ("loss", "balance", "auxiliary")
