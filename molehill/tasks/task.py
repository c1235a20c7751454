"""What a task must do, and the choice between the two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from molehill import config
from molehill.tasks.batches import Collator, Example
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.classification import Classification
from molehill.tasks.lengths import Examples
from molehill.tasks.rows import Rows

__all__ = ["Classes", "Example", "Task", "make_task"]


class Task(Collator, Protocol):
    """Rows to examples, and examples to batches."""

    def encode(self, rows: Rows) -> Examples:
        """Tokenise checked rows (see `molehill.tasks.schema.conform`), and say how long they are.

        Raises:
            DataError: A row gives nothing to learn from.
        """
        ...


@runtime_checkable
class Classes(Protocol):
    """A task whose every prediction is one of some classes."""

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """How often each class, in the order of the logits, is the label of a prediction."""
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
