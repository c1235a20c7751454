"""Decoding: how the next token, or a class, follows from passes of a model."""

from __future__ import annotations

from molehill.decoding.interfaces import Strategy

INTERFACE = Strategy
WORDS = ("decoder", "inference", "generation")
