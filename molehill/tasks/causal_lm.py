"""Instruction tuning of a causal language model, with the loss on the answers only.

Rows become one text through the tokenizer's own chat template, or, where it has none, in the format of Alpaca
(Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca). The text is tokenised once, as the model will see
it; a token is learnt when it shows part of an answer, or is the end-of-sequence token after one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from molehill.alpaca import HEADINGS, INTRO, INTRO_INPUT
from molehill.errors import DataError, ModelError
from molehill.tasks.batches import IGNORE, Batch, Example, pad
from molehill.tasks.rows import TASK, Rows

Messages = Sequence[dict[str, str]]
Span = tuple[int, int]  # characters [start, end)

_log = logging.getLogger(__name__)


class CausalLM:
    """Instructions or conversations with answers; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model: a fast one, with padding and end-of-sequence tokens.
        max_length: Longest input in tokens. A longer one loses its end; when no token of an answer is left, the
            row is dropped, and how many were is logged.

    Raises:
        ModelError: The tokenizer is not a fast one or has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer cannot say where its tokens start", mend="Save it with a tokenizer.json.")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token", mend="Set eos_token in its configuration.")
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self._frames: dict[tuple[str, ...], list[str]] = {}

    def encode(self, rows: Rows) -> list[Example]:
        """Tokenise the columns messages, or instruction, input and output (and the task, where there is one).

        Raises:
            DataError: A row does not fit the chat template, or no row has an answer within ``max_length``.
        """
        tasks = rows.columns.get(TASK, (None,) * len(rows))
        examples = []
        for (where, row), task in zip(rows.records(), tasks, strict=True):
            ids, labels = self._tokenise(*self._render(row, where))
            if len(ids) > self.max_length:
                ids, labels = ids[: self.max_length], labels[: self.max_length]
            # The first token is never predicted, so a label there alone teaches nothing.
            if any(label != IGNORE for label in labels[1:]):
                examples.append(Example(ids, labels, task))
        dropped = len(rows) - len(examples)
        if dropped:
            mend = f"Raise task.max_length above {self.max_length}."
            if not examples:
                raise DataError("no answer begins within task.max_length", where=rows.source, mend=mend)
            _log.warning("%d of %d rows dropped: their prompts fill task.max_length. %s", dropped, len(rows), mend)
        return examples

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length; labels ``[B, T]`` with `IGNORE` on prompts and padding."""
        return pad(examples, self._tokenizer.pad_token_id, self.max_length)

    def _render(self, row: dict[str, Any], where: str) -> tuple[str, list[Span]]:
        """The whole text of a row, and where its answers are."""
        if self._tokenizer.chat_template:
            return self._template(_as_messages(row), where)
        return _alpaca(row)

    def _template(self, messages: Messages, where: str) -> tuple[str, list[Span]]:
        try:
            text = self._chat(messages)
            spans = self._between(messages, text) or self._last(messages, text)
        except TemplateError as error:
            what = f"the tokenizer's chat template refuses the conversation: {error}"
            raise DataError(what, where=where, mend="Mend the order of the roles.") from None
        if not spans:
            what = "the tokenizer's chat template does not show the answer as it is"
            raise DataError(what, where=where, mend="Remove the row, or give it as instruction and output.")
        return text, [(begin, self._after_end_of_turn(text, end)) for begin, end in spans]

    def _between(self, messages: Messages, text: str) -> list[Span]:
        """Where the answers are, from what the template writes between messages; empty when it edits them."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            self._frames[roles] = self._frame(roles)
        spans, shown = [], ""
        for before, message in zip(self._frames[roles], messages, strict=False):
            begin = len(shown) + len(before)
            shown += before + message["content"]
            if message["role"] == "assistant":
                spans.append((begin, len(shown)))
        return spans if shown + self._frames[roles][-1] == text else []

    def _frame(self, roles: Sequence[str]) -> list[str]:
        """What the template writes before, between and after messages of these roles."""
        marks = [f"<mark {i} of {len(roles)}>" for i in range(len(roles))]
        rest = self._chat([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        frame = []
        for mark in marks:
            before, _, rest = rest.partition(mark)
            frame.append(before)
        return [*frame, rest]

    def _last(self, messages: Messages, text: str) -> list[Span]:
        """The last answer alone, as what follows the generation prompt (for templates that edit earlier turns)."""
        prompt = self._chat(messages[:-1], prompt=True)
        return [(len(prompt), len(text.rstrip()))] if text.startswith(prompt) else []

    def _chat(self, messages: Messages, *, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)  # tokenize=False
        return text

    def _after_end_of_turn(self, text: str, end: int) -> int:
        """Include the end-of-sequence token that follows an answer, if the template writes one."""
        eos = self._tokenizer.eos_token
        rest = text[end:]
        lead = len(rest) - len(rest.lstrip())
        return end + lead + len(eos) if rest.startswith(eos, lead) else end

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[list[int], list[int]]:
        """Ids and labels, cut after the last answer and ended with the end-of-sequence token."""
        text = text[: spans[-1][1]]
        special = not self._tokenizer.chat_template  # a template writes its own special tokens
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, labels = [], []
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # Overlap, since a token may hold the space before an answer too.
            learnt = end > begin and any(begin < last and end > first for first, last in spans)
            ids.append(token)
            labels.append(token if learnt else IGNORE)
        # Tokenizers that append special tokens of their own put them at the empty span (0, 0).
        while special and len(ids) > 1 and encoded["offset_mapping"][len(ids) - 1] == (0, 0):
            ids.pop()
            labels.pop()
        if ids[-1] != self._eos:
            ids.append(self._eos)
            labels.append(self._eos)
        return ids, labels


def _as_messages(row: dict[str, Any]) -> Messages:
    """The conversation; white space around messages is left to the template."""
    if "messages" in row:
        return [{"role": turn["role"], "content": turn["content"].strip()} for turn in row["messages"]]
    prompt = f"{row['instruction']}\n\n{row['input']}".strip()
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"].strip()}]


def _alpaca(row: dict[str, Any]) -> tuple[str, list[Span]]:
    if "messages" not in row:
        context = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
        intro = INTRO_INPUT if context else INTRO
        prompt = f"{intro}### Instruction:\n{row['instruction']}{context}\n\n### Response:\n"
        text = prompt + row["output"].strip()
        return text, [(len(prompt), len(text))]
    text, spans = INTRO, []
    for message in _as_messages(row):
        text += f"### {HEADINGS[message['role']]}:\n"
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(message["content"])))
        text += f"{message['content']}\n\n"
    return text, spans
