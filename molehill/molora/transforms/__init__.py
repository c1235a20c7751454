"""Logit transforms: edits between scores and selection."""

from __future__ import annotations

from molehill.molora.interfaces import LogitTransform

INTERFACE = LogitTransform
WORDS = ("logits", "noise")
