"""What a request asks for: its fields one by one, and a refusal with the field's name for what cannot be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molehill.decoding.prompts import Message
from molehill.rowfiles.pairs import Text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_PROMPTS, _STOPS, _TEXTS = 16, 4, 256  # of one request, at most
# Fields that other servers have a use for, by the values that change nothing here.
_UNCHANGED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
}
# Fields about the request and not about the answer.
_REMARKS = {"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user"}


class RefusedError(Exception):
    """Why a request is not answered.

    Args:
        status: Of HTTP.
        what: One sentence.
        field: The field of the request that is concerned.
        code: A word for programs.
    """

    def __init__(self, status: int, what: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(what)
        self.status, self.what, self.field, self.code = status, what, field, code


def wrong(field: str, what: str) -> RefusedError:
    """A field that cannot be as it is."""
    return RefusedError(400, f"{field!r} {what}.", field=field, code="invalid_value")


class Fields:
    """The fields of a request, each taken out once; null is as good as none.

    Args:
        data: The body of the request.

    Raises:
        RefusedError: It is no JSON object.
    """

    def __init__(self, data: bytes) -> None:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            raise RefusedError(400, "The body is not JSON.", code="invalid_json") from None
        if not isinstance(found, dict):
            raise RefusedError(400, "The body is not a JSON object.", code="invalid_json")
        self._left = {name: value for name, value in found.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value of a field; None when it is not there."""
        return self._left.pop(name, None)

    def needed(self, name: str) -> Any:
        """The value of a field that must be there.

        Raises:
            RefusedError: It is not.
        """
        if name not in self._left:
            raise wrong(name, "is missing")
        return self.take(name)

    def text(self, name: str) -> str:
        """A text that must be there.

        Raises:
            RefusedError: It is not there, or no text.
        """
        value = self.needed(name)
        if not isinstance(value, str):
            raise wrong(name, f"must be a string, not {_kind(value)}")
        return value

    def flag(self, name: str) -> bool:
        """True or false; false when it is not there.

        Raises:
            RefusedError: It is neither.
        """
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise wrong(name, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number.

        Raises:
            RefusedError: It is none, or out of its range.
        """
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong(name, f"must be a number, not {_kind(value)}")
        if not low <= value <= high:
            raise wrong(name, f"must be from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number; None when it is not there.

        Raises:
            RefusedError: It is none, or out of its range.
        """
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong(name, f"must be a whole number, not {_kind(value)}")
        if not low <= value <= high:
            raise wrong(name, f"must be from {low} to {high}")
        return value

    def texts(self, name: str, value: Any, most: int) -> list[str]:
        """One text or several.

        Args:
            name: Of the field, for errors.
            value: What it holds.
            most: How many there may be.

        Raises:
            RefusedError: It is neither, there are none, or too many.
        """
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
            raise wrong(name, "must be a string or a list of strings")
        if len(found) > most:
            raise wrong(name, f"may have at most {most} strings")
        return found

    def end(self) -> None:
        """Refuse what was not taken and would change the answer.

        Raises:
            RefusedError: Names the field.
        """
        for name, value in self._left.items():
            if name in _UNCHANGED:
                if not any(_same(value, known) for known in _UNCHANGED[name]):
                    raise RefusedError(
                        400, f"This server has no {name!r}: leave it out.", field=name, code="unsupported_parameter"
                    )
            elif name not in _REMARKS:
                raise RefusedError(400, f"There is no field {name!r}.", field=name, code="unknown_parameter")


@dataclass(frozen=True)
class Asked:
    """What requests for text have in common.

    Attributes:
        model: Name of the bundle and perhaps of a gate.
        stream: Answer piece by piece.
        usage: Tell the tokens at the end of a stream.
        most: Longest answer in tokens; None when it is not said.
        sampling: How tokens are drawn: the arguments of `View.chat` and `View.stream`.
        stop: Strings that end the answer.
    """

    model: str
    stream: bool
    usage: bool
    most: int | None
    sampling: Mapping[str, Any]
    stop: tuple[str, ...]


def read_asked(fields: Fields, most: int) -> Asked:
    """Take what requests for text have in common.

    Args:
        fields: Of the request.
        most: Tokens that an answer may have.

    Raises:
        RefusedError: A field is missing, of another type or out of its range.
    """
    model, stream = fields.text("model"), fields.flag("stream")
    options = fields.take("stream_options")
    options = {} if options is None else options
    known = isinstance(options, dict) and set(options) <= {"include_usage"}
    if not known or not isinstance(options.get("include_usage"), bool | None):
        raise wrong("stream_options", 'must be {"include_usage": true} or {"include_usage": false}')
    if options and not stream:
        raise wrong("stream_options", "goes with 'stream': true")
    older, newer = fields.integer("max_tokens", 1, most), fields.integer("max_completion_tokens", 1, most)
    sampling = {
        "temperature": fields.number("temperature", 1.0, 0, 2),
        "top_p": fields.number("top_p", 1.0, 1e-6, 1),
        "top_k": fields.integer("top_k", 0, 1 << 31) or 0,
        "seed": fields.integer("seed", 0, (1 << 63) - 1),
    }
    stop = fields.take("stop")
    stops = [] if stop in (None, []) else fields.texts("stop", stop, _STOPS)
    if not all(stops):
        raise wrong("stop", "has an empty string")
    wanted = newer if newer is not None else older
    return Asked(model, stream, bool(options.get("include_usage")), wanted, sampling, tuple(stops))


def read_messages(fields: Fields) -> list[Message]:
    """Take the turns of a conversation, of which the last is the user's.

    Raises:
        RefusedError: They are no such turns.
    """
    given = fields.needed("messages")
    if not isinstance(given, list) or not given:
        raise wrong("messages", "must be a list of messages, and not an empty one")
    found = [_message(each, f"messages[{number}]") for number, each in enumerate(given)]
    if found[-1]["role"] != "user":
        raise wrong(f"messages[{len(found) - 1}].role", "must be 'user': the last message is what is answered")
    return found


def _message(given: Any, where: str) -> Message:
    if not isinstance(given, dict):
        raise wrong(where, f"must be an object with 'role' and 'content', not {_kind(given)}")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    for name, value in given.items():
        if name not in {"role", "content"} and value:  # what clients send back of an answer is empty
            raise wrong(f"{where}.{name}", "cannot be used here: a message has a role and a text")
    return {"role": ROLES[role], "content": _content(given.get("content"), f"{where}.content")}


def _content(given: Any, where: str) -> str:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or not given:
        raise wrong(where, f"must be a string or a list of texts, not {_kind(given)}")
    for number, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{where}[{number}]", 'must be {"type": "text", "text": "..."}: the model reads text only')
    return "".join(part["text"] for part in given)


def read_prompts(fields: Fields) -> Sequence[str]:
    """Take the beginnings of texts that are to go on.

    Raises:
        RefusedError: They are no texts.
    """
    return fields.texts("prompt", fields.needed("prompt"), _PROMPTS)


def read_inputs(fields: Fields) -> Sequence[Text]:
    """Take the texts that something is to be said of: one or several, or several pairs of them.

    Raises:
        RefusedError: They are neither.
    """
    given = fields.needed("input")
    if not (isinstance(given, list) and given and all(isinstance(each, list) for each in given)):
        return fields.texts("input", given, _TEXTS)
    if len(given) > _TEXTS:
        raise wrong("input", f"may have at most {_TEXTS} pairs")
    found = []
    for pair in given:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise wrong("input", "must be a string, a list of strings, or a list of pairs of strings")
        found.append((pair[0], pair[1]))
    return found


def _same(value: Any, known: Any) -> bool:
    """Whether two values are one in JSON, where 0 is not false."""
    return bool(value == known) and isinstance(value, bool) == isinstance(known, bool)


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a fraction", str: "a string", list: "a list"}
    return "nothing" if value is None else kinds.get(type(value), "an object")
