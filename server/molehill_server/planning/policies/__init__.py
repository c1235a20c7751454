"""Policies (axis ``policy``): who shares, keeps and freezes what.

A policy is a function of the round's number, ``(round_number) -> Shares``.
"""

WORDS = ("sharing", "freezing")
