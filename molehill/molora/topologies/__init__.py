"""How frozen modules and branches are wired."""

from __future__ import annotations

from molehill.molora.interfaces import Topology

INTERFACE = Topology
WORDS = ("wiring", "placement")
