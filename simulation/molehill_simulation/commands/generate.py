"""``molehill generate``: a trained model answers, or says what it learnt to, on the machine that has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molehill.characters import harmless, recovered
from molehill.decoding import DEFAULT
from molehill.errors import AnswerError
from molehill.extras import needs
from molehill.rowfiles import pairs
from molehill.rowfiles.pairs import Text
from molehill.terminal import (
    INTERRUPTED,
    Json,
    explained,
    learning,
    one_line,
    print_json,
    show_piece,
    show_shares,
    tracked,
)
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


@dataclass(frozen=True)
class _Said:
    """An answer to a question; who was asked, if that was counted; and how good it is, if that was asked for."""

    question: _Question
    answer: Answer
    routes: Mapping[str, Mapping[str, float]] | None = None
    score: float | None = None


@dataclass(frozen=True)
class _Asking:
    """How questions are answered, by the options that say so."""

    asked: Asked
    strategy: Strategy
    n: int
    rank_by: str | None
    column: str | None
    route: bool
    as_json: bool

    @property
    def live(self) -> bool:
        """Whether pieces of an answer are shown as they come."""
        return self.rank_by is None and not self.as_json

    def quiet(self, many: int) -> bool:
        """Whether so many are gone through without a bar."""
        return self.as_json or many < _MANY


def generate(
    model: Trained,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A question, or a text to judge; may be repeated.", show_default=False)
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="The second text of each --prompt, for a model that reads pairs.", show_default=False),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines, JSON, CSV, TSV or Parquet with what training reads, with or without answers, or one text "
            "a line; - reads standard input.",
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
    rank_by: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Score the answers, and print the best to each prompt first: likelihood, the mean log probability.",
            show_default="as they were drawn",
        ),
    ] = None,
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
    """Answer prompts with a trained model, or have it say what it learnt to of texts, without exporting it."""
    with explained(as_json):
        if bool(prompt) == (rows is not None):
            raise AnswerError("there is nothing to answer" if not prompt else "--prompt and --rows exclude each other",
                              mend="Give --prompt or --rows.")  # fmt: skip
        if n > 1 and not temperature:
            raise AnswerError("all of --n answers would be the same", where="--temperature", mend="Give one above 0.")
        if column is not None and rows is None:
            raise AnswerError("no rows are given", where="--column", mend="Give --rows, or --as for an expert.")
        if column is not None and who != "global":
            raise AnswerError("the rows say which expert answers", where="--as", mend="Leave out --as or --column.")
        texts = pairs.given(prompt, pair, "--prompt")
        try:
            with needs(EXTRA):
                from molehill.decoding import ranking
                from molehill.decoding.options import assigned as parsed
                from molehill.decoding.sampling import Sampling
                from molehill.decoding.stream import Asked

            asked = Asked(max_new_tokens, Sampling(temperature, top_k, top_p, seed), stop or ())
            values = parsed(assigned or ())
            if rank_by is not None:
                ranking.require(rank_by)
            with opened(model, who, base, state, {"large": large}, quiet=as_json) as loaded:
                if loaded.writes and pair:
                    raise AnswerError("the model writes text; it reads no pairs of texts", where="--pair")
                given = {
                    "--rank-by": rank_by is not None, "--column": column is not None, "--n": n > 1, "--raw": raw,
                    "--max-new-tokens": max_new_tokens is not None, "--temperature": temperature > 0,
                    "--top-k": top_k > 0, "--top-p": top_p < 1, "--stop": bool(stop), "--seed": seed is not None,
                }  # fmt: skip
                if idle := ["--truncate"] * truncate if loaded.writes else [name for name, on in given.items() if on]:
                    what = f"the model {'writes, and cuts no prompt' if loaded.writes else 'writes nothing'}"
                    raise AnswerError(what, where=idle[0], mend="Leave it out.")
                if not loaded.writes:
                    texts = texts if rows is None else _texts(rows)
                    _predict(loaded, texts, strategy, values, truncate=truncate, route=route, as_json=as_json)
                    return
                questions = list(_questions(loaded, prompt or (), rows, column, raw=raw))
                chosen = loaded.strategy(strategy, values, learning(as_json))
                _answer(loaded, questions, _Asking(asked, chosen, n, rank_by, column, route, as_json))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _texts(rows: Path) -> list[Text]:
    from molehill.rowfiles.reading import read_texts

    return [pairs.of_row(row, where) for where, row in read_texts(rows)]


def _questions(
    loaded: Loaded, texts: Sequence[str], rows: Path | None, column: str | None, *, raw: bool
) -> Iterator[_Question]:
    for text in map(recovered, texts):
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
            name = "" if row[column] is None else str(row[column])
            try:
                loaded.setting(name)
            except AnswerError as error:
                raise AnswerError(f"{column!r}: {error.what}", where=where, mend=error.mend) from None
        yield _Question(text, ids, name)


def _answer(loaded: Loaded, questions: Sequence[_Question], asking: _Asking) -> None:
    """Answer questions and print the answers, each as it comes where it can be."""
    together = asking.strategy.own and not asking.route
    if asking.column is not None and not together:
        raise AnswerError("--column goes with the model's own logits, without --strategy and --route")
    each = [question for question in questions for _ in range(asking.n)]
    if together and (len(each) > 1 or asking.column is not None):
        said = _together(loaded, each, asking)
    elif asking.live:
        _one_by_one(loaded, each, asking)
        return
    else:
        said = _one_by_one(loaded, each, asking)
    if asking.rank_by is not None:
        said = _ranked(loaded, said, asking, asking.rank_by)
    if asking.as_json:
        print_json({"model": told(loaded), "answers": [_row(each) for each in said]})
    else:
        _show(said, asking.rank_by)


def _together(loaded: Loaded, questions: Sequence[_Question], asking: _Asking) -> list[_Said]:
    """Several in one pass: the answers come in their order, when all before are there."""
    settings = None if asking.column is None else [loaded.setting(question.who) for question in questions]
    answers = loaded.generate_all([question.ids for question in questions], asking.asked, settings)
    shown = tracked(answers, "Answering", len(questions), quiet=asking.quiet(len(questions)))
    return [_Said(question, answer) for question, answer in zip(questions, shown, strict=True)]


def _one_by_one(loaded: Loaded, questions: Sequence[_Question], asking: _Asking) -> list[_Said]:
    """One after another, each shown as it comes where the asking is live."""
    found: list[_Said] = []
    live = asking.live
    for question in tracked(questions, "Answering", len(questions), quiet=live or asking.quiet(len(questions))):
        if live and len(questions) > 1:
            typer.echo(f"{chr(10) if found else ''}> {one_line(question.text)}")
        asked = asking.asked.numbered(len(found))
        with loaded.counting(on=asking.route) as shares:
            answer = loaded.answering(question.ids, asked, asking.strategy).rest(show_piece if live else None)
        found.append(_Said(question, answer, shares if asking.route else None))
        if live:
            typer.echo("")
            if asking.route:
                show_shares(shares)
    return found


def _ranked(loaded: Loaded, said: Sequence[_Said], asking: _Asking, by: str) -> list[_Said]:
    """The same with scores, the best answer to each question first, of equals the one that was drawn first."""
    groups = [said[start : start + asking.n] for start in range(0, len(said), asking.n)]
    found: list[_Said] = []
    for group in tracked(groups, "Ranking", len(groups), quiet=asking.quiet(len(said))):
        question = group[0].question
        who = None if asking.column is None else question.who
        scores = loaded.scores(question.ids, [each.answer for each in group], by, who)
        order = sorted(range(len(group)), key=lambda place: -scores[place])
        found += [replace(group[place], score=scores[place]) for place in order]
    return found


def _show(said: Sequence[_Said], rank_by: str | None) -> None:
    for number, each in enumerate(said):
        who = f" [{harmless(each.question.who)}]" if each.question.who else ""
        score = f" ({rank_by} {each.score:.3f})" if each.score is not None else ""
        typer.echo(f"{chr(10) if number else ''}> {one_line(each.question.text)}{who}{score}")
        typer.echo(harmless(each.answer.text, lines=True))
        if each.routes is not None:
            show_shares(each.routes)


def _predict(
    loaded: Loaded, texts: list[Text], strategy: str, values: dict[str, Any], *, truncate: bool, route: bool,
    as_json: bool,
) -> None:  # fmt: skip
    from molehill.predictions import lines

    chosen = loaded.strategy(strategy, values, learning(as_json))
    found = loaded.predict(texts, strategy=chosen, truncate=truncate)
    routes = [loaded.route(text, truncate=truncate) for text in texts] if route else None
    if as_json:
        told_rows = [pairs.told(text) | each.as_json() for text, each in zip(texts, found, strict=True)]
        for row, shares in zip(told_rows, routes or (), strict=False):
            row["routes"] = shares
        print_json({"model": told(loaded), "predictions": told_rows})
        return
    for number, (text, line) in enumerate(zip(texts, lines(found), strict=True)):
        typer.echo(f"{line}  {one_line(pairs.shown(text))}")
        if routes is not None:
            show_shares(routes[number])


def _row(said: _Said) -> dict[str, Any]:
    question, answer = said.question, said.answer
    found = {"prompt": question.text, "answer": answer.text, "tokens": answer.tokens, "reason": answer.reason}
    more = {"expert": question.who or None, "routes": said.routes, "score": said.score}
    return found | {name: value for name, value in more.items() if value is not None}
