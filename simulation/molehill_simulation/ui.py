"""What the terminal shows: progress while a run goes on, and the table at its end.

On a terminal there is one bar per stage; elsewhere (a pipe, a log) one plain line per round and per stage that follows
the rounds. Whatever goes wrong is a line of its own on both, and a warning of the log where the console is quiet.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from molehill.tasks.measures import Measure
from molehill.words import counted, figure, short_figure
from molehill_simulation.figures import STAGES, ClientFigures, Figures, Gain
from molehill_simulation.pace import Pace, Work, in_words
from molehill_simulation.summary import Event, Summary
from molehill_simulation.text import by_name, clean, duration, megabytes, natural

_log = logging.getLogger(__name__)

_BEST = "bold green"
_LOST = "bold red"
_CLASSES = 8  # that the terminal names
_WITHIN = 40  # clients whose intervals the terminal shows
_NAMES = {"baseline": "Baselines", "train": "Rounds", "evaluate": "Evaluation"}


class RunView:
    """Observer of a run: call it with every event, inside ``with``.

    Args:
        console: Where to draw; bars only when it is a terminal.
        work: What is to be done, for the time that is left; None to tell none.
    """

    def __init__(self, console: Console, work: Work | None = None) -> None:
        self._console = console
        self._pace = None if work is None else Pace(work)
        self._lock = threading.RLock()  # worker processes report from threads of their own
        self._rounds = 1
        self._done = 0
        self._stage_now, self._answered, self._total = "train", 0, 1
        self._waiting: dict[str, float] = {}  # part of their work that clients have done who have not answered
        self._counted: set[str] = set()  # who has answered in this stage
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>7}", style="bold"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing; the last state of the bars stays."""
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        match event["event"]:
            case "rows":
                self._rows(event)
            case "start" | "resume":
                self._start(event)
            case "remark":
                self._line(f"warning: {clean(event['text'], 1000)}", "yellow")
            case "progress":
                self._progress(event)
            case "working":
                self._working(event["parts"])
            case "round":
                self._round(event)
            case "retry":
                number = event["round"]
                self._next("train", self._total)
                self._line(f"round {number}: attempt {event['attempt'] + 1} is below its quorum", "yellow")
                self._lost(number, event)
            case "stage":
                self._stage(event)
            case _:
                self._told(event)

    def _told(self, event: Event) -> None:
        """What goes wrong with a client, beside the rounds."""
        client = clean(event.get("client") or "a node", 40)
        match event["event"]:
            case "failed":
                name = _NAMES.get(event["stage"], clean(event["stage"], 10))
                self._line(f"{name}: no scores of {client}: {clean(event['reason'])}", "yellow")
            case "capped":
                counts = f"{event['counts']:,} of its {event['rows']:,} rows"
                self._line(f"{client} counts for {counts}: {clean(event['reason'])}", "yellow")
            case "away":
                patience = duration(event["patience"])
                self._line(f"{clean(event['reason'])}: waiting up to {patience} for it (molehill server up)", "yellow")
            case "back":
                self._line("the coordinator is back")
            case "anew":
                self._line(f"{client}: its personal state is gone, it started anew", "yellow")
            case "refused":
                self._line(f"refused {client}: {clean(event['reason'])}", "yellow")

    def _rows(self, event: Event) -> None:
        if event["classes"]:
            classes = ", ".join(f"{clean(name, 40)} {count}" for name, count in event["classes"].items())
            self._line(f"classes: {classes}")
        for name, owner in by_name(event["names"]):
            self._line(f"{clean(name, 60)} is {clean(owner, 60)!r}")
        self._line(f"tokens of a row: {event['lengths']}")
        if event["cut"]:
            self._line(event["cut"], "yellow")
        if event["enough"]:
            self._line(event["enough"], "yellow")

    def _start(self, event: Event) -> None:
        self._rounds, self._done = event["rounds"], event.get("round", 0)
        clients = len(event["clients"])
        if self._pace is not None:
            self._pace.start(clients, self._done)
        self._next("train", clients)
        parameters = f"{event['parameters']:,} trained parameters"
        facts = f"{counted(clients, 'client')}, {counted(self._rounds, 'round')}, {parameters}"
        again = f", on from round {self._done}" if event["event"] == "resume" else ""
        self._line(f"{clean(event['run'])}: {facts}{again}")

    def _progress(self, event: Event) -> None:
        client = event["client"]
        self._stage_now, self._answered, self._total = event["stage"], event["done"], event["total"]
        self._counted.add(client)
        self._waiting.pop(client, None)
        self._draw(clean(client, 40))

    def _working(self, parts: Mapping[str, float]) -> None:
        self._waiting |= {client: part for client, part in parts.items() if client not in self._counted}
        self._draw(", ".join(clean(client, 20) for client in self._waiting if client in parts))

    def _next(self, stage: str, total: int) -> None:
        """A stage begins, or another round."""
        self._stage_now, self._answered, self._total = stage, 0, total
        self._waiting.clear()
        self._counted.clear()

    def _draw(self, who: str) -> None:
        """Draw how far the stage is, clients that are at work included."""
        answered, total = self._answered, max(self._total, 1)
        done = min(answered + sum(self._waiting.values()), total)
        if self._stage_now == "train":
            self._bar("train", self._done + done / total, self._rounds, f"{answered}/{total} clients, {who}", answered)
        else:
            self._bar(self._stage_now, done, total, who, answered)

    def _round(self, event: Event) -> None:
        self._done = number = event["round"]
        traffic = f"up {megabytes(event['bytes_up'])}  down {megabytes(event['bytes_down'])}"
        spent = event.get("report", {}).get("epsilon")
        privacy = "" if spent is None else f"  epsilon {spent:.3g}"
        loss = "nobody trained" if event["loss"] is None else f"loss {event['loss']:.4f}"
        note = f"{loss}  {traffic}{privacy}"
        self._next("train", self._total)
        self._bar("train", number, self._rounds, note)
        if not self._console.is_terminal:
            answered = f"{len(event['accepted'])} of {len(event['selected'])} clients"
            self._line(f"round {number}/{self._rounds}  {note}  {answered}  {duration(event['seconds'])}")
        self._lost(number, event)

    def _stage(self, event: Event) -> None:
        stage, total = event["stage"], event["total"]
        self._next(stage, total)
        self._bar(stage, 0, total, "")
        if not self._console.is_terminal:
            self._line(f"{_NAMES.get(stage, clean(stage, 10))}: {counted(total, 'client')}")

    def _lost(self, number: int, event: Event) -> None:
        for client, reason in by_name(event["quarantined"]):
            self._line(f"round {number}: quarantined {clean(client, 40)}: {clean(reason)}", "yellow")
        for client, reason in by_name(event.get("unusable", {})):
            self._line(
                f"round {number}: the model could not be trained by {clean(client, 40)}: {clean(reason)}", "yellow"
            )
        if missing := sorted(event["missing"], key=natural):
            self._line(f"round {number}: no answer from {', '.join(clean(c, 40) for c in missing)}", "yellow")

    def _bar(self, stage: str, done: float, total: int, note: str, answered: int | None = None) -> None:
        if stage not in self._tasks:
            for task in self._tasks.values():  # the time that is left is that of the whole run, and told once
                self._bars.update(task, left="")
            name = _NAMES.get(stage, clean(stage, 10))
            self._tasks[stage] = self._bars.add_task(name, total=total, count="", note="", left="")
        if self._pace is not None:
            self._pace.at(stage, done)
        left = in_words(None if self._pace is None else self._pace.left)
        count = f"{int(done) if stage == 'train' or answered is None else answered}/{total}"
        self._bars.update(self._tasks[stage], completed=done, total=total, count=count, note=note, left=left)

    def _line(self, text: str, style: str = "") -> None:
        if self._console.quiet:  # a program reads standard output: people are told beside it, through the log
            _log.log(logging.WARNING if style else logging.INFO, "%s", text)
        else:
            self._console.print(Text(text, style=style), soft_wrap=True)


