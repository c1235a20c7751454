"""Kinds of tasks: what a row holds and what is learnt from it."""

from __future__ import annotations

from molehill.tasks.kind import Kind

INTERFACE = Kind
WORDS = ("kind",)
