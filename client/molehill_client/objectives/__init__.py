"""Objectives: the loss of one forward pass (mean over predictions, in nats)."""

from __future__ import annotations

from molehill_client.interfaces import Objective

INTERFACE = Objective
WORDS = ("loss",)
