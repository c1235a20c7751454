"""``molehill edge run``: texts are classified or answered, or a conversation is held."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from molehill.errors import AnswerError, BundleError
from molehill.rowfiles import pairs
from molehill.rowfiles.reading import read_texts
from molehill.terminal import (
    INTERRUPTED,
    Json,
    explained,
    learning,
    one_line,
    print_json,
    say,
    show_piece,
    show_shares,
    typed_lines,
)
from molehill_edge.commands.opening import (
    Assigned,
    Experts,
    GateOption,
    Insecure,
    Memory,
    Name,
    Spin,
    StoreFolder,
    StrategyName,
    Threads,
    opened,
    who,
)  # fmt: skip

if TYPE_CHECKING:
    from molehill.decoding.interfaces import Strategy
    from molehill.decoding.stream import Answer
    from molehill_edge.bundle import Bundle
    from molehill_edge.routes import RouterReport


def run(
    name: Name,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text or a question; may be repeated.", show_default=False)
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            "--pair", help="The second text of each --text, for a bundle that reads pairs.", show_default=False
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help='JSON lines, JSON, CSV, TSV or Parquet with "text", or one text a line; - reads standard input.',
            show_default=False,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Hold a conversation; /new begins another, Ctrl-D ends it.")
    ] = False,
    gate: GateOption = None,
    experts: Experts = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Let texts that are too long lose their end.")] = False,
    route: Annotated[bool, typer.Option("--route", help="Show which experts each text used.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the text as it is, not as an instruction.")] = False,
    system: Annotated[str, typer.Option(help="What a conversation begins with.", show_default=False)] = "",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens.", show_default="256, or what fits")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens of this probability together.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this string; may be repeated.", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draws.", show_default="a new one")] = None,
    strategy: StrategyName = None,
    assigned: Assigned = None,
    threads: Threads = None,
    spin: Spin = None,
    memory_mb: Memory = None,
    insecure_local: Insecure = False,
    store: StoreFolder = None,
    as_json: Json = False,
) -> None:
    """Say of texts what the bundle is for, or answer them, or hold a conversation."""
    with explained(as_json):
        try:
            texts = [] if chat else _texts(text, pair, file)
            if chat and (text or pair or file or as_json):
                raise BundleError("--chat goes without --text, --pair, --file and --json")
            with opened(
                name, insecure=insecure_local, store=store, threads=threads, spin=spin, memory_mb=memory_mb, gate=gate,
                experts=experts,
            ) as bundle:  # fmt: skip
                from molehill.decoding.options import assigned as parsed
                from molehill_edge.manifest import reading

                chosen = None
                if strategy is not None or assigned:
                    chosen = bundle.strategy(strategy, parsed(assigned or ()), learning(as_json))
                sampling = {
                    "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "strategy": chosen
                }  # fmt: skip
                if chat:
                    _converse(bundle, system, sampling, max_new_tokens, stop or ())
                elif not reading(bundle.manifest.task).writes:
                    _predict(bundle, texts, chosen, truncate=truncate, route=route, as_json=as_json)
                else:
                    options = {**sampling, "max_new_tokens": max_new_tokens, "stop": stop or (), "raw": raw}
                    if pair:
                        raise BundleError("the bundle generates text; it reads no pairs of texts", where="--pair")
                    _answer(bundle, list(map(pairs.shown, texts)), options, route=route, as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _texts(given: Sequence[str] | None, pair: Sequence[str] | None, file: Path | None) -> list[pairs.Text]:
    """All texts of the command line and the file, in this order."""
    texts = pairs.given(given, pair, "--text")
    if file is not None:
        texts += [pairs.of_row(row, where) for where, row in read_texts(file)]
    if not texts:
        raise BundleError("no text", mend="Give --text, --file or --chat.")
    return texts


def _predict(
    bundle: Bundle, texts: list[pairs.Text], strategy: Strategy | None, *, truncate: bool, route: bool, as_json: bool
) -> None:
    from molehill.predictions import lines

    found = bundle.predict(texts, truncate=truncate, strategy=strategy)
    routes = [bundle.route_report(text, truncate=truncate) for text in texts] if route else None
    if as_json:
        rows = [pairs.told(text) | each.as_json() for text, each in zip(texts, found, strict=True)]
        print_json({"bundle": who(bundle), "predictions": _with_routes(rows, routes)})
        return
    for number, (text, line) in enumerate(zip(texts, lines(found), strict=True)):
        typer.echo(f"{line}  {one_line(pairs.shown(text))}")
        if routes is not None:
            _show_routes(routes[number])


def _answer(bundle: Bundle, texts: list[str], options: dict[str, Any], *, route: bool, as_json: bool) -> None:
    rows = []
    routes: list[list[RouterReport]] | None = [] if route else None
    for number, text in enumerate(texts):
        if not as_json and len(texts) > 1:
            typer.echo(f"{'' if number == 0 else chr(10)}> {one_line(text)}")
        answer: Answer = bundle.generate(text, on_text=None if as_json else show_piece, **options)
        rows.append({"text": text, "answer": answer.text, "tokens": answer.tokens, "reason": answer.reason})
        if not as_json:
            typer.echo("")
        if routes is not None:
            routes.append(bundle.route_report(text))
            if not as_json:
                _show_routes(routes[-1])
    if as_json:
        print_json({"bundle": who(bundle), "answers": _with_routes(rows, routes)})


def _converse(
    bundle: Bundle, system: str, sampling: dict[str, Any], max_new_tokens: int | None, stop: Sequence[str]
) -> None:
    """Read a line, answer it, until the end of input; Ctrl-C ends an answer, and at the prompt the conversation."""
    chat = bundle.chat(system=system, **sampling)
    people = sys.stdin.isatty()
    for line in typed_lines(people):
        if line == "/new":
            chat = bundle.chat(system=system, **sampling)
            continue
        try:
            chat.say(line, max_new_tokens=max_new_tokens, stop=stop, on_text=show_piece)
        except KeyboardInterrupt:
            if not people:
                raise
        except (AnswerError, BundleError) as error:
            if not people:
                raise
            say(Text(f"{error} /new begins a new conversation."))
            continue
        typer.echo("")


def _show_routes(reports: Sequence[RouterReport]) -> None:
    show_shares({each.router: dict(zip(each.experts, each.shares, strict=True)) for each in reports})


def _with_routes(rows: list[dict[str, Any]], routes: list[list[RouterReport]] | None) -> list[dict[str, Any]]:
    if routes is not None:
        for row, reports in zip(rows, routes, strict=True):
            row["routes"] = [
                {"router": each.router, "shares": dict(zip(each.experts, each.shares, strict=True))} for each in reports
            ]
    return rows
