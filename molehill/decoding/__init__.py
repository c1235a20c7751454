"""Answers from a model's passes: strategies, drawing of tokens, and text as it comes; the same on hosts and devices."""
