"""The report and the summary of a run, from a run folder as the engine leaves it."""

from __future__ import annotations

import json
import logging
import math
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from random import Random

import pytest
from rich.console import Console

from molehill.config import Config, parse
from molehill.errors import DataError, ResumeError
from molehill_server import events as events_file
from molehill_simulation.charts import line_plot
from molehill_simulation.pace import Pace, Work, in_words
from molehill_simulation.report import write_report
from molehill_simulation.summary import BaseModelInfo, read_summary, summarise
from molehill_simulation.text import clean, duration
from molehill_simulation.ui import RunView, show_summary

HOSTILE = "<script>alert(1)</script>\x1b[31m&\"'"
BASE = BaseModelInfo(id="sample:minilm", revision=None, digest="3f" * 32)


def make_events(clients: list[str], rounds: int = 6, seed: int = 0) -> list[dict]:
    """Events of a plausible run; the last client is refused once and missing once."""
    rng = Random(seed)
    events: list[dict] = [
        {
            "event": "start",
            "time": 0.0,
            "run": "reviews",
            "rounds": rounds,
            "clients": clients,
            "parameters": 1_327_104,
            "config_digest": "ab" * 32,
        }
    ]
    for number in range(1, rounds + 1):
        out = clients[-1] if len(clients) > 1 else None
        quarantined = {out: f"1024 values of site 3 are NaN {HOSTILE}"} if out and number == 2 else {}
        missing = [out] if out and number == 4 else []
        accepted = [client for client in clients if client not in quarantined and client not in missing]
        loss = {client: 1.1 * math.exp(-0.25 * number) + rng.uniform(0.0, 0.25) for client in accepted}
        events += [
            {"event": "progress", "time": 0.0, "stage": "train", "done": i + 1, "total": len(clients), "client": client}
            for i, client in enumerate(accepted)
        ]
        events.append(
            {
                "event": "round",
                "time": 0.0,
                "round": number,
                "seconds": 11.5 + rng.random(),
                "selected": clients,
                "accepted": accepted,
                "missing": missing,
                "quarantined": quarantined,
                "loss": sum(loss.values()) / len(loss),
                "loss_by_client": loss,
                "bytes_up": 812_345 * len(accepted),
                "bytes_down": 2_654_321 * len(clients),
                "tokens": {client: {"e0": 100.0, "e1": 20.0} for client in accepted},
                "report": {},
            }
        )
    for client in clients:
        base = rng.uniform(0.5, 0.62)
        figures = {
            "base": base,
            "local": base + 0.06,
            "global": base + 0.1,
            "personalised": base + rng.uniform(0.09, 0.2),
        }
        scores = {stage: {"n": 80, "accuracy": v, "macro_f1": v - 0.03, "loss": 1 - v} for stage, v in figures.items()}
        weights = [rng.expovariate(1.0) for _ in range(4)]
        routed = {f"e{i}": 1e4 * weight for i, weight in enumerate(weights)}
        common = {"event": "evaluation", "time": 0.0, "client": client, "n_train": 200, "n_test": 80}
        events.append({**common, "stages": {k: scores[k] for k in ("base", "local")}, "tokens": {}})
        trained = {k: scores[k] for k in ("global", "personalised")}
        events.append({**common, "stages": trained, "tokens": {**routed, "shared0": 2e4}})
    events.append({"event": "end", "time": 0.0, "seconds": 161.2})
    return events


