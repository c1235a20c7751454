"""Diagnostics: they look at routes, add up, and merge over clients. Padding never counts."""

from __future__ import annotations

from molehill.molora.interfaces import Diagnostic

INTERFACE = Diagnostic
WORDS = ("probe", "metric")
