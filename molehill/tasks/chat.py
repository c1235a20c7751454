"""Conversations as the tokenizer's chat template writes them, and where the answers are in that text.

A part of a message that the template does not write is refused by name: whoever put it there meant it to be learnt.
What ends an answer belongs to it: all that the template writes right after every answer, up to and with the first
special token, such as Gemma's ``<end_of_turn>`` or Phi-3's ``<|end|>``, which are no end-of-sequence tokens. Where none
follows, a token that was added to the vocabulary does it: fine-tunes add ``<|im_end|>`` as a plain one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from molehill.errors import DataError
from molehill.rowfiles.messages import told_by

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end)

_PLAIN = {"role", "content"}
# A call and its result may be told apart by their order alone; templates that show ids are few.
_MARKS = {("tool", "tool_call_id"), ("tool", "name")}
# Templates leave out the thoughts before all answers but the last.
_SOMEWHERE = {"reasoning_content", "thinking"}
_MARK = "<the answer>"
_FAILURES = (  # of a template on what it gets
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError),
)


class Chat:
    """Writes conversations.

    Args:
        tokenizer: With a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        plain = {token.content for token in added if token.content.strip()} - special
        self._special, self._plain = (sorted(tokens, key=len, reverse=True) for tokens in (special, plain))
        self._frames: dict[tuple[str, ...], list[str]] = {}
        self._unseen: dict[str, str] = {}

    def write(self, messages: Sequence[Message], tools: Any, where: str) -> tuple[str, list[Span], int]:
        """The text of a conversation, its answers with what ends them, and how many answers are not among them.

        Args:
            messages: The last is an answer; ``weight`` 0 marks one that is not to be learnt.
            tools: Descriptions of functions, for the template; None for none.
            where: Place of the row, for errors.

        Raises:
            DataError: The template refuses the conversation, or does not show a part of it.
        """
        try:
            return self._write(messages, tools, where)
        except _FAILURES as error:
            raise _refused(error, where) from None

    def before_answer(self, messages: Sequence[Message], tools: Any, where: str) -> str:
        """The text of a conversation up to where the assistant begins to answer.

        Args:
            messages: The last is not an answer.
            tools: Descriptions of functions, for the template; None for none.
            where: Place of the row, for errors.

        Raises:
            DataError: The template refuses the conversation, or does not show a part of it.
        """
        try:
            turns = self._with_arguments(self._turns(messages), tools)
            self._require_shown(turns, tools, self._text(turns, tools), where)
            return self._text(turns, tools, prompt=True)
        except _FAILURES as error:
            raise _refused(error, where) from None

    @property
    def end(self) -> str:
        """The token with which an answer ends; empty where the template writes none, or takes no such chat."""
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": _MARK}]
        try:
            text = self._text(turns, None)
        except _FAILURES:
            return ""
        _, mark, rest = text.partition(_MARK)
        found = self._first(rest, 0) if mark else None
        return "" if found is None else found[1]

    @property
    def around(self) -> tuple[str, str, str]:
        """What the template writes before a user's first message, between an answer and the next one, and after it."""
        user, other = {"role": "user", "content": _MARK}, {"role": "assistant", "content": "An answer."}
        try:
            first, _, rest = self._text([user], None, prompt=True).partition(_MARK)
            again = self._text([user, other, user], None, prompt=True).rpartition(_MARK)[0].rpartition("An answer.")[2]
        except _FAILURES:
            return "", "", ""
        return first, again, rest

    def _write(self, messages: Sequence[Message], tools: Any, where: str) -> tuple[str, list[Span], int]:
        turns = self._turns(messages)
        if tools is None and all(set(turn) == _PLAIN for turn in turns):
            text = self._text(turns, None)
            spans = self._between(turns, text)
        else:
            turns = self._with_arguments(turns, tools)
            text, spans = self._text(turns, tools), {}
        if not spans:
            self._require_shown(turns, tools, text, where)
            spans = self._one_by_one(turns, tools, text)
            if len(turns) - 1 not in spans or "tool_calls" not in turns[-1]:
                spans |= self._last(turns, tools, text)
        if not spans:
            what = "the tokenizer's chat template does not show the answer as it is"
            raise DataError(what, where=where, mend="Remove the row, or give it as instruction and output.")
        learnt = [at for at, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
        wanted = [spans[at] for at in learnt if at in spans]
        if not wanted:
            what = "no answer that the chat template shows as it is has a weight above 0"
            raise DataError(what, where=where, mend="Remove the row, or give an answer the weight 1.")
        return text, wanted, len(learnt) - len(wanted)

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """What the template gets."""
        turns = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        return told_by(turns, str(self._tokenizer.chat_template))

    def _between(self, turns: Sequence[Message], text: str) -> dict[int, Span]:
        """Where the answers are, from what the template writes between messages; empty when it edits them."""
        roles = tuple(turn["role"] for turn in turns)
        if roles not in self._frames:
            self._frames[roles] = self._frame(roles)
        frame = self._frames[roles]
        spans, shown = {}, ""
        for at, (before, turn) in enumerate(zip(frame, turns, strict=False)):
            begin = len(shown) + len(before)
            shown += before + turn["content"]
            if turn["role"] == "assistant":
                spans[at] = (begin, len(shown))
        if shown + frame[-1] != text:
            return {}
        found = self._first(frame[-1], 0)
        ending = frame[-1][: found[0]] if found else ""
        return {at: (begin, end + len(ending) * text.startswith(ending, end)) for at, (begin, end) in spans.items()}

    def _frame(self, roles: Sequence[str]) -> list[str]:
        """What the template writes before, between and after messages of these roles."""
        marks = [f"<mark {i} of {len(roles)}>" for i in range(len(roles))]
        rest = self._text([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], None)
        frame = []
        for mark in marks:
            before, _, rest = rest.partition(mark)
            frame.append(before)
        return [*frame, rest]

    def _one_by_one(self, turns: Sequence[Message], tools: Any, text: str) -> dict[int, Span]:
        """Where the answers are, calls of tools included: from the generation prompt to the end of the turn.

        Those that the template edits once more turns follow are not among them.
        """
        spans = {}
        for at, turn in enumerate(turns):
            if turn["role"] == "assistant":
                try:
                    before = self._text(turns[:at], tools, prompt=True)
                    after = self._text(turns[: at + 1], tools).rstrip()
                except _FAILURES:  # of a part of the conversation
                    continue
                if not text.startswith(after):  # Phi-3 ends a conversation with one more token, which no answer has
                    token = next((token for token in self._special if token and after.endswith(token)), "")
                    after = after.removesuffix(token).rstrip()
                if text.startswith(after) and after.startswith(before):
                    spans[at] = (len(before), len(after))
        return spans

    def _last(self, turns: Sequence[Message], tools: Any, text: str) -> dict[int, Span]:
        """The last answer alone, as what follows the generation prompt (for templates that edit earlier turns)."""
        prompt = self._text(turns[:-1], tools, prompt=True)
        if not text.startswith(prompt):
            return {}
        end = len(text.rstrip())
        if "tool_calls" not in turns[-1]:
            begin = text.find(turns[-1]["content"], len(prompt))
            found = None if begin < 0 else self._first(text, begin + len(turns[-1]["content"]))
            end = end if found is None else found[0]
        return {len(turns) - 1: (len(prompt), end)}

    def _first(self, text: str, start: int) -> tuple[int, str] | None:
        """The end of the first special token from a place on, or else of the first added one, and the token."""
        for tokens in (self._special, self._plain):
            found = [(at, token) for token in tokens if token and (at := text.find(token, start)) >= 0]
            if found:
                # of those that begin there the longest: they are in that order
                at, token = min(found, key=lambda pair: pair[0])
                return at + len(token), token
        return None

    def _text(self, turns: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            [dict(turn) for turn in turns], tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(text, str)  # tokenize=False
        return text

    def _with_arguments(self, turns: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
        """The turns with the arguments of calls in the form that the template writes as JSON.

        Files hold them as a string of JSON. Most templates want what it says, some the string.
        """
        parsed = [dict(turn) for turn in turns]
        written = []
        for turn in parsed:
            if "tool_calls" in turn:
                turn["tool_calls"] = [_parsed(call) for call in turn["tool_calls"]]
                written += [str(_arguments(call)) for call in turn["tool_calls"] if isinstance(_arguments(call), dict)]
        if parsed == turns:
            return turns
        try:
            text = self._text(parsed, tools)
        except _FAILURES:
            return turns
        return turns if any(python in text for python in written if python != "{}") else parsed

    def _require_shown(self, turns: Sequence[Message], tools: Any, text: str, where: str) -> None:
        """Refuse what the template leaves out; what follows from a conversation's shape is looked at once."""
        shape = json.dumps([_shape(turn) for turn in turns] + [tools is not None])
        if shape not in self._unseen:
            self._unseen[shape] = next(self._left_out(turns, tools, text), "")
        unseen = self._unseen[shape] or next(_cut_out(turns, text), "")
        if unseen:
            what = f"the tokenizer's chat template does not show {unseen}"
            raise DataError(what, where=where, mend="Remove it, or give a base whose template does.")

    def _left_out(self, turns: Sequence[Message], tools: Any, text: str) -> Iterator[str]:
        if tools is not None and not self._differs(turns, None, text):
            yield "'tools'"
        for key in sorted({key for turn in turns for key in turn} - _PLAIN):
            places = [at for at, turn in enumerate(turns) if key in turn and (turn["role"], key) not in _MARKS]
            together = [places] if key in _SOMEWHERE and places else [[at] for at in places]
            for group in together:
                without = [
                    {k: v for k, v in turn.items() if k != key or at not in group} for at, turn in enumerate(turns)
                ]
                if not self._differs(without, tools, text):
                    yield f"{key!r} of message {group[0] + 1}"
        for at, turn in enumerate(turns):
            for what, fewer in _fewer(turn.get("tool_calls", [])):
                changed = [*turns[:at], {**turn, "tool_calls": fewer}, *turns[at + 1 :]]
                if not self._differs(changed, tools, text):
                    yield f"{what} of 'tool_calls' of message {at + 1}"
        yield from self._unwritten(turns, tools)

    def _unwritten(self, turns: Sequence[Message], tools: Any) -> Iterator[str]:
        """Contents of which nothing is written."""
        marks = {at: f"mark{at}of{len(turns)}x" for at, turn in enumerate(turns) if turn["content"].strip()}
        try:
            shown = self._text([{**turn, "content": marks.get(at, "")} for at, turn in enumerate(turns)], tools)
        except _FAILURES:  # it reads the contents
            return
        for at, mark in marks.items():
            if mark not in shown.casefold():  # earlier answers may be edited
                yield f"'content' of message {at + 1}"

    def _differs(self, turns: Sequence[Message], tools: Any, text: str) -> bool:
        """Whether a conversation is written otherwise; one that the template refuses is."""
        try:
            return self._text(turns, tools) != text
        except _FAILURES:
            return True


def _refused(error: Exception, where: str) -> DataError:
    what = f"the tokenizer's chat template refuses the conversation: {error}"
    return DataError(what, where=where, mend="Mend the order of the roles.")


def _shape(turn: Message) -> list[Any]:
    """All of a message by which templates choose what they write of it."""
    calls = [bool(_arguments(call)) for call in turn.get("tool_calls", [])]
    return [turn["role"], sorted(turn), bool(turn["content"].strip()), calls]


def _cut_out(turns: Sequence[Message], text: str) -> Iterator[str]:
    """Contents that are not written as they are, white space aside, or as JSON.

    Of answers only the last counts: templates may leave out the thoughts before the others.
    """
    shown = "".join(text.split())
    for at, turn in enumerate(turns):
        if turn["role"] != "assistant" or at == len(turns) - 1:
            plain = "".join(turn["content"].split())
            quoted = (json.dumps(turn["content"], ensure_ascii=plainly)[1:-1] for plainly in (False, True))
            if plain not in shown and not any("".join(form.split()) in shown for form in quoted):
                yield f"'content' of message {at + 1} as it is"


def _fewer(calls: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """Calls without one of several, or without the arguments of one; with the name of what is missing."""
    for at, call in enumerate(calls):
        if len(calls) > 1:
            yield f"call {at + 1}", [*calls[:at], *calls[at + 1 :]]
        arguments = _arguments(call)
        if arguments and isinstance(arguments, dict | str):
            nothing = {**call, "function": {**call["function"], "arguments": type(arguments)()}}
            yield f"the arguments of call {at + 1}", [*calls[:at], nothing, *calls[at + 1 :]]


def _arguments(call: Any) -> Any:
    inner = call.get("function") if isinstance(call, Mapping) else None
    return inner.get("arguments") if isinstance(inner, Mapping) else None


def _parsed(call: Any) -> Any:
    arguments = _arguments(call)
    if not isinstance(arguments, str):
        return call
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": found}} if isinstance(found, dict) else call
