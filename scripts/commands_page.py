"""Every command with its arguments and options, for docs/reference/commands.md."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from molehill.cli import app


def page(note: str) -> str:
    """The whole page, for all that is installed.

    Args:
        note: That it is generated.
    """
    lines = [
        "# Commands\n",
        note,
        "`molehill COMMAND --help` says the same. Where a command has `--json`, it prints one JSON document alone;",
        "[exit codes](errors.md) are those of errors.\n",
    ]
    for words, command in commands():
        lines += [f"## {' '.join(words)}\n", *_texts(command.help), *_parameters(words, command)]
    return "\n".join(lines)


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words, groups before what is in them."""
    root = typer.main.get_command(app)
    yield from _below(("molehill",), root)


def _below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    if hasattr(command, "list_commands"):
        for name in command.list_commands(None):
            if (found := command.get_command(None, name)) is not None:
                yield from _below((*words, name), found)


def _texts(text: str | None) -> list[str]:
    return [f"{' '.join(part.split())}\n" for part in inspect.cleandoc(text or "").split("\n\n") if part.strip()]


def _parameters(words: tuple[str, ...], command: Any) -> list[str]:
    context = command.context_class(command, info_name=words[-1])
    rows = [_row(each, context) for each in command.get_params(context) if not _same_for_all(each)]
    return ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""] if rows else []


def _same_for_all(each: Any) -> bool:
    """Whether it is typer's: what it says of completion depends on the shell."""
    return "--help" in each.opts or "completion" in each.opts[0] or getattr(each, "hidden", False)


def _row(each: Any, context: Any) -> str:
    names = ", ".join([*each.opts, *each.secondary_opts]) if each.param_type_name == "option" else ""
    metavar = "" if getattr(each, "is_flag", False) else each.make_metavar(context).replace(" RANGE", "")
    name = f"`{' '.join(part for part in (names, metavar) if part)}`"
    meaning = getattr(each, "help", None) or ""
    cells = (name, _default(each), " ".join(meaning.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(each: Any) -> str:
    if each.required:
        return "required"
    told = getattr(each, "show_default", None)
    if isinstance(told, str):
        return told
    if told is False or each.default is None or callable(each.default) or each.default == ():
        return ""
    if isinstance(each.default, bool):
        return "on" if each.default else ""
    return f"`{each.default}`"
