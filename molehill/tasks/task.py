"""What a task must do, and the choice between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from molehill import config
from molehill.tasks.batches import Batch, Example
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.classification import Classification
from molehill.tasks.metrics import Tally
from molehill.tasks.rows import Rows


class Task(Protocol):
    """Rows to examples, examples to batches, logits to scores."""

    def encode(self, rows: Rows) -> list[Example]:
        """Tokenise checked rows (see `molehill.tasks.schema.conform`).

        Raises:
            DataError: A row gives nothing to learn from.
        """
        ...

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length."""
        ...

    def targets(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pair every label that counts with its logits.

        Args:
            logits: ``[B, C]`` for classification, ``[B, T, V]`` for causal LM.
            batch: The batch they were computed from.

        Returns:
            Logits ``[N, C]`` or ``[N, V]``, and labels ``[N]``.
        """
        ...

    def tally(self, logits: Tensor, batch: Batch) -> Tally:
        """Count what is right in a batch; arguments as of `targets`."""
        ...


def make_task(task: config.Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Build the task of a run.

    Args:
        task: With its labels known (see `molehill.tasks.schema.load_rows`).
        tokenizer: Of the base model, with a padding token.
    """
    if task.kind == "classification":
        return Classification(tokenizer, task.labels, task.max_length)
    return CausalLM(tokenizer, task.max_length)
