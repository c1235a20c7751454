"""Preference: two answers to one question, of which one is better."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from molehill import config
from molehill.registry import register
from molehill.rowfiles import preferences, readings
from molehill.tasks.kind import Kind
from molehill.tasks.measures import ANSWERS, LOSS, figured
from molehill.tasks.rows import Rows
from molehill.words import nats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task


@register("task", "preference", paper="house: rewards that the ratio to the base implies, as of Rafailov et al. 2023")
class Preference(Kind):
    """A question with a better and a worse answer, for a causal language model: ``[prompt,] chosen, rejected``."""

    columns = (*preferences.COLUMNS, readings.TOOLS)
    required = (preferences.CHOSEN, preferences.REJECTED)
    predicts = "pair"
    head = None
    writes = True
    objective = "dpo"
    sequences = 2
    bundle = "causal-lm"
    pipeline = "text-generation"
    measures = (
        figured("preferred", "pairs preferred aright", "right"),
        figured("margin", "margin in nats", "margin", most=None, least=None, write=nats),
        LOSS,
        *ANSWERS,
    )
    stages = (
        "A pair is preferred aright where the chosen answer gained more on the base than the rejected one; half where "
        "both gained alike, so the base itself has one half. Base: the frozen model as it is. Local: the same adapter "
        "trained on that client alone. Global: the federated model. Personalised: the federated model with the "
        "client's own gate."
    )

    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check every row; a prompt that both answers begin with becomes a column.

        Raises:
            DataError: A column or value is missing or has the wrong type, or a row prefers nothing.
        """
        del task, named
        for name in self.required:
            _ = rows[name]  # or the error names the columns that are there
        prompts = []
        for where, row in rows.records():
            preferences.pair_of(row, where)
            prompts.append(preferences.parts_of(row, where)[0])
        return rows if preferences.PROMPT in rows.columns else rows.having(**{preferences.PROMPT: prompts})

    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors."""
        from molehill.tasks.preference import Preference as Made  # noqa: PLC0415  (needs torch)

        return Made(tokenizer, task.max_length)
