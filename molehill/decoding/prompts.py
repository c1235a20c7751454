"""The texts that a causal LM reads: the same as in training, by the chat template or in Alpaca's format.

What comes before an answer is what training saw there: `molehill.tasks.causal_lm` is the other half.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from molehill.alpaca import HEADINGS, INTRO, INTRO_INPUT
from molehill.errors import AnswerError
from molehill.rowfiles.messages import told_by
from molehill_protos.v1.bundle_pb2 import Generation

Message = dict[str, str]
_LONGEST = 4 << 20  # characters that a chat template may write
_FRAMES = 64  # shapes of conversations that are remembered: a server sees ever new ones
Messages = Sequence[Message]


class Prompts:
    """Renders conversations.

    Args:
        generation: Of the manifest's task.
        where: The bundle, for errors.

    Raises:
        AnswerError: The chat template is not Jinja.
    """

    def __init__(self, generation: Generation, where: str) -> None:
        self.special = not generation.template  # a template writes its own special tokens
        self._where = where
        self._names = {"bos_token": generation.bos_token, "eos_token": generation.eos_token}
        self._frame = functools.lru_cache(_FRAMES)(self._framed)
        self._template, self._source = None, generation.chat_template
        if generation.template:
            environment = ImmutableSandboxedEnvironment(
                trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
            )
            environment.filters["tojson"] = _tojson
            environment.globals["raise_exception"] = _refuse
            environment.globals["strftime_now"] = _now
            try:
                self._template = environment.from_string(generation.chat_template)
            except TemplateError as error:
                raise AnswerError(f"its chat template cannot be read: {error}", where=where) from None

    def before_answer(self, messages: Messages) -> str:
        """The text of a conversation up to where the assistant begins to answer.

        Args:
            messages: Turns with ``role`` and ``content``; the last is not the assistant's.

        Raises:
            AnswerError: The chat template refuses the conversation or writes too much, or a role is unknown.
        """
        if self._template is None:
            return _alpaca(told_by(messages, ""))
        mark = "<the answer>"
        turns = self._turns(messages)
        answered = [*turns, {"role": "assistant", "content": mark}]
        try:
            frame = self._frame(tuple(turn["role"] for turn in answered))
            shown = "".join(before + turn["content"] for before, turn in zip(frame, answered, strict=False))
            if shown + frame[-1] == self._render(answered):
                return shown[: -len(mark)]
            return self._render(turns, prompt=True)  # the template edits earlier turns
        except AnswerError:
            raise
        except Exception as error:  # noqa: BLE001  # a template may fail in any way
            raise AnswerError(f"its chat template refuses the conversation: {error}", where=self._where) from None

    def answered(self, messages: Messages, answer: str) -> str:
        """The text of a conversation with an answer, and what ends it.

        Args:
            messages: Turns before the answer.
            answer: What the assistant says.

        Raises:
            AnswerError: The chat template refuses the conversation or writes too much, or a role is unknown.
        """
        if self._template is None:
            return self.before_answer(messages) + answer
        turns = self._turns(messages)
        try:
            return self._render([*turns, {"role": "assistant", "content": answer}])
        except AnswerError:
            raise
        except Exception as error:  # noqa: BLE001  # a template may fail in any way
            raise AnswerError(f"its chat template refuses the conversation: {error}", where=self._where) from None

    def single(self, instruction: str, context: str = "") -> str:
        """The text before the answer to one instruction.

        Args:
            instruction: What is asked.
            context: A text that it is about.

        Raises:
            AnswerError: The chat template refuses it.
        """
        if self._template is None:
            about = f"\n\n### Input:\n{context}" if context else ""
            intro = INTRO_INPUT if context else INTRO
            return f"{intro}### Instruction:\n{instruction}{about}\n\n### Response:\n"
        return self.before_answer([{"role": "user", "content": f"{instruction}\n\n{context}".strip()}])

    def _turns(self, messages: Messages) -> list[Message]:
        turns = [{"role": turn["role"], "content": turn["content"].strip()} for turn in messages]
        return told_by(turns, self._source)

    def _framed(self, roles: tuple[str, ...]) -> list[str]:
        """What the template writes before, between and after messages of these roles."""
        marks = [f"<mark {i} of {len(roles)}>" for i in range(len(roles))]
        text = self._render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)])
        frame, at = [], 0
        for mark in marks:
            found = text.find(mark, at)
            end = found if found >= 0 else len(text)
            frame.append(text[at:end])
            at = end + len(mark)
        return [*frame, text[at:]]

    def _render(self, messages: Messages, *, prompt: bool = False) -> str:
        assert self._template is not None
        pieces, length = [], 0
        for piece in self._template.generate(
            messages=list(messages), tools=None, documents=None, add_generation_prompt=prompt, **self._names
        ):
            length += len(piece)
            if length > _LONGEST:
                what = f"its chat template writes more than {_LONGEST} characters"
                raise AnswerError(what, where=self._where, mend="Give a shorter text.")
            pieces.append(piece)
        return "".join(pieces)


def _alpaca(messages: Messages) -> str:
    text = INTRO
    for message in messages:
        heading = HEADINGS.get(message["role"])
        if heading is None:
            raise AnswerError(f"unknown role {message['role']!r}", mend=f"Use one of {', '.join(HEADINGS)}.")
        text += f"### {heading}:\n{message['content'].strip()}\n\n"
    return f"{text}### {HEADINGS['assistant']}:\n"


class _Generation(Extension):
    """Templates may mark what the assistant writes; here the mark means nothing."""

    tags = {"generation"}  # noqa: RUF012  # the interface of Jinja

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, *, ensure_ascii: bool = False, indent: int | None = None, **keys: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  # local time, as in training
