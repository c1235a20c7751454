"""The words of Alpaca's prompt format (Taori et al. 2023), which training and devices must write alike.

For bases without a chat template; see https://github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

HEADINGS = {"system": "Input", "tool": "Input", "user": "Instruction", "assistant": "Response"}
INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
INTRO_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
