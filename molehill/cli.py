"""The command line: ``molehill VERB``.

Every part of the house declares the verbs that drive it as entry points (group ``molehill.commands``, name ``VERB`` or
``GROUP.VERB``, value a function or a `typer.Typer`), and another distribution can add its own. A verb is imported when
it is called, all of them for a list; what is heavy waits until the verb runs. The module of a verb may name the extra
it needs as ``EXTRA``: an installation without it does not list the verb, and says what brings it when it is called.

Text for people goes to the terminal; with ``--json`` standard output holds one JSON document and nothing else. A
mistake of the user ends in one paragraph and an exit code (`docs/reference/errors.md`), never in a traceback.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cached_property
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from molehill import __version__, logs, plugins
from molehill.characters import survive
from molehill.errors import ConfigError
from molehill.extras import DISTRIBUTION, lacking
from molehill.terminal import explained

if TYPE_CHECKING:
    import click

_GROUP = "molehill.commands"


def main() -> None:
    """Run the command line."""
    survive()
    if "_MOLEHILL_COMPLETE" in os.environ:  # a shell asks what can be typed: nobody reads warnings
        logging.disable()
    app(prog_name="molehill")


class Verbs(TyperGroup):
    """The verbs that are declared, each imported when it is asked for."""

    @cached_property
    def _declared(self) -> dict[str, list[EntryPoint]]:
        """By verb, its entry point and those of what is below it; a name that two declare is the first one's."""
        found: dict[str, list[EntryPoint]] = {}
        taken: dict[str, EntryPoint] = {}
        for point in sorted(plugins.points(_GROUP), key=lambda point: point.name.count(".")):  # groups come first
            verb, _, below = point.name.partition(".")
            other = taken.setdefault(point.name, point)
            if other is not point:
                plugins.leave_out(plugins.broken(point, f"{plugins.owner(other)} has that command already"))
            elif below and verb not in found:
                plugins.leave_out(plugins.broken(point, f"there is no command {verb!r}"))
            else:
                found.setdefault(verb, []).append(point)
        return found

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - as click calls it
        """The names of all verbs that can be imported, sorted; of a plug-in that cannot, a warning says why."""
        for verb, points in list(self._declared.items()):
            if verb in self.commands:
                continue
            try:
                self.commands[verb] = _built(points)
            except ConfigError as error:
                del self._declared[verb]
                if not plugins.ours(points[0]):
                    plugins.leave_out(error)
        return sorted(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb of a name, None when there is none; one that cannot be imported ends the program."""
        if cmd_name not in self.commands and cmd_name in self._declared:
            with explained():
                self.commands[cmd_name] = _built(self._declared[cmd_name])
        return super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb that is called; for one that there is not, those of a similar name."""
        if args and args[0] not in self._declared:
            self.list_commands(ctx)
        return super().resolve_command(ctx, args)


def _built(points: list[EntryPoint]) -> click.Command:
    """The command of a verb, with what plug-ins and other parts put below it."""
    point, *below = points
    command = _imported(point)
    for each in below:
        name = each.name.partition(".")[2]
        try:
            if not isinstance(command, TyperGroup):
                raise plugins.broken(each, f"{point.name!r} has no commands below it")
            if name in command.commands:
                raise plugins.broken(each, f"{plugins.owner(point)} has that command already")
            command.add_command(_imported(each), name)
        except ConfigError as error:
            if not plugins.ours(each):
                plugins.leave_out(error)
    return command


def _imported(point: EntryPoint) -> click.Command:
    """What an entry point says, as a command.

    Raises:
        ConfigError: It is of a plug-in and fails, or of a part that is not installed.
    """
    try:
        command = _command(point.load())
    except ModuleNotFoundError as error:
        part = point.module.partition(".")[0]
        if not plugins.ours(point):
            raise plugins.broken(point, error) from None
        if error.name != part:
            raise
        mend = f"Install all of {DISTRIBUTION}, with the extra for what you do."
        raise ConfigError(f"this installation has no {part}", mend=mend) from None
    except plugins.FAILURES as error:
        if plugins.ours(point):
            raise
        raise plugins.broken(point, error) from None
    command.name = point.name.rpartition(".")[2]
    command.hidden = bool(lacking(getattr(importlib.import_module(point.module), "EXTRA", "")))
    return command


def _command(verb: object) -> click.Command:
    if isinstance(verb, typer.Typer):
        return typer.main.get_group(verb)
    if not callable(verb):
        raise TypeError("neither a function nor a typer.Typer")
    alone = typer.Typer(add_completion=False)
    alone.command()(verb)
    return typer.main.get_command(alone)


def _print_version(wanted: bool) -> None:
    if wanted:
        with explained():
            typer.echo(f"molehill {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Verbs,
    help="Fine-tune one language model for many private data owners with mixtures of LoRA experts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", envvar="MOLEHILL_LOG_JSON", help="Log to standard error, one JSON object a line."),
    ] = False,
) -> None:
    """Options before the command."""
    if log_json:
        logs.use_json()
