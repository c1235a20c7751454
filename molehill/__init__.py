"""Federated and edge fine-tuning of language models with mixtures of LoRA experts (MoLoRA)."""

__version__ = "0.1.0"
