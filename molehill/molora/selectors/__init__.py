"""Selectors: from logits to weights, activation included.

What only happens in training (capacity, broadcasts) looks at ``ctx.training``; ``eval_form`` is the same selector
without it. Logits of padding are selected like any other: padding is left out where tokens are counted.
"""

from __future__ import annotations

from molehill.molora.interfaces import Selector

INTERFACE = Selector
WORDS = ("router", "routing", "gate", "gating", "activation")
