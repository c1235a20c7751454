"""Instruction tuning of a causal language model, with the loss on the answers only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from molehill import config
from molehill.registry import register
from molehill.rowfiles import readings
from molehill.tasks import conversations
from molehill.tasks.kind import Kind
from molehill.tasks.measures import ANSWERS, LOSS, PERPLEXITY, TOKEN_ACCURACY
from molehill.tasks.rows import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task


@register("task", "causal-lm", paper="house: the next token, learnt where it is part of an answer")
class CausalLM(Kind):
    """Questions with answers, conversations or plain text, told by their columns, see `molehill.rowfiles.readings`."""

    columns = readings.COLUMNS
    head = None
    writes = True
    bundle = "causal-lm"
    pipeline = "text-generation"
    measures = (TOKEN_ACCURACY, PERPLEXITY, LOSS, *ANSWERS)
    stages = (
        "Each answer token is predicted from the right ones before it: this is no measure of whole answers. Base: the "
        "frozen model as it is. Local: the same adapter trained on that client alone. Global: the federated model. "
        "Personalised: the federated model with the client's own gate."
    )

    def require_read(self, rows: Rows, taken: Sequence[str]) -> None:
        """Refuse columns that mean something in a conversation and that nothing reads.

        Raises:
            DataError: One of them is filled in.
        """
        conversations.require_read(rows, taken)

    def reads(self, there: Collection[str]) -> Collection[str]:
        """Columns that are read, which follow from what there is."""
        return conversations.columns_read(there)

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check every row and fill in what may be missing.

        Raises:
            DataError: A column or value is missing, has the wrong type or is empty.
        """
        del task
        return conversations.conform(rows, named)

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors."""
        from molehill.tasks.causal_lm import CausalLM as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.max_length)
