"""Kinds of experts; each kind is a bank that holds all experts of one site."""

from __future__ import annotations

from molehill.molora.banks import Bank

INTERFACE = Bank
WORDS = ("adapter", "lora", "bank")