def make_run(folder: Path, events: list[dict], *, finished: bool = True) -> Path:
    """A run folder as the engine leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    (folder / "config.toml").write_text(Config().to_toml(), encoding="utf-8")
    if finished:
        (folder / "summary.json").write_text(summarise(events, BASE, "ab" * 32).to_json(), encoding="utf-8")
    return folder


CLIENTS = [f"{domain}-{i}" for domain in ("amazon", "movie", "nyt", "tweets") for i in (0, 1)]


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_summary_has_the_promised_shape_and_figures():
    events = make_events(CLIENTS)
    summary = json.loads(summarise(events, BASE, "cd").to_json())
    assert set(summary) == {
        "task", "clients", "mean", "worst", "macro_f1", "classes", "lengths", "probes", "rounds", "seconds", "bytes_up",
        "bytes_down", "base_model", "config_digest", "unscored", "anew",
    }  # fmt: skip
    assert set(summary["clients"][0]) == {
        "id", "n_train", "n_test", "cut", "lost", "unlearnt", "base", "local", "global", "personalised", "macro_f1",
    }  # fmt: skip
    assert summary["rounds"] == 6
    assert summary["seconds"] == 161.2
    assert summary["base_model"] == {"id": "sample:minilm", "revision": None, "digest": "3f" * 32, "remarks": []}
    assert summary["bytes_up"] == sum(event["bytes_up"] for event in events if event["event"] == "round")
    for stage in ("base", "local", "global", "personalised"):
        values = [client[stage] for client in summary["clients"]]
        assert summary["mean"][stage] == pytest.approx(sum(values) / len(values))
        assert summary["worst"][stage] == min(values)


def test_summary_counts_a_repeated_round_once_and_allows_missing_stages():
    events = [event for event in make_events(CLIENTS) if "base" not in event.get("stages", {})]
    again = next(event for event in events if event["event"] == "round")
    summary = summarise([*events, again], BASE, "cd")
    assert summary.rounds == 6
    assert summary.mean.base is None
    assert summary.clients[0].personalised is not None
    assert summarise([], BASE, "cd").mean.personalised is None


def without_scores(events: list[dict], *clients: str) -> list[dict]:
    """The same run, in which clients could not be scored with the final model."""
    return [
        {**event, "stages": {k: v for k, v in event["stages"].items() if k in ("base", "local")}}
        if event.get("client") in clients and "stages" in event
        else event
        for event in events
    ]


def test_mean_and_worst_are_over_clients_that_have_every_figure():
    whole = summarise(make_events(CLIENTS), BASE, "cd")
    part = summarise(without_scores(make_events(CLIENTS), *CLIENTS[:2]), BASE, "cd")
    assert len(part.clients) == 8
    assert [client.id for client in part.complete] == CLIENTS[2:]
    for stage in ("base", "personalised"):
        values = [getattr(client, stage) for client in whole.clients[2:]]
        assert getattr(part.mean, stage) == pytest.approx(sum(values) / 6)
        assert getattr(part.worst, stage) == min(values)
    assert whole.complete == whole.clients
    console = Console(file=StringIO(), width=100)
    show_summary(part, console)
    text = " ".join(console.file.getvalue().split())
    assert f"mean and worst are over the 6 of 8 clients that have all figures; {CLIENTS[0]}: " in text
    none = summarise([{**e, "stages": {}} for e in make_events(CLIENTS) if e["event"] == "evaluation"], BASE, "cd")
    assert (len(none.clients), none.complete, none.mean.base) == (8, (), None)


def test_summary_reads_back(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS))
    assert read_summary(folder / "summary.json") == summarise(make_events(CLIENTS), BASE, "ab" * 32)
    (folder / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="not the summary"):
        read_summary(folder / "summary.json")
    with pytest.raises(DataError, match="No such file"):
        read_summary(folder / "absent.json")


def test_events_cut_off_by_a_kill_are_read_up_to_the_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "start"}\n{"event": "rou')
    assert events_file.read(path) == [{"event": "start"}]
    path.write_text('{"event": "start"}\nnonsense\n{"event": "end"}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl:2"):
        events_file.read(path)


def test_report_is_self_contained_and_accessible(tmp_path):
    page = Page(write_report(make_run(tmp_path, make_events(CLIENTS))).read_text(encoding="utf-8"))
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    assert not any(key in ("src", "href") for _, attributes in page.tags for key in attributes)
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert names.count("svg") == 2
    for text in (*CLIENTS, "sample:minilm", "Where tokens went", "shared0", "Refused updates", "Missing answers"):
        assert text in page.text


def test_report_escapes_what_clients_send(tmp_path):
    clients = [*CLIENTS[:2], HOSTILE]
    text = write_report(make_run(tmp_path, make_events(clients))).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;alert(1)" in text


TROUBLES = [
    {"event": "refused", "time": 0.0, "client": "", "reason": f"node 7: malformed hello {HOSTILE}"},
    {
        "event": "retry",
        "time": 0.0,
        "round": 2,
        "attempt": 0,
        "missing": [CLIENTS[3]],
        "quarantined": {CLIENTS[2]: f"cut short {HOSTILE}"},
    },
    {"event": "failed", "time": 0.0, "stage": "evaluate", "client": CLIENTS[1], "reason": f"the loss is NaN {HOSTILE}"},
]


def test_report_tells_all_that_went_wrong(tmp_path):
    events = [*without_scores(make_events(CLIENTS), CLIENTS[1]), *TROUBLES]
    text = write_report(make_run(tmp_path, events)).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    seen = " ".join(Page(text).text.split())
    assert "Refused nodes node 7: malformed hello" in seen
    assert f"2, attempt 1{CLIENTS[2]}cut short" in seen
    assert f"Round 2, attempt 1: {CLIENTS[3]}; Round 4: tweets-1." in seen
    assert f"These clients could not be scored. stageclientreason evaluate{CLIENTS[1]}the loss is NaN" in seen
    assert f"mean and worst are over the 7 of 8 clients that have all figures; {CLIENTS[1]}: the loss is NaN" in seen


def test_who_is_not_in_the_mean_and_who_lost_its_state_is_said_everywhere(tmp_path):
    """Of eight clients one was not connected at the end, and one had lost what it kept."""
    gone, anew = CLIENTS[0], CLIENTS[1]
    events = [e for e in make_events(CLIENTS) if not (e["event"] == "evaluation" and e["client"] == gone)]
    events.append({"event": "failed", "time": 0.0, "stage": "evaluate", "client": gone, "reason": "it is away"})
    events.append({"event": "anew", "time": 0.0, "client": anew, "round": 6, "kept": 0, "accepted": 5})
    summary = summarise(events, BASE, "cd")
    assert (summary.unscored, summary.anew) == ({gone: "it is away"}, (anew,))
    console = Console(file=StringIO(), width=400)
    show_summary(summary, console)
    page = " ".join(Page(write_report(make_run(tmp_path, events)).read_text(encoding="utf-8")).text.split())
    for said in (
        f"over the 7 of 8 clients that have all figures; {gone}: it is away",
        f"state was lost and begun anew, so the figures are not what they would be: {anew}",
    ):
        assert said in console.file.getvalue()
        assert said in page


@pytest.mark.parametrize(("clients", "rounds"), [(1, 1), (40, 30)])
def test_report_of_few_and_many_clients(tmp_path, clients, rounds):
    events = make_events([f"c{i:02d}" for i in range(clients)], rounds)
    text = write_report(make_run(tmp_path, events)).read_text(encoding="utf-8")
    assert "c00" in text
    assert ("one line per client" in text) == (clients == 40)


def test_report_of_an_unfinished_run(tmp_path):
    events = make_events(CLIENTS)[:20]
    text = write_report(make_run(tmp_path, events, finished=False)).read_text(encoding="utf-8")
    assert "not finished" in text
    assert "its training rows" in text
    empty = write_report(make_run(tmp_path / "empty", events[:1], finished=False)).read_text(encoding="utf-8")
    assert "Training loss" not in empty


def test_report_of_another_folder_is_refused(tmp_path):
    with pytest.raises(ResumeError, match="not a run folder"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", [b"a = = 1", b"\xff", b"molora = 3"], ids=str)
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, text):
    folder = make_run(tmp_path, make_events(CLIENTS))
    (folder / "config.toml").write_bytes(text)
    with pytest.raises(DataError, match="configuration"):
        write_report(folder)


@pytest.mark.parametrize("text", ["[" * 10_000, "{", "[]", b"\xff"], ids=["deep", "cut", "list", "bytes"])
def test_a_table_of_owners_that_cannot_be_read_is_named(tmp_path, text):
    folder = make_run(tmp_path, make_events(CLIENTS))
    (folder / "owners.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=r"owners\.json"):
        write_report(folder)


@pytest.mark.parametrize("field", ["seconds", "bytes_up", "loss_by_client", "quarantined"])
def test_an_event_without_its_fields_is_no_traceback(tmp_path, field):
    events = [{k: v for k, v in event.items() if k != field} for event in make_events(CLIENTS)]
    folder = make_run(tmp_path, events, finished=False)
    with pytest.raises(DataError, match=f"KeyError\\('{field}'\\)"):
        write_report(folder)
    events[1:] = [{**event, field: 3.5} for event in make_events(CLIENTS)[1:]]
    if field in ("loss_by_client", "quarantined"):
        with pytest.raises(DataError, match="not as Molehill writes it"):
            write_report(make_run(tmp_path, events, finished=False))


def test_curves_leave_out_what_is_not_finite():
    plot = line_plot([1, 2, 3], {"a": {1: 1.0, 2: math.nan, 3: 0.5}}, {"a": "line-0"})
    assert plot is not None
    assert [point[0] for point in plot.lines[0].points] == [0.0, 100.0]
    assert line_plot([1], {"a": {1: math.inf}}, {"a": "line-0"}) is None
    flat = line_plot([1, 2], {"a": {1: 0.0, 2: 0.0}}, {"a": "line-0"})
    assert flat is not None
    assert all(0 <= y <= 100 for _, y in flat.lines[0].points)


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


def test_class_counts_stand_in_the_report(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS[:2]), finished=False)
    classes = {CLIENTS[0]: {"good": (7, 2), "<b>bad": (3, 1)}, CLIENTS[1]: {"good": (10, 0), "<b>bad": (0, 4)}}
    summary = summarise(make_events(CLIENTS[:2]), BASE, "ab" * 32, classes=classes)
    (folder / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    assert read_summary(folder / "summary.json") == summary
    text = write_report(folder).read_text(encoding="utf-8")
    seen = " ".join(Page(text).text.split())
    assert (
        f"Rows of every class: to train on + held out. clientgood<b>bad {CLIENTS[0]}7+23+1 {CLIENTS[1]}10+00+4" in seen
    )
    assert "<b>bad" not in text


def causal(events: list[dict]) -> list[dict]:
    """The same run of a causal LM, which has no classes."""
    return [
        {**event, "stages": {k: {**v, "macro_f1": None} for k, v in event["stages"].items()}}
        if "stages" in event
        else event
        for event in events
    ]


def test_macro_f1_stands_beside_accuracy(tmp_path):
    events = make_events(CLIENTS)
    summary = summarise(events, BASE, "cd")
    assert summary.macro_f1 is not None
    for stage in ("base", "personalised"):
        values = [getattr(client.macro_f1, stage) for client in summary.clients]
        assert getattr(summary.macro_f1.mean, stage) == pytest.approx(sum(values) / len(values))
        assert getattr(summary.macro_f1.worst, stage) == min(values)
    console = Console(file=StringIO(), width=80)
    show_summary(summary, console)
    table = console.file.getvalue()
    assert "Accuracy and macro-F1 on each client's own held-out rows" in table
    first = summary.clients[0]
    row = next(line for line in table.splitlines() if f" {first.id} " in line)
    assert f"{first.personalised:.3f}"[1:] + " " + f"{first.macro_f1.personalised:.3f}"[1:] in row
    assert max(map(len, table.splitlines()[1:])) <= 80
    page = Page(write_report(make_run(tmp_path, events)).read_text(encoding="utf-8"))
    assert "macro-F1" in page.text
    assert f"{summary.macro_f1.worst.global_:.3f}" in page.text


def test_a_causal_lm_is_told_in_its_own_words(tmp_path):
    events = causal(make_events(CLIENTS))
    folder = make_run(tmp_path, events)
    config = Config.model_validate({"task": {"kind": "causal-lm"}})
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    summary = summarise(events, BASE, "ab" * 32, "causal-lm")
    assert summary.macro_f1 is None
    (folder / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    body = write_report(folder).read_text(encoding="utf-8").split("</style>")[1].split("Configuration")[0]
    seen = " ".join(Page(body).text.split())
    assert "Answer-token accuracy" in seen
    assert "head" not in seen
    assert "F1" not in seen
    console = Console(file=StringIO(), width=100)
    show_summary(summary, console)
    assert "Answer-token accuracy on each client's own held-out rows" in console.file.getvalue()
    assert f"{summary.mean.personalised:.3f}" in console.file.getvalue()


def test_the_report_says_what_adapter_and_federation_are(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS))
    values = {"molora": {"selector": {"name": "top_k", "k": 2}, "shared": 1}, "federation": {"preset": "fedit"}}
    (folder / "config.toml").write_text(parse(values).to_toml(), encoding="utf-8")
    seen = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "routed and 1 always-on experts of rank" in seen
    assert "chosen by top_k" in seen
    assert "fedit: rule mean over the factor space" in seen


def test_clients_are_sorted_as_people_count(tmp_path):
    events = make_events([f"client-{number}" for number in (10, 2, 1, 11)])
    ids = [client.id for client in summarise(events, BASE, "cd").clients]
    assert ids == ["client-1", "client-2", "client-10", "client-11"]
    page = Page(write_report(make_run(tmp_path, events)).read_text(encoding="utf-8")).text
    assert page.rindex("client-2") < page.rindex("client-10")


def test_one_is_not_many():
    text = shown(make_events(["a"], rounds=1), force_terminal=False)
    assert "reviews: 1 client, 1 round, " in text
    console = Console(file=StringIO(), width=100)
    show_summary(summarise(make_events(["a"], rounds=1), BASE, "cd"), console)
    assert "1 round in " in console.file.getvalue()


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


def test_summary_without_clients_still_prints():
    console = Console(file=StringIO(), width=100)
    show_summary(summarise([], BASE, "cd"), console)
    assert "0 rounds" in console.file.getvalue()


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
