"""What a terminal shows of a run while it goes on, and at its end."""

from __future__ import annotations

import copy
import logging
import re
from io import StringIO

import pytest
from rich.console import Console
from told_runs import BASE, CLIENTS, TROUBLES, causal, make_events

from molehill.intervals import of_share
from molehill_simulation.pace import Pace, Work, in_words
from molehill_simulation.summary import summarise
from molehill_simulation.text import clean, duration
from molehill_simulation.ui import RunView, show_summary


def shown(events: list[dict], **options) -> str:
    console = Console(file=StringIO(), width=100, **options)
    with RunView(console) as view:
        for event in events:
            view(event)
    return console.file.getvalue()


def test_progress_without_a_terminal_is_one_line_per_round():
    lines = shown(make_events(CLIENTS), force_terminal=False).splitlines()
    assert lines[0] == "reviews: 8 clients, 6 rounds, 1,327,104 trained parameters"
    assert [line.split("  ")[0] for line in lines[1:] if line.startswith("round") and ":" not in line] == [
        f"round {number}/6" for number in range(1, 7)
    ]
    assert any(line.startswith("round 2: quarantined tweets-1: 1024 values") for line in lines)
    assert "round 4: no answer from tweets-1" in lines
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("terminal", [False, True])
def test_what_goes_wrong_is_shown_as_it_happens(terminal):
    options = {"force_terminal": terminal, "force_interactive": terminal}
    text = shown([make_events(CLIENTS)[0], *TROUBLES], color_system=None, **options)
    for line in (
        "refused a node: node 7: malformed hello",
        "round 2: attempt 1 is below its quorum",
        f"round 2: quarantined {CLIENTS[2]}: cut short",
        f"round 2: no answer from {CLIENTS[3]}",
        f"Evaluation: no scores of {CLIENTS[1]}: the loss is NaN",
    ):
        assert line in text


def test_stages_after_the_rounds_begin_with_a_line():
    begins = [{"event": "stage", "time": 0.0, "stage": stage, "total": 8} for stage in ("baseline", "evaluate")]
    events = [make_events(CLIENTS)[0], *begins]
    assert shown(events, force_terminal=False).splitlines()[1:] == ["Baselines: 8 clients", "Evaluation: 8 clients"]
    assert "0/8" in shown(events, force_terminal=True, force_interactive=True)


def test_progress_on_a_terminal_draws_bars():
    text = shown(make_events(CLIENTS), force_terminal=True, force_interactive=True)
    assert "Rounds" in text
    assert "6/6" in text


def test_final_table_is_aligned_and_marks_the_best():
    console = Console(file=StringIO(), record=True, width=100, force_terminal=True, color_system="standard")
    show_summary(summarise(make_events(CLIENTS), BASE, "cd"), console)
    rows = console.export_text(clear=False).splitlines()
    assert len({row.index(" .") for row in rows if row.strip().startswith(("amazon", "tweets", "mean", "worst"))}) == 1
    assert rows[-1] == "6 rounds in 2 min 41 s; up 37.37 MB, down 127.41 MB"
    assert "\x1b[1;32m" in console.export_text(styles=True)


def shown_at_the_end(summary, width: int) -> list[str]:
    console = Console(file=StringIO(), width=width)
    show_summary(summary, console)
    return console.file.getvalue().splitlines()


def with_intervals(events: list[dict], n: int = 80) -> list[dict]:
    """The same run, whose clients told what their figures are in."""
    events = copy.deepcopy(events)
    for scores in (scores for event in events for scores in event.get("stages", {}).values()):
        loss = scores["loss"]
        known = [name for name in ("accuracy", "macro_f1") if scores[name] is not None]
        scores.update({f"{name}_interval": of_share(scores[name], n) for name in known})
        scores["loss_interval"] = [loss - 0.1, loss + 0.1]
    return events


def test_every_figure_has_its_interval_below_in_eighty_columns():
    """The second line of a row has those of the first: of shares in percent, of perplexities two digits."""
    summary = summarise(with_intervals(make_events(CLIENTS)), BASE, "cd")
    lines = shown_at_the_end(summary, 80)
    assert max(map(len, lines[:-2])) <= 80
    first = summary.clients[0]
    for row, name in ((first, first.id), (summary.mean, "mean"), (summary.worst, "worst")):
        at = next(number for number, line in enumerate(lines) if line.split()[:1] == [name])
        f1 = first.macro_f1 if row is first else getattr(summary.macro_f1, name)
        ends = [ends for pair in zip(row.intervals, f1.intervals, strict=True) for ends in pair]
        assert lines[at + 1].split() == [f"{100 * low:.0f}-{100 * high:.0f}" for low, high in ends]
    writer = summarise(with_intervals(causal(make_events(CLIENTS))), BASE, "cd", "causal-lm")
    lines = shown_at_the_end(writer, 80)
    at = next(number for number, line in enumerate(lines) if line.split()[:1] == [CLIENTS[0]])
    low, high = writer.clients[0].perplexity.interval["base"]
    assert lines[at + 1].split()[1] == f"{low:.2g}-{high:.2g}"
    low, high = writer.loss.mean.interval["personalised"]
    losses = next(line for line in lines if line.startswith("mean loss"))
    assert losses.endswith(f"personalised {writer.loss.mean.personalised:.3f} ({low:.3f} to {high:.3f})")
    assert max(map(len, lines[: lines.index(losses) - 1])) <= 80


