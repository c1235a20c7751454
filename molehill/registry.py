"""Methods of a configuration: parameters are read and validated, and the method is built.

    registry.build("selector", "top_k", {"k": 2})   ->  TopK(TopKParams(k=2))

What methods are is in `molehill.catalogue`, whose names are here too.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import with_config as _with_config

from molehill.catalogue import (
    Method,
    NoParams,
    axes,
    declared,
    either,
    get,
    load,
    meaning,
    methods,
    register,
    those,
    words,
)
from molehill.errors import ConfigError

__all__ = [
    "Method", "NoParams", "axes", "build", "declared", "either", "first_error", "get", "load", "meaning", "methods",
    "parse_params", "register", "those", "words",
]  # fmt: skip


def parse_params(axis: str, name: str, values: Mapping[str, Any]) -> Any:
    """Validate ``values`` and return the method's params dataclass.

    Raises:
        ConfigError: Unknown method, unknown key or wrong type.
    """
    method = get(axis, name)
    known = {f.name for f in dataclasses.fields(method.params)}
    unknown = sorted(set(values) - known)
    if unknown:
        allowed = ", ".join(sorted(known)) or "none"
        raise ConfigError(
            f"unknown key {unknown[0]!r} for {axis} {name!r}", where=unknown[0], mend=f"Keys it takes: {allowed}."
        )
    try:
        return _adapter(method.params).validate_python(dict(values))  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        path, text = first_error(error, values)
        key = ".".join(path)
        of = f", key {key!r}" if key else ""
        raise ConfigError(f"{axis} {name!r}{of}: {text}", where=key) from None
    except ValueError as error:
        raise ConfigError(f"{axis} {name!r}: {error}") from None


def first_error(error: ValidationError, values: Any) -> tuple[list[str], str]:
    """What pydantic found first, in the terms of a configuration.

    Args:
        error: The error.
        values: What was validated.

    Returns:
        The path of the value (keys and indices only, and not which member of a union did not fit), and the text.
    """
    first = error.errors()[0]
    path = []
    for part in first["loc"]:
        inside = part in values if isinstance(values, Mapping) else isinstance(part, int)
        if inside:
            values = values[part]
            path.append(str(part))
        elif first["type"] == "missing" and part is first["loc"][-1]:
            path.append(str(part))
    text = first["msg"].removeprefix("Value error, ").replace("tuple", "list").replace("Tuple", "List")
    return path, re.sub(r"dictionary( or (an )?instance of \w+)?$", "table", text)


@functools.cache  # building one takes longer than all that is done with it
def _adapter(params: type[Any]) -> TypeAdapter[Any]:
    if not hasattr(params, "__pydantic_config__"):
        _with_config(ConfigDict(extra="forbid"))(params)
    return TypeAdapter(params)


def build(axis: str, name: str, values: Mapping[str, Any] | None = None, /, **context: Any) -> Any:
    """Build the method: call its target with its params (if it has any) and ``context``.

    Args:
        axis: Interface.
        name: Method.
        values: Parameters as read from a configuration.
        **context: What the interface hands to every implementation (for example ``d_in``).

    Returns:
        Whatever the target returns.
    """
    method = get(axis, name)
    params = parse_params(axis, name, values or {})
    return method.target(**context) if method.params is NoParams else method.target(params, **context)
