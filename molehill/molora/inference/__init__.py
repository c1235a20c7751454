"""Inference strategies: what a decoder does with the model's logits."""
