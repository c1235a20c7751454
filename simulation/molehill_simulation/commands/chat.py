"""``molehill chat``: a conversation with a trained model, by whose gate one likes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from molehill.decoding import DEFAULT
from molehill.errors import MolehillError
from molehill.extras import needs
from molehill.terminal import INTERRUPTED, explained, learning, say, show_piece, show_shares, typed_lines
from molehill_simulation.commands.asking import (
    EXTRA,
    As,
    Assigned,
    Base,
    Large,
    Longest,
    Seed,
    State,
    Stop,
    StrategyName,
    Temperature,
    TopK,
    TopP,
    Trained,
    opened,
)

if TYPE_CHECKING:
    from molehill.decoding.stream import Asked
    from molehill_simulation.loaded import Loaded

_HELP = """\
/as WHO       another gate, an expert alone, or base
/system TEXT  what the model is told first, in a new conversation
/reset        a new conversation
/route        which experts gave the last answer
Ctrl-C ends an answer, Ctrl-D the conversation."""


def chat(
    model: Trained,
    system: Annotated[str, typer.Option(help="What a conversation begins with.", show_default=False)] = "",
    who: As = "global",
    strategy: StrategyName = DEFAULT,
    assigned: Assigned = None,
    max_new_tokens: Longest = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    base: Base = None,
    state: State = None,
    large: Large = None,
) -> None:
    """Talk with a trained model; /help says what else can be typed. Ctrl-C ends an answer, Ctrl-D the conversation."""
    with explained():
        try:
            with needs(EXTRA):
                from molehill.decoding.options import assigned as parsed
                from molehill.decoding.sampling import Sampling
                from molehill.decoding.stream import Asked

            asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop or ())
            with contextlib.ExitStack() as held:
                loaded = held.enter_context(opened(model, who, base, state, {"large": large}, quiet=False))
                talk = _Talk(loaded, asked, strategy, parsed(assigned or ()), system)
                held.callback(talk.close)
                people = sys.stdin.isatty()
                if people:
                    typer.echo(f"{loaded.source.name}, as {who}. /help says what can be typed.")
                for line in typed_lines(people):
                    talk.take(line, people=people)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


class _Talk:
    """One conversation, and who answers."""

    def __init__(self, loaded: Loaded, asked: Asked, strategy: str, values: Mapping[str, Any], system: str) -> None:
        self._loaded, self._asked, self._named, self._values = loaded, asked, strategy, values
        self._strategy = loaded.strategy(strategy, values, learning(quiet=False))
        self._system = system
        self._messages: list[dict[str, str]] = []
        self._shares: dict[str, dict[str, float]] = {}
        loaded.require_writes()

    def close(self) -> None:
        self._loaded.close()

    def take(self, line: str, *, people: bool) -> None:
        """Do what a line says: an order, or something to answer."""
        try:
            if line.startswith("/"):
                self._order(*line[1:].split(maxsplit=1))
            else:
                self._answer(line)
        except KeyboardInterrupt:
            if not people:
                raise
            typer.echo("")
        except MolehillError as error:
            if not people:
                raise
            say(Text(f"{error} /reset begins a new conversation."))

    def _order(self, name: str = "", rest: str = "") -> None:
        if name == "as" and rest:
            self._loaded = self._loaded.instead(rest.strip())
            self._strategy = self._loaded.strategy(self._named, self._values, learning(quiet=False))
        elif name == "system":
            self._system = rest
            self._messages.clear()
        elif name in {"reset", "new"}:
            self._messages.clear()
        elif name == "route":
            if not self._shares:
                typer.echo("There is no answer yet, or no router.")
            else:
                show_shares(self._shares)
        else:
            typer.echo(_HELP)

    def _answer(self, line: str) -> None:
        first = [{"role": "system", "content": self._system}] if self._system else []
        turn = {"role": "user", "content": line}
        ids = self._loaded.encode_messages([*first, *self._messages, turn])
        with self._loaded.counting() as shares:
            stream = self._loaded.answering(ids, self._asked, self._strategy)
            try:
                stream.rest(show_piece)
            finally:
                if stream.answer.tokens:
                    self._messages += [turn, {"role": "assistant", "content": stream.answer.text}]
        self._shares = shares
        typer.echo("")