def results_table(summary: Summary) -> Table:
    """The figures of every client, with the best of each row marked, then mean and worst; below each its interval.

    Of a classification macro-F1 stands beside every accuracy: a model that gives up a rare class gains in one and
    loses in the other. Of a causal LM it is the perplexity.

    Args:
        summary: A finished run.

    Returns:
        A table to print.
    """
    shown = summary.columns[:2]
    title = f"{' and '.join(measure.title for measure in shown)} on each client's own {summary.scored} rows"
    table = Table(title=f"{title[0].upper()}{title[1:]}", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("client", overflow="fold")
    table.add_column("rows", justify="right", style="dim", no_wrap=True)
    for stage in STAGES:
        table.add_column(stage, justify="right", no_wrap=True)
    # Of a measure that may be negative they are too long for one line.
    between = "\n" if _signed(row for client in summary.shown for row in summary.cells(client)) else " "
    for client in summary.shown:
        cells = _cells(shown, summary.cells(client), between if _within(summary) else None)
        table.add_row(Text(clean(client.id, 40)), _rows(client), *cells)
    table.add_section()
    table.add_row("mean", "", *_cells(shown, summary.means, between), style="bold")
    table.add_row("worst", "", *_cells(shown, summary.worsts, between))
    return table


def _rows(client: ClientFigures) -> str:
    """Its numbers of rows, of those set aside only where it did."""
    return "+".join(str(n) for n in (client.n_train, *([client.aside] if client.aside else []), client.n_test))


def gains_table(summary: Summary) -> Table:
    """The gain of every client over training alone, then mean and worst; marked where it is more than its interval.

    Args:
        summary: A finished run with baselines.

    Returns:
        A table to print.
    """
    title = "Gain over alone: personalised over local on the same held-out rows"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
    table.add_column("client", overflow="fold")
    for measure in summary.gained:
        table.add_column(measure.title, justify="right")
    for client in summary.shown if _within(summary) else ():
        if client.gains:
            table.add_row(Text(clean(client.id, 40)), *_gains(summary.gained, client.gains))
    table.add_section()
    over = summary.gains
    table.add_row("mean", *_gains(summary.gained, {name: each.mean for name, each in over.items()}))
    table.add_row("worst", *_gains(summary.gained, {name: each.worst for name, each in over.items()}))
    return table


def _gains(measures: Sequence[Measure], gains: Mapping[str, Gain]) -> list[Text]:
    cells = []
    for measure in measures:
        gain = gains.get(measure.name)
        cells.append(Text("-") if gain is None else Text(gain.told(measure), {1: _BEST, -1: _LOST}.get(gain.sign, "")))
    return cells


def _signed(rows: Iterable[Figures]) -> bool:
    """Whether there is an interval that begins below 0."""
    return any(ends is not None and ends[0] < 0 for row in rows for ends in row.intervals)


def _within(summary: Summary) -> bool:
    """Whether the table has room for the intervals of each client."""
    return len(summary.shown) <= _WITHIN


def _cells(measures: Sequence[Measure], figures: Sequence[Figures], between: str | None) -> list[Text]:
    """Of each stage the first measure, and beside it the second if there is one, all short, to fit 80 columns.

    Args:
        measures: One or two.
        figures: Of each.
        between: What stands between their intervals, which are below; None to have none.
    """
    cells = []
    for at, _ in enumerate(STAGES):
        cell, ends = Text(), []
        for number, (measure, row) in enumerate(zip(measures, figures, strict=False)):
            value, best = row.row[at], row.best(measure)
            style = _BEST if value == best is not None else "dim" if number else ""
            cell.append(" " if number else "").append(_short(value, measure, alone=len(measures) == 1), style)
            if (interval := row.intervals[at]) is not None:
                ends.append(_ends(measure, *interval))
        if between is not None and ends:
            cell.append(f"\n{between.join(ends)}", "not bold dim")
        cells.append(cell)
    return cells


def _ends(measure: Measure, low: float, high: float) -> str:
    """An interval in few characters: shares in percent, others with two digits or more."""
    if measure.write is figure:
        ends = [f"{100 * end:.0f}" for end in (low, high)]
    else:
        ends = [f"{end:.0f}" if 10 <= abs(end) < 1e4 else f"{end:.2g}" for end in (low, high)]
    return ("-" if low >= 0 else "..").join(ends)


def _by_class(summary: Summary) -> str:
    """Recall of the classes, or F1 of entities, by the personalised models, in a line; empty where it is not known."""
    known = [(label, each) for label, each in summary.by_class.items() if each.personalised is not None]
    told = [
        f"{clean(label, 40)} {each.told('personalised', summary.measure)} of {each.n}"
        for label, each in known[:_CLASSES]
    ]
    more = [f"and {len(known) - _CLASSES} more"] if len(known) > _CLASSES else []
    what = "F1 of entities" if summary.type_f1 else "recall"
    return f"{what} of the personalised models: {', '.join([*told, *more])}" if told else ""


def _short(value: float | None, measure: Measure, *, alone: bool) -> str:
    return short_figure(value) if measure.write is figure and not alone else measure.write(value)


def show_summary(summary: Summary, console: Console) -> None:
    """Print the results of a finished run."""
    traffic = f"up {megabytes(summary.bytes_up)}, down {megabytes(summary.bytes_down)}"
    console.print(results_table(summary))
    aside = " + set aside from the rounds" if any(client.aside for client in summary.clients) else ""
    notes = f"rows: to train on{aside} + {'held out' if summary.split == 'test' else summary.split}"
    if summary.mean.interval:
        notes += "; below figures their 95% intervals, in hundredths of such as .712"
        notes += "" if _within(summary) else ", those of clients in report.html and summary.json"
    console.print(Text(notes, style="dim"), soft_wrap=True)
    if summary.gained:
        console.print()
        console.print(gains_table(summary))
        counts = "; ".join(f"{each.title}: {summary.gains[each.name].counted}" for each in summary.gained)
        console.print(Text(f"{counts} (in brackets: 95%)", style="dim"), soft_wrap=True)
    if summary.perplexity is not None and summary.told_losses:
        console.print(Text(f"mean loss per answer token in nats: {summary.told_losses}", style="dim"), soft_wrap=True)
    if summary.of_answers:
        means = [(each, getattr(summary, each.name).mean) for each in summary.of_answers]
        told = ", ".join(f"{each.title} {mean.told('personalised', each)}" for each, mean in means)
        rows = counted(sum(client.answered for client in summary.clients), f"{summary.scored} row")
        console.print(Text(f"mean of personalised answers to {rows}: {told}", style="dim"), soft_wrap=True)
    if summary.told_chosen:
        console.print(Text(summary.told_chosen, style="dim"), soft_wrap=True)
    if told := _by_class(summary):
        console.print(Text(told, style="dim"), soft_wrap=True)
    if summary.told_shown:
        console.print(Text(summary.told_shown, style="dim"), soft_wrap=True)
    if summary.told_cut:
        console.print(Text(summary.told_cut, style="yellow"), soft_wrap=True)
    for caveat in summary.caveats:
        console.print(Text(caveat, style="yellow"), soft_wrap=True)
    console.print(Text(f"{counted(summary.rounds, 'round')} in {duration(summary.seconds)}; {traffic}"), soft_wrap=True)
