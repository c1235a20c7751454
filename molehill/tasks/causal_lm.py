"""Instruction tuning of a causal language model, with the loss on the answers only; and plain text, learnt as it is.

Questions with answers become one text through the tokenizer's own chat template, or, where it has none, in the format
of Alpaca (Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca). The text is tokenised once, as the model
will see it; a token is learnt when it shows part of an answer, or of what ends one (see `molehill.tasks.chat`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from molehill.alpaca import HEADINGS, INTRO, INTRO_INPUT
from molehill.errors import DataError, ModelError
from molehill.molora.likelihoods import of_class
from molehill.rowfiles.messages import told_by
from molehill.rowfiles.readings import form_of, settled
from molehill.tasks.batches import IGNORE, Batch, Example, pad
from molehill.tasks.chat import Chat, Span
from molehill.tasks.lengths import Examples, Lengths
from molehill.tasks.measures import TOKEN_ACCURACY
from molehill.tasks.metrics import ScoreSum
from molehill.tasks.rows import Rows
from molehill.tasks.units import numbers


class CausalLM:
    """Instructions or conversations with answers, or plain text; implements `molehill.tasks.task.Task`.

    Args:
        tokenizer: Of the base model: a fast one, with padding and end-of-sequence tokens.
        max_length: Longest input in tokens. A longer one loses its end; when no token of an answer is left, the
            row is left out, and counted. A longer text is learnt in pieces.

    Raises:
        ModelError: The tokenizer is not a fast one or has no end-of-sequence token.
    """

    outputs = 0
    likelihood = staticmethod(of_class)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer cannot say where its tokens start", mend="Save it with a tokenizer.json.")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token", mend="Set eos_token in its configuration.")
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._eos: int = tokenizer.eos_token_id
        self._chat = Chat(tokenizer) if tokenizer.chat_template else None
        self._around: tuple[list[int], list[int]] | None = None
        added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ends = {*tokenizer.all_special_ids, *added, self.end}

    @property
    def end(self) -> int:
        """Id of the token that answers are trained to end with."""
        token = self._chat.end if self._chat is not None else ""
        found = self._tokenizer.convert_tokens_to_ids(token) if token else self._eos
        assert isinstance(found, int)  # one token, one id
        return found

    def ends(self, base: Any) -> frozenset[int]:
        """Ids of the tokens that end an answer: what was trained to, and what the base knows.

        Args:
            base: The Transformers module.
        """
        configured = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
        known = {self._eos, self.end, *(configured if isinstance(configured, list) else [configured])}
        size = base.config.get_text_config().vocab_size
        return frozenset(int(token) for token in known if token is not None and token < size)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)) if ids else ""

    def question(self, prompt: Sequence[int]) -> str:
        """What a prompt asks, for people: its last message, or instruction, without the words of its format."""
        if self._chat is not None:
            return self.decode(self._message(prompt)).strip()
        text = self.decode(prompt).strip()
        for intro in (INTRO_INPUT, INTRO):
            text = text.removeprefix(intro.strip())
        return text.strip().removeprefix("### Instruction:").removesuffix("### Response:").strip()

    def _message(self, prompt: Sequence[int]) -> Sequence[int]:
        """The last message of a prompt by the chat template; all of it where that is not found."""
        assert self._chat is not None
        if self._around is None:
            first, again, after = (self._ids(part, special=False)[0] if part else [] for part in self._chat.around)
            common = 0  # with which every message of a user begins
            while common < min(len(first), len(again)) and first[-1 - common] == again[-1 - common]:
                common += 1
            self._around = first[len(first) - common :], after
        before, after = self._around
        end = len(prompt) - len(after)
        if list(prompt[end:]) != after or not before:
            return prompt
        starts = (at for at in reversed(range(len(before), end + 1)) if list(prompt[at - len(before) : at]) == before)
        begin = next(starts, None)
        return prompt if begin is None else prompt[begin:end]

    def last_answer(self, example: Example) -> tuple[list[int], list[int]] | None:
        """Ids before the last answer of a row, and those of the answer; None where it was cut or nothing is before it.

        Args:
            example: As `encode` makes it.
        """
        ids, labels = example.input_ids, example.labels
        assert isinstance(labels, list)  # a row of this task
        end = next(at for at in reversed(range(len(ids))) if labels[at] != IGNORE) + 1
        begin = next((at + 1 for at in reversed(range(end)) if labels[at] == IGNORE), 0)
        cut = end == self.max_length and ids[-1] not in self._ends
        return None if cut or not begin else (ids[:begin], ids[begin:end])

    def encode(self, rows: Rows) -> Examples:
        """Tokenise rows (see `molehill.rowfiles.readings`), with the task where there is one.

        Raises:
            DataError: A row does not fit the chat template, or no row has an answer within ``max_length``.
        """
        reading = settled(rows.columns)
        examples: list[Example] = []
        tokens, lost, unlearnt, pieces, units = [], 0, 0, [], []
        for (where, row), told, unit in zip(rows.records(), rows.told(), numbers(rows), strict=True):
            form = form_of(row, reading, where)
            if "text" in form:
                ids, labels = self._plain(form["text"], where)
                parts = self._pieces(ids)
            else:
                text, spans, edited = self._render(form, where)
                ids, labels = self._tokenise(text, spans)
                parts = [slice(self.max_length)]
                unlearnt += edited
            tokens.append(len(ids))
            pieces += [len(parts)] * (len(parts) > 1)
            # The first token is never predicted, so a label there alone teaches nothing.
            taught = [part for part in parts if any(label != IGNORE for label in labels[part][1:])]
            made = [Example(ids[part], labels[part], *told) for part in taught]
            examples += made
            units += [unit] * len(made)
            lost += not made
        lengths = Lengths(tuple(tokens), self.max_length, lost, unlearnt, len(pieces), sum(pieces))
        if lost and not examples:
            mend = f"Raise task.max_length above {self.max_length}: {lengths.quantiles}."
            raise DataError("no answer begins within task.max_length", where=rows.source, mend=mend)
        return Examples(examples, lengths, units)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples to one length; labels ``[B, T]`` with `IGNORE` on prompts and padding."""
        return pad(examples, self._tokenizer.pad_token_id)

    def tally(self) -> ScoreSum:
        """Accuracy and cross-entropy of the answer tokens, each given the right ones before it."""
        return ScoreSum(accuracy=TOKEN_ACCURACY)

    def _render(self, form: dict[str, Any], where: str) -> tuple[str, list[Span], int]:
        """The whole text of a row, where its answers are, and how many more there would be to learn."""
        if self._chat is not None:
            return self._chat.write(_as_messages(form), form.get("tools"), where)
        return *_alpaca(form, where), 0

    def _plain(self, text: str, where: str) -> tuple[list[int], list[int]]:
        """Ids of a text with what the tokenizer puts before it, and its end; all of them are learnt."""
        ids, _ = self._ids(text, special=True)
        if not ids:
            raise DataError("'text' has no tokens", where=where, mend="Remove the row.")
        ids += [self._eos] * (ids[-1] != self._eos)
        return ids, ids

    def _pieces(self, ids: list[int]) -> list[slice]:
        """Where a text is cut: nothing is lost.

        The last token of a piece begins the next, since what a piece begins with is not predicted: each is learnt once.
        """
        starts = range(0, max(1, len(ids) - 1), self.max_length - 1)
        return [slice(start, start + self.max_length) for start in starts]

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[list[int], list[int]]:
        """Ids and labels, cut after the last answer; one that no special token ends gets the end-of-sequence token."""
        text = text[: spans[-1][1]]
        ids, places = self._ids(text, special=self._chat is None)  # a template writes its own special tokens
        labels = [
            # Overlap, since a token may hold the space before an answer too.
            token if end > begin and any(begin < last and end > first for first, last in spans) else IGNORE
            for token, (begin, end) in zip(ids, places, strict=True)
        ]
        if ids[-1] not in self._ends:
            ids.append(self._eos)
            labels.append(self._eos)
        return ids, labels

    def _ids(self, text: str, *, special: bool) -> tuple[list[int], list[Span]]:
        """Ids and their characters, without special tokens that the tokenizer puts after a text."""
        encoded = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids, places = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        while special and len(ids) > 1 and places[-1] == (0, 0):  # the span of what is not in the text
            ids.pop()
            places.pop()
        return ids, places