def test_intervals_below_zero_stand_below_each_other_so_that_names_keep_their_room():
    figures = {"rmse": {"value": 1.5, "interval": [0.7, 12.0]}, "pearson": {"value": -0.25, "interval": [-0.7, 0.6]}}
    events = [
        {**event, "stages": {stage: {"n": 9, "loss": 1.0, "figures": figures} for stage in event["stages"]}}
        if "stages" in event
        else event
        for event in make_events(CLIENTS)
    ]
    lines = shown_at_the_end(summarise(events, BASE, "cd", "regression"), 80)
    at = next(number for number, line in enumerate(lines) if line.split()[:1] == [CLIENTS[0]])
    assert lines[at].split()[2:4] == ["1.50", "-.250"]
    assert (lines[at + 1].split(), lines[at + 2].split()) == (["0.7-12"] * 4, ["-70..60"] * 4)


def test_of_many_clients_mean_and_worst_alone_have_intervals_and_that_is_said():
    lines = shown_at_the_end(summarise(with_intervals(make_events([f"c{i}" for i in range(60)])), BASE, "cd"), 80)
    assert len([line for line in lines if re.fullmatch(r"( +\d+-\d+)+ *", line)]) == 2
    assert "those of clients in report.html and summary.json" in " ".join(lines)
    told = " ".join(shown_at_the_end(summarise(make_events(CLIENTS), BASE, "cd"), 80))
    assert "intervals" not in told  # clients of an older version did not tell


def test_where_the_console_is_quiet_people_are_told_in_the_log(caplog):
    """With --json standard output is for a program, and who waits for a coordinator must not think that it hangs."""
    caplog.set_level(logging.INFO)
    away = {"event": "away", "reason": "no coordinator is up", "state": "here", "patience": 300.0}
    assert shown([make_events(CLIENTS)[0], away, {"event": "back"}, *TROUBLES], quiet=True) == ""
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert ("WARNING", "no coordinator is up: waiting up to 5 min 00 s for it (molehill server up)") in said
    assert ("INFO", "the coordinator is back") in said
    assert ("WARNING", f"round 2: no answer from {CLIENTS[3]}") in said


def test_clients_at_work_move_the_bar_before_they_answer():
    start = make_events(CLIENTS)[0]
    stage = {"event": "stage", "time": 0.0, "stage": "baseline", "total": 8}
    options = {"force_terminal": True, "force_interactive": True}
    console = Console(file=StringIO(), width=100, **options)
    with RunView(console) as view:
        view(start)
        view(stage)
        for part in (0.25, 0.75):
            view({"event": "working", "parts": dict.fromkeys(CLIENTS[:4], part)})
        assert view._bars.tasks[0].completed == 3.0
        view({"event": "progress", "time": 0.0, "stage": "baseline", "done": 1, "total": 8, "client": CLIENTS[0]})
        assert view._bars.tasks[0].completed == 1 + 3 * 0.75
        view({"event": "working", "parts": {CLIENTS[0]: 1.0}})  # late: it was counted
        assert view._bars.tasks[0].completed == 1 + 3 * 0.75
    assert "1/8" in console.file.getvalue()


def test_the_time_left_counts_all_stages():
    clock = iter((0.0, 0.0, 4.0, 10.0, 60.0, 61.0))
    pace = Pace(Work(rounds=2, train=10.0, baseline=20.0, evaluate=5.0), lambda: next(clock))
    pace.start(4, 0)
    pace.at("train", 0.5)
    assert pace.left is None  # after 4 s nothing is sure
    assert pace.left == pytest.approx(10.0 / 20 * (4 * 45 - 20))
    pace.at("train", 2.0)
    end_of_rounds = pace.left
    pace.at("baseline", 0.0)
    assert pace.left == pytest.approx(end_of_rounds, rel=0.02)  # no jump where a stage begins
    assert [in_words(s) for s in (None, 1, 52, 142, 6000)] == ["", "5 s left", "55 s left", "2 min left", "1.7 h left"]


def test_text_for_people():
    assert clean("a\x1b[2Jb\nc") == "a [2Jb c"
    assert clean("x" * 20, 5) == "xxxx…"
    assert [duration(s) for s in (0.4, 41, 185, 7265)] == ["0.4 s", "41 s", "3 min 05 s", "2 h 01 min"]


def test_a_resumed_run_counts_on_from_its_last_round():
    start, *rest = make_events(CLIENTS)
    again = {**start, "event": "resume", "round": 3}
    later = [event for event in rest if event["event"] == "round" and event["round"] > 3]
    for options in ({"force_terminal": False}, {"force_terminal": True, "force_interactive": True}):
        text = shown([again, rest[0], *later], **options)
        assert "on from round 3" in text
        assert "/6" in text
        assert "/1" not in text
    lines = shown([again, rest[0], *later], force_terminal=False).splitlines()
    assert [line.split("  ")[0] for line in lines[1:] if ":" not in line] == ["round 4/6", "round 5/6", "round 6/6"]


def test_one_is_not_many():
    text = shown(make_events(["a"], rounds=1), force_terminal=False)
    assert "reviews: 1 client, 1 round, " in text
    console = Console(file=StringIO(), width=100)
    show_summary(summarise(make_events(["a"], rounds=1), BASE, "cd"), console)
    assert "1 round in " in console.file.getvalue()
