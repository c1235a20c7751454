"""Verbs of the command line, each as an app of its own, and asking one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.testing import CliRunner


def verb(function: Callable[..., Any]) -> typer.Typer:
    """A command line with one verb."""
    app = typer.Typer()
    app.command()(function)
    return app


def ask(app: typer.Typer, *words: object) -> str:
    """What a verb prints; it must succeed."""
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result.stdout
