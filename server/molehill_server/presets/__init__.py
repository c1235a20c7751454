"""Published federations, each a row of policy, space, rule and lower."""

from __future__ import annotations

from typing import Any, TypeAlias

Preset: TypeAlias = dict[str, Any]  # values of the [federation] section

WORDS = ("strategy", "algorithm", "recipe")
