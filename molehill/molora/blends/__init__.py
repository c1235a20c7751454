"""How always-on and routed experts share the weight of a token."""

from __future__ import annotations

from molehill.molora.interfaces import Blend

INTERFACE = Blend
WORDS = ("shared expert gate", "residual coefficient")
