"""Parameters of strategies and pickers, read and checked with what a device has."""

from __future__ import annotations

import dataclasses
import operator
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

import annotated_types

from molehill import catalogue
from molehill.catalogue import Method, NoParams
from molehill.decoding.interfaces import Passes, Strategy
from molehill.errors import AnswerError


@dataclass(frozen=True)
class Rest:
    """Marks the field of parameters, a mapping, that takes all keys which no other field has."""


_LIMITS: dict[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    annotated_types.Ge: ("ge", "at least", operator.ge),
    annotated_types.Gt: ("gt", "more than", operator.gt),
    annotated_types.Le: ("le", "at most", operator.le),
    annotated_types.Lt: ("lt", "less than", operator.lt),
}


def assigned(words: Iterable[str]) -> dict[str, Any]:
    """Parameters as a command line gives them, ``key=value``; what is no TOML is text.

    Raises:
        AnswerError: A word is no assignment, or a key comes twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise AnswerError(f"{word!r} is no key=value", where="--set")
        if key in found:
            raise AnswerError(f"{key} is given twice", where="--set")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text.strip()
    return found


def build(axis: str, name: str, values: Mapping[str, Any] | None = None) -> Any:
    """Build a method of decoding.

    Args:
        axis: ``decoding`` or ``picker``.
        name: Of the method.
        values: Its parameters.

    Raises:
        AnswerError: A parameter is unknown, or out of its range.
        ConfigError: There is no such method.
    """
    method = catalogue.get(axis, name)
    params = _params(method, dict(values or {}))
    return method.target() if method.params is NoParams else method.target(params)


def require_fits(strategy: Strategy, name: str, passes: Passes, *, several: bool = True) -> None:
    """Refuse a strategy that is for models of another kind.

    Args:
        strategy: That was built.
        name: Of it.
        passes: Of the model.
        several: Whether its numbers are of one of several classes or tokens, which is what strategies combine.

    Raises:
        AnswerError: It is.
    """
    if not several and not strategy.own:
        what = f"strategy {name} is for classes and for texts, and this model says something else"
        raise AnswerError(what, where="--strategy", mend="Leave it out.")
    if strategy.writes and not passes.writes:
        raise AnswerError(f"strategy {name} is for models that write text", where="--strategy")
    if strategy.classifies and passes.writes:
        raise AnswerError(f"strategy {name} is for models that classify", where="--strategy")
    if strategy.routed and not passes.size:
        raise AnswerError(f"strategy {name} needs experts that a router chooses", where="--strategy")


def _params(method: Method, values: dict[str, Any]) -> Any:
    hints = get_type_hints(method.params, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(method.params)}
    rest = {}
    for name in [name for name, hint in hints.items() if Rest() in getattr(hint, "__metadata__", ())]:
        del known[name]
        rest[name] = {key: values.pop(key) for key in [*values] if key not in known}
    for key, value in values.items():
        if key not in known:
            takes = ", ".join(known) or "no keys"
            raise AnswerError(f"unknown key {key!r} for {method.axis} {method.name}", mend=f"It takes {takes}.")
        values[key] = _checked(f"{method.axis} {method.name}, key {key!r}", value, hints[key])
    lacks = [
        name for name, field in known.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if lacks:
        raise AnswerError(f"{method.axis} {method.name} needs {lacks[0]}", mend=f"Add --set {lacks[0]}=...")
    return method.params(**values, **rest)


def _checked(where: str, value: Any, hint: Any) -> Any:
    kind, *limits = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    options = get_args(kind) if str(get_origin(kind)).endswith("Literal") else ()
    if options:
        if value not in options:
            raise AnswerError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise AnswerError(f"{where}: {value!r} is no {kind.__name__}")
    for limit in limits:
        attribute, words, holds = _LIMITS[type(limit)]
        bound = getattr(limit, attribute)
        if not holds(value, bound):
            raise AnswerError(f"{where} must be {words} {bound}, not {value}")
    return value
