"""How the weights of a route meet the experts."""

from __future__ import annotations

from molehill.molora.banks import Mixer

INTERFACE = Mixer
WORDS = ("mixing", "combiner")
