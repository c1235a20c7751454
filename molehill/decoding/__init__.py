"""Answers from a model's passes: strategies, drawing of tokens, and text as it comes; the same on hosts and devices."""

DEFAULT = "own_logits"  # the strategy that answers when nobody chooses; here, so that to name it imports nothing
