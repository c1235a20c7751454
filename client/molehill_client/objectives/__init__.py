"""Objectives: the loss of one forward pass (mean over predictions, in nats)."""
