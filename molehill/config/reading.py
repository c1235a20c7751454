"""Reading a configuration, and saying what is wrong with it and where."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from molehill import registry, toml_file
from molehill.config.whole import Config, method_refs
from molehill.errors import ConfigError
from molehill.toml_file import Lines


def load(source: Path | str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file and apply ``key=value`` overrides.

    Args:
        source: TOML file; None for the defaults.
        overrides: Such as ``run.rounds=3`` or ``base.model=./model``; the value is TOML, or a plain string.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: The file cannot be read or parsed, or a key, type or method is wrong.
    """
    values, lines = ({}, Lines("", "defaults")) if source is None else toml_file.read(Path(source), "configuration")
    for override in overrides:
        _override(values, override, lines)
    return parse(values, lines)


def parse(values: Mapping[str, Any], lines: Lines | None = None) -> Config:
    """Validate nested values.

    Raises:
        ConfigError: A key, type or method is wrong; names the key, and file and line where they are known.
    """
    lines = lines or Lines("", "configuration")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise toml_file.explain(error, Config, values, lines) from None
    except ConfigError as error:
        raise ConfigError(error.what, where=lines.find(error.where or "preset"), mend=error.mend) from None
    for key, axis, ref in method_refs(config):
        try:
            registry.parse_params(axis, ref.name, ref.params)
        except ConfigError as error:
            where = lines.find(f"{key}.{error.where}" if error.where else key)
            raise ConfigError(f"{key}: {error.what}", where=where, mend=error.mend) from None
    return config


def _override(values: dict[str, Any], override: str, lines: Lines) -> None:
    key, equals, raw = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"cannot read override {override!r}", where="--set", mend="Write --set section.key=value.")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    at = values
    for part in parts[:-1]:
        inner = at.setdefault(part, {})
        if isinstance(inner, str):  # selector = "top_k" with --set molora.selector.k=1
            inner = at[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key!r}: {part!r} is not a section", where="--set")
        at = inner
    at[parts[-1]] = value
    lines.overridden.add(key.strip())
