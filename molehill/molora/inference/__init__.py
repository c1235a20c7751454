"""Inference strategies: what a decoder does with the model's logits.

No entry point declares this axis: nothing on the host generates text yet, so no configuration could use what it holds.
"""
