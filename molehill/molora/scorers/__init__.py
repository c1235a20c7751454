"""Scorers: from a router's input to logits over experts.

Start values come from torch's global generator; seed it (or fork it) before building, as for any torch module.
"""

from __future__ import annotations

from molehill.molora.interfaces import Scorer

INTERFACE = Scorer
WORDS = ("router", "gate", "gating")
