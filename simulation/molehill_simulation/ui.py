"""What the terminal shows: progress while a run goes on, and the table at its end.

On a terminal there is one bar per stage; elsewhere (a pipe, a log) one plain line per round and per stage that follows
the rounds. Whatever goes wrong is a line of its own on both.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from molehill_simulation.summary import STAGES, Event, Figures, Summary
from molehill_simulation.text import clean, duration, figure, megabytes

_NAMES = {"baseline": "Baselines", "train": "Rounds", "evaluate": "Evaluation"}


class RunView:
    """Observer of a run: call it with every event, inside ``with``.

    Args:
        console: Where to draw; bars only when it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rounds = 1
        self._done = 0
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]:>7}", style="bold"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            speed_estimate_period=600,
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
        match event["event"]:
            case "start" | "resume":
                self._start(event)
            case "progress":
                self._progress(event)
            case "round":
                self._round(event)
            case "retry":
                number = event["round"]
                self._line(f"round {number}: attempt {event['attempt'] + 1} is below its quorum", "yellow")
                self._lost(number, event)
            case "stage":
                self._stage(event)
            case "failed":
                name = _NAMES.get(event["stage"], clean(event["stage"], 10))
                self._line(f"{name}: no scores of {clean(event['client'], 40)}: {clean(event['reason'])}", "yellow")
            case "refused":
                self._line(f"refused {clean(event['client'] or 'a node', 40)}: {clean(event['reason'])}", "yellow")

    def _start(self, event: Event) -> None:
        self._rounds, self._done = event["rounds"], event.get("round", 0)
        clients = len(event["clients"])
        facts = f"{clients} clients, {self._rounds} rounds, {event['parameters']:,} trained parameters"
        again = f", on from round {self._done}" if event["event"] == "resume" else ""
        self._line(f"{clean(event['run'])}: {facts}{again}")

    def _progress(self, event: Event) -> None:
        stage, done, total = event["stage"], event["done"], event["total"]
        client = clean(event["client"], 40)
        if stage == "train":
            self._bar(stage, self._done + done / max(total, 1), self._rounds, f"{done}/{total} clients, {client}")
        else:
            self._bar(stage, done, total, client)

    def _round(self, event: Event) -> None:
        self._done = number = event["round"]
        traffic = f"up {megabytes(event['bytes_up'])}  down {megabytes(event['bytes_down'])}"
        spent = event.get("report", {}).get("epsilon")
        privacy = "" if spent is None else f"  epsilon {spent:.3g}"
        note = f"loss {event['loss']:.4f}  {traffic}{privacy}"
        self._bar("train", number, self._rounds, note)
        if not self._console.is_terminal:
            answered = f"{len(event['accepted'])} of {len(event['selected'])} clients"
            self._line(f"round {number}/{self._rounds}  {note}  {answered}  {duration(event['seconds'])}")
        self._lost(number, event)

    def _stage(self, event: Event) -> None:
        stage, total = event["stage"], event["total"]
        self._bar(stage, 0, total, "")
        if not self._console.is_terminal:
            self._line(f"{_NAMES.get(stage, clean(stage, 10))}: {total} clients")

    def _lost(self, number: int, event: Event) -> None:
        for client, reason in event["quarantined"].items():
            self._line(f"round {number}: quarantined {clean(client, 40)}: {clean(reason)}", "yellow")
        if event["missing"]:
            self._line(f"round {number}: no answer from {', '.join(clean(c, 40) for c in event['missing'])}", "yellow")

    def _bar(self, stage: str, done: float, total: int, note: str) -> None:
        if stage not in self._tasks:
            name = _NAMES.get(stage, clean(stage, 10))
            self._tasks[stage] = self._bars.add_task(name, total=total, count="", note="")
        count = f"{int(done)}/{total}"
        self._bars.update(self._tasks[stage], completed=done, total=total, count=count, note=note)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style=style), soft_wrap=True)


def results_table(summary: Summary) -> Table:
    """The figures of every client, with the best of each row marked, then mean and worst.

    Args:
        summary: A finished run.

    Returns:
        A table to print.
    """
    table = Table(title="Accuracy on each client's own held-out rows", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("client", overflow="fold")
    for name in ("train", "held out"):
        table.add_column(name, justify="right", style="dim")
    for stage in STAGES:
        table.add_column(stage, justify="right", no_wrap=True)
    for client in summary.clients:
        table.add_row(Text(clean(client.id, 40)), str(client.n_train), str(client.n_test), *_cells(client))
    table.add_section()
    table.add_row("mean", "", "", *_cells(summary.mean), style="bold")
    table.add_row("worst", "", "", *_cells(summary.worst))
    return table


def _cells(figures: Figures) -> list[Text]:
    best = figures.best
    return [Text(figure(v), style="bold green" if v is not None and v == best else "") for v in figures.row]


def show_summary(summary: Summary, console: Console) -> None:
    """Print the results of a finished run."""
    traffic = f"up {megabytes(summary.bytes_up)}, down {megabytes(summary.bytes_down)}"
    console.print(results_table(summary))
    complete, clients = len(summary.complete), len(summary.clients)
    if complete < clients:
        text = f"mean and worst are over the {complete} of {clients} clients that have all figures"
        console.print(Text(text, style="yellow"), soft_wrap=True)
    console.print(Text(f"{summary.rounds} rounds in {duration(summary.seconds)}; {traffic}"), soft_wrap=True)
