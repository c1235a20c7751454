"""Start values of low-rank experts. B is zero in all of them, so a fresh model is the base model."""

from __future__ import annotations

from molehill.molora.interfaces import InitStrategy

INTERFACE = InitStrategy
WORDS = ("initialisation", "initialization", "initializer")
