"""Answers that a causal LM writes to a client's held-out rows, compared with the right ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molehill.decoding.stream import Asked, Reader
from molehill.molora.decode import write
from molehill.molora.model import seed_for
from molehill.plan import Answers
from molehill.tasks.answers import added_up
from molehill.tasks.causal_lm import CausalLM
from molehill.tasks.task import Example
from molehill_client.state import Sample
from molehill_client.workbench import Workbench


def answer(bench: Workbench, rows: Sequence[Example], seed: int) -> tuple[Answers | None, list[Sample]]:
    """Have the model as it is answer ``evaluate.generate`` rows, greedily.

    Of a conversation the last answer is written. Rows that are cut have no whole answer to compare with, and are left
    out; which of the others are asked depends on the seed alone.

    Args:
        bench: With a causal LM.
        rows: Held-out rows.
        seed: Of the choice of rows.

    Returns:
        Sums of scores, None where no row can be asked; and what was asked, right and written.

    Raises:
        AnswerError: A router looks at later tokens.
    """
    task, model = bench.task, bench.model
    assert isinstance(task, CausalLM)  # or the configuration would have been refused
    asked = []
    for row in np.random.default_rng(seed_for(seed, "answers")).permutation(len(rows)):
        pair = task.last_answer(rows[row])
        if pair is not None:
            asked.append(pair)
        if len(asked) == bench.config.evaluate.generate:
            break
    if not asked:
        return None, []
    model.eval()
    reader = Reader(task.decode, task.ends(model.base), task.max_length)
    written = write(model, [prompt for prompt, _ in asked], reader, Asked(), at_once=bench.config.evaluate.batch_size)
    samples = [
        Sample(task.question(prompt), task.decode(right), task.decode(found.tokens))
        for (prompt, right), found in zip(asked, written, strict=True)
    ]
    return added_up([(sample.answer, sample.reference) for sample in samples]), samples