def _as_messages(form: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation; white space around messages is left to the template."""
    if "messages" in form:
        return [{**turn, "content": turn["content"].strip()} for turn in form["messages"]]
    prompt = f"{form['instruction']}\n\n{form['input']}".strip()
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": form["output"].strip()}]


def _alpaca(form: dict[str, Any], where: str) -> tuple[str, list[Span]]:
    messages = _as_messages(form)
    extra = sorted({key for turn in messages for key in turn} - {"role", "content", "weight"})
    if extra or form.get("tools") is not None:
        what = f"the base has no chat template, so nothing shows {(extra or ['tools'])[0]!r}"
        raise DataError(what, where=where, mend="Remove it, or give a base with a chat template.")
    if "messages" not in form:
        context = f"\n\n### Input:\n{form['input']}" if form["input"] else ""
        intro = INTRO_INPUT if context else INTRO
        prompt = f"{intro}### Instruction:\n{form['instruction']}{context}\n\n### Response:\n"
        text = prompt + form["output"].strip()
        return text, [(len(prompt), len(text))]
    text, spans = INTRO, []
    for message in told_by(messages, ""):
        text += f"### {HEADINGS[message['role']]}:\n"
        if message["role"] == "assistant" and message.get("weight", 1):
            spans.append((len(text), len(text) + len(message["content"])))
        text += f"{message['content']}\n\n"
    return text, spans
