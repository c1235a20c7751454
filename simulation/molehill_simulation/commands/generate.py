"""``molehill generate``: a trained model answers or classifies on the machine that has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from molehill.characters import harmless, recovered
from molehill.decoding import DEFAULT
from molehill.errors import AnswerError
from molehill.extras import needs
from molehill.rowfiles.values import require_text
from molehill.terminal import INTERRUPTED, Json, explained, one_line, print_json, show_piece, show_shares
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
    told,
)

if TYPE_CHECKING:
    from molehill.decoding.interfaces import Strategy
    from molehill.decoding.stream import Answer, Asked
    from molehill_simulation.loaded import Loaded

_MANY = 3  # prompts from which on there is a bar


@dataclass(frozen=True)
class _Question:
    """A prompt, and who is to answer it where rows say so."""

    text: str
    ids: list[int]
    who: str = ""


def generate(
    model: Trained,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A question, or a text to classify; may be repeated.", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines, JSON, CSV, TSV or Parquet with text, instruction (and input) or messages, or one text a "
            "line; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of --rows that names the expert of each row.", show_default=False),
    ] = None,
    who: As = "global",
    strategy: StrategyName = DEFAULT,
    assigned: Assigned = None,
    n: Annotated[int, typer.Option("--n", min=1, max=1000, help="Answers to each prompt.")] = 1,
    raw: Annotated[bool, typer.Option("--raw", help="Go on with the text as it is, not as an instruction.")] = False,
    max_new_tokens: Longest = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Let texts that are too long lose their end.")] = False,
    route: Annotated[bool, typer.Option("--route", help="Show which experts answered.")] = False,
    base: Base = None,
    state: State = None,
    large: Large = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with a trained model, or classify texts, without exporting it."""
    with explained(as_json):
        if bool(prompt) == (rows is not None):
            raise AnswerError("there is nothing to answer" if not prompt else "--prompt and --rows exclude each other",
                              mend="Give --prompt or --rows.")  # fmt: skip
        if n > 1 and not temperature:
            raise AnswerError("all of --n answers would be the same", where="--temperature", mend="Give one above 0.")
        texts = [recovered(text) for text in prompt or ()]
        for text in texts:
            require_text(text, "prompt", "--prompt")
        try:
            with needs(EXTRA):
                from molehill.decoding.options import assigned as parsed
                from molehill.decoding.sampling import Sampling
                from molehill.decoding.stream import Asked

            asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), tuple(stop or ()))
            values = parsed(assigned or ())
            with opened(model, who, base, state, {"large": large}, quiet=as_json) as loaded:
                if not loaded.writes:
                    _classify(loaded, texts, rows, strategy, values, truncate=truncate, route=route, as_json=as_json)
                    return
                questions = list(_questions(loaded, texts, rows, column, raw=raw))
                if n > 1:
                    questions = [question for question in questions for _ in range(n)]
                chosen = loaded.strategy(strategy, values)
                together = chosen.own and not route
                if column is not None and not together:
                    raise AnswerError("--column goes with the model's own logits, without --strategy and --route")
                if together and (len(questions) > 1 or column is not None):
                    _together(loaded, questions, asked, column=column is not None, as_json=as_json)
                else:
                    _one_by_one(loaded, questions, asked, chosen, route=route, as_json=as_json)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _questions(
    loaded: Loaded, texts: Sequence[str], rows: Path | None, column: str | None, *, raw: bool
) -> Iterator[_Question]:
    for text in texts:
        yield _Question(text, loaded.encode(text, raw=raw))
    if rows is None:
        return
    from molehill.rowfiles.reading import read_any
    from molehill_simulation.prompts import prompt_of

    for where, row in read_any(rows):
        text, ids = prompt_of(loaded, row, where, raw=raw)
        name = ""
        if column is not None:
            if column not in row:
                raise AnswerError(f"the row has no {column!r}", where=where, mend=f"Columns there: {', '.join(row)}.")
            name = str(row[column] or "")
        yield _Question(text, ids, name)


def _together(loaded: Loaded, questions: Sequence[_Question], asked: Asked, *, column: bool, as_json: bool) -> None:
    """Several in one pass: the answers come in their order, when all before are there."""
    settings = None
    if column:
        settings = [loaded.setting(question.who) for question in questions]
    answers = loaded.generate_all([question.ids for question in questions], asked, settings)
    console = Console(stderr=True, quiet=as_json)
    shown = track(answers, "Answering", len(questions), console=console, transient=True)
    found = list(shown if len(questions) >= _MANY else answers)
    if as_json:
        print_json({"model": told(loaded), "answers": [_row(q, a) for q, a in zip(questions, found, strict=True)]})
        return
    for number, (question, answer) in enumerate(zip(questions, found, strict=True)):
        who = f" [{harmless(question.who)}]" if question.who else ""
        typer.echo(f"{chr(10) if number else ''}> {one_line(question.text)}{who}\n{harmless(answer.text, lines=True)}")


def _one_by_one(
    loaded: Loaded, questions: Sequence[_Question], asked: Asked, chosen: Strategy, *, route: bool, as_json: bool
) -> None:
    """Each as it comes."""
    rows = []
    for number, question in enumerate(questions):
        if not as_json and len(questions) > 1:
            typer.echo(f"{chr(10) if number else ''}> {one_line(question.text)}")
        with loaded.counting(on=route) as shares:
            answer = loaded.answering(question.ids, asked, chosen).rest(None if as_json else show_piece)
        row = _row(question, answer)
        if not as_json:
            typer.echo("")
        if route:
            row["routes"] = shares
            if not as_json:
                show_shares(shares)
        rows.append(row)
    if as_json:
        print_json({"model": told(loaded), "answers": rows})


def _classify(
    loaded: Loaded, texts: list[str], rows: Path | None, strategy: str, values: dict[str, Any], *, truncate: bool,
    route: bool, as_json: bool,
) -> None:  # fmt: skip
    if rows is not None:
        from molehill.rowfiles.reading import read_texts

        texts = [row["text"] for _, row in read_texts(rows)]
    found = loaded.classify(texts, strategy=strategy, params=values, truncate=truncate)
    routes = [loaded.route(text, truncate=truncate) for text in texts] if route else None
    if as_json:
        told_rows = [
            {"text": text, "label": each.label, "probability": each.probability, "probabilities": each.probabilities}
            for text, each in zip(texts, found, strict=True)
        ]
        for row, shares in zip(told_rows, routes or (), strict=False):
            row["routes"] = shares
        print_json({"model": told(loaded), "predictions": told_rows})
        return
    width = max(len(each.label) for each in found)
    for number, (text, each) in enumerate(zip(texts, found, strict=True)):
        typer.echo(f"{harmless(each.label):<{width}}  {each.probability:6.1%}  {one_line(text)}")
        if routes is not None:
            show_shares(routes[number])


def _row(question: _Question, answer: Answer) -> dict[str, Any]:
    found = {"prompt": question.text, "answer": answer.text, "tokens": answer.tokens, "reason": answer.reason}
    return {**found, "expert": question.who} if question.who else found
