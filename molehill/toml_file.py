"""TOML files that people write: read, and their mistakes found with file and line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from molehill import registry
from molehill.errors import ConfigError


def read(path: Path, what: str) -> tuple[dict[str, Any], Lines]:
    """Read a file.

    Args:
        path: The file.
        what: What it is, for the message.

    Returns:
        Its values, and where they are written.

    Raises:
        ConfigError: It cannot be read or is not TOML.
    """
    origin = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        mend = "Check its name and its permissions." if isinstance(error, OSError) else "Save it as UTF-8."
        raise ConfigError(f"cannot read the {what}: {reason}", where=origin, mend=mend) from None
    try:
        return tomllib.loads(text), Lines(text, origin)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"not valid TOML: {error}", where=origin, mend="Mend it there.") from None


def explain(error: ValidationError, root: type[BaseModel], values: Mapping[str, Any], lines: Lines) -> ConfigError:
    """What pydantic found first, with key, file and line.

    Args:
        error: The error.
        root: What was validated against.
        values: What was validated.
        lines: Where the values are written.
    """
    first = error.errors()[0]
    path, text = registry.first_error(error, values)
    key = ".".join(path)
    if first["type"] != "extra_forbidden":
        return ConfigError(f"{key}: {text}", where=lines.find(key), mend=f"Given: {first['input']!r}.")
    section: type[BaseModel] | None = root
    for part in path[:-1]:
        info = section.model_fields.get(part) if section else None
        annotation = info.annotation if info else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    known = sorted(section.model_fields) if section else []
    near = difflib.get_close_matches(path[-1], known, n=1)
    mend = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
    return ConfigError(f"unknown key {key!r}", where=lines.find(key), mend=mend)


def meanings(section: type[BaseModel]) -> dict[str, str]:
    """The descriptions in the ``Attributes`` part of a class docstring, by name."""
    block = (section.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {8}(\w+): (.*(?:\n {9,}.*)*)", block, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in entries}


class Lines:
    """Finds the line of a dotted key in TOML text, for error messages.

    Args:
        text: The text.
        origin: Its file, or what else it is.
    """

    def __init__(self, text: str, origin: str) -> None:
        self.text = text
        self._origin = origin
        self.overridden: set[str] = set()

    def find(self, key: str) -> str:
        """``file:line`` of the key, or of its nearest parent; the file alone when neither is there."""
        if any(key == name or key.startswith(f"{name}.") for name in self.overridden):
            return f"--set {key}"
        parts = [part for part in key.split(".") if not part.isdigit()]
        while parts:
            number = self.number(parts)
            if number:
                return f"{self._origin}:{number}"
            parts = parts[:-1]
        return self._origin

    def number(self, parts: Sequence[str]) -> int | None:
        """The line of the key with these parts; None when it is not written."""
        parts = list(parts)
        section: list[str] = []
        for number, line in enumerate(self.text.splitlines(), start=1):
            header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
            if header and not re.match(r"\s*[\w.\"-]+\s*=", line):
                section = [part.strip(" \"'") for part in header[1].split(".")]
                if section == parts:
                    return number
                continue
            name, equals, rest = line.partition("=")
            path = section + [part.strip(" \"'") for part in name.split(".")]
            if equals and path == parts:
                return number
            inline = path == parts[:-1] and re.search(rf"[{{,]\s*[\"']?{re.escape(parts[-1])}[\"']?\s*=", rest)
            if equals and inline:
                return number
        return None
