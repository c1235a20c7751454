"""Picking: how good every expert is for one text, so that the best answer it."""

from __future__ import annotations

from molehill.decoding.interfaces import Picker

INTERFACE = Picker
WORDS = ("retriever", "retrieval", "adapter selection")
