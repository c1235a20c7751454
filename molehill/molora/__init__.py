"""MoLoRA: a mixture of LoRA experts on a frozen base, as one LoRA whose rank axis is partitioned."""
