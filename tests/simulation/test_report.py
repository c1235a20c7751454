"""The report of a run, from a run folder as the engine leaves it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console
from told_runs import BASE, CLIENTS, HOSTILE, TROUBLES, causal, make_events, make_run, without_scores

from molehill.config import Config, parse
from molehill.errors import DataError, ResumeError
from molehill_simulation.charts import line_plot
from molehill_simulation.report import write_report
from molehill_simulation.summary import read_summary, summarise
from molehill_simulation.ui import RunView, show_summary


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


def test_of_very_many_clients_so_many_are_shown_as_a_page_can_hold(tmp_path):
    clients = [f"c{i}" for i in range(250)]
    events = make_events(clients, 2)
    lost = {"event": "failed", "time": 0.0, "stage": "baseline", "reason": "it is away"}
    events += [{**lost, "client": client} for client in clients[:120]]
    summary = summarise(events, BASE, "cd")
    page = Page(write_report(make_run(tmp_path / "many", events)).read_text(encoding="utf-8"))
    few = Page(write_report(make_run(tmp_path / "few", make_events(clients[:100], 2))).read_text(encoding="utf-8"))
    seen = " ".join(page.text.split())
    assert "100 of 250 clients are shown, at equal distances from the worst to the best" in seen
    assert len(page.tags) < 1.2 * len(few.tags)
    ranked = sorted(summary.clients, key=lambda client: client.personalised)
    assert {ranked[0].id, ranked[-1].id} < {client.id for client in summary.shown}
    assert [client.id for client in summary.shown] == [c for c in clients if c in {s.id for s in summary.shown}]
    name, (median, f1) = summary.quantiles[2]
    assert (name, median.personalised) == ("median", ranked[124].personalised)
    assert f1.base == pytest.approx(median.base - 0.03)
    assert f"median {median.base:.3f}" in seen
    assert "And 20 more." in seen
    assert "clients are shown" not in few.text
    shown = StringIO()
    show_summary(summary, Console(file=shown, width=400))
    assert "100 of 250 clients are shown" in shown.getvalue()
    assert shown.getvalue().count("\n") < 120


def test_of_an_unfinished_run_of_very_many_clients_some_are_shown(tmp_path):
    events = [e for e in make_events([f"c{i}" for i in range(250)], 2) if e["event"] != "evaluation"]
    text = write_report(make_run(tmp_path, events, finished=False)).read_text(encoding="utf-8")
    assert text.count("<polyline") == 101  # and their mean
    assert "Of 250 clients 100 are shown. The mean is of all." in text


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


def test_without_baselines_bars_have_the_figures_of_their_own_stage(tmp_path):
    events = [event for event in make_events(CLIENTS) if "base" not in event.get("stages", ())]
    for scores in (scores for event in events for scores in event.get("stages", {}).values()):
        scores["accuracy_interval"] = scores["macro_f1_interval"] = [0.25, 0.875]
    summary = summarise(events, BASE, "cd")
    text = write_report(make_run(tmp_path, events)).read_text(encoding="utf-8")
    assert "<span>F1&nbsp;-</span>" not in text
    assert summary.macro_f1 is not None
    for client in summary.clients:
        for stage in ("global_", "personalised"):
            shown = f"{getattr(client, stage):.3f} <span>F1&nbsp;{getattr(client.macro_f1, stage):.3f}</span>"
            assert shown in text
    bars = [line for line in text.splitlines() if '<div class="bar ' in line]
    assert len(bars) == 2 * (1 + len(CLIENTS))
    assert all('<s style="left:' in line for line in bars)


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
    assert "Token accuracy (bar) and perplexity (beside it)" in seen
    assert f"perplexity it is {summary.perplexity.mean.personalised:.2f} (worst" in seen
    assert f"global {summary.loss.mean.global_:.3f}, personalised {summary.loss.mean.personalised:.3f}." in seen
    assert "head" not in seen
    assert "F1" not in seen
    console = Console(file=StringIO(), width=80)
    show_summary(summary, console)
    shown = console.file.getvalue()
    assert "Token accuracy and perplexity on each client's own held-out rows" in shown
    assert f"{summary.mean.personalised:.3f}"[1:] + f" {summary.perplexity.mean.personalised:.2f}" in shown
    assert f"personalised {summary.loss.mean.personalised:.3f}" in shown


def test_the_report_says_what_adapter_and_federation_are(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS))
    values = {"molora": {"selector": {"name": "top_k", "k": 2}, "shared": 1}, "federation": {"preset": "fedit"}}
    (folder / "config.toml").write_text(parse(values).to_toml(), encoding="utf-8")
    seen = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert "4 routed LoRAs of rank 8 and 1 always-on of rank 8, scored by" in seen
    assert "chosen by top_k (k = 2)" in seen
    assert "fedit: rule mean over the factor space Personal" in seen
    values = {
        "molora": {
            "init": "orth",
            "losses": [{"name": "entropy", "coef": 0.1}, {"name": "importance_cv2", "coef": 0.2}],
        },
        "federation": {"rule": {"name": "krum", "f": 1}, "select": {"name": "random", "fraction": 0.5}},
    }
    (folder / "config.toml").write_text(parse(values).to_toml(), encoding="utf-8")
    seen = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    assert ", init orth, losses entropy (coef = 0.1) and importance_cv2 (coef = 0.2)" in seen
    assert "rule krum (f = 1) over the factor space" in seen
    assert ", select random (fraction = 0.5)" in seen


@pytest.mark.parametrize(
    ("molora", "text"),
    [
        ({"preset": "houlsby"}, "houlsby: one bottleneck of width 64 "),
        ({"preset": "mov"}, "mov: 30 routed vectors, scored by linear (init = normal, std = 0.02), chosen by dense "),
        ({"preset": "hmoe"}, "LoRAs of rank 16 before hetero_rank, scored by"),
        ({"preset": "lora"}, "lora: one LoRA of rank 8 "),
    ],
)
def test_the_report_calls_experts_what_they_are(tmp_path, molora, text):
    folder = make_run(tmp_path, make_events(CLIENTS))
    settings = parse({"molora": molora}).to_toml()
    (folder / "config.toml").write_text(settings, encoding="utf-8")
    assert text in " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    seen = " ".join(Page(write_report(folder).read_text(encoding="utf-8")).text.split())
    routed = "scored by" in text
    assert ("Personalgate anchored, head anchored" if routed else "Personalhead anchored") in seen.replace(
        "Personal ", "Personal"
    )
    (folder / "config.toml").write_text(re.sub('"(lora|ia3|bottleneck)"', '"from_elsewhere"', settings), "utf-8")
    write_report(folder)  # a run whose kind of experts is not installed here


def test_clients_are_sorted_as_people_count_wherever_they_are_named(tmp_path):
    clients = [f"client-{number}" for number in (10, 2, 1, 11)]
    told = ["client-1", "client-2", "client-10", "client-11"]
    events = make_events(clients)
    kept = [e for e in events if e["event"] not in ("round", "end")]
    lost = {"quarantined": dict.fromkeys(clients, "NaN"), "unusable": dict.fromkeys(clients, "NaN"), "missing": clients}
    rounds = [e | lost | {"norms": dict.fromkeys(clients, 1.0)} for e in events if e["event"] == "round"]
    faults = [{"event": "refused", "time": 0.0, "client": client, "reason": "no"} for client in clients]
    faults += [e | {"event": "capped", "rows": 5, "counts": 3} for e in faults]
    events = [*kept, rounds[0], *faults]
    classes = {client: {"good": (7, 2)} for client in clients}
    summary = summarise(events, BASE, "ab" * 32, classes=classes)
    for found in (json.loads(summary.to_json())["classes"], [client.id for client in summary.clients]):
        assert list(found) == told
    folder = make_run(tmp_path, events)
    (folder / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    (folder / "owners.json").write_text(json.dumps(dict.fromkeys(clients, "who")), encoding="utf-8")
    sections = write_report(folder).read_text(encoding="utf-8").split("<h2>")[1:]
    named = {part.split("</h2>")[0]: re.findall(r"client-\d+", part.split("Configuration")[0]) for part in sections}
    for title in (
        *("What each client gained", "The figures", "Classes", "Names", "Training loss", "Norms of updates"),
        *("Where tokens went", "Refused updates", "Models that could not be trained", "Missing answers"),
        *("Row counts that were not taken as named", "Refused nodes"),
    ):
        found = named[title]
        assert [found[at : at + 4] for at in range(0, len(found), 4)] == [told] * (len(found) // 4), title
        assert found, title
    console = Console(file=StringIO(), width=100)
    show_summary(summary, console)
    with RunView(console) as view:
        view(rounds[0])
    found = re.findall(r"client-\d+", console.file.getvalue())
    assert found == told * (len(found) // 4)
    assert len(found) == 16


def test_the_report_carries_the_date_of_the_run_and_the_version_that_computed_it(tmp_path):
    start, *rest = make_events(CLIENTS, rounds=1)
    begun = start | {"time": 1_790_000_000.0, "version": "0.1.0"}
    same_day = [event | {"time": 1_790_000_060.0} for event in rest]
    seen = Page(write_report(make_run(tmp_path, [begun, *same_day])).read_text(encoding="utf-8")).text
    assert "Date2026-09-21 14:13 UTC" in "".join(line.strip() for line in seen.splitlines())
    again = begun | {"event": "resume", "round": 0, "time": 1_790_100_000.0, "version": "0.2.0<b>"}
    last = {"event": "end", "time": 1_790_100_000.0, "seconds": 1.0}
    text = write_report(make_run(tmp_path, [begun, *same_day, again, last])).read_text(encoding="utf-8")
    seen = "".join(line.strip() for line in Page(text).text.splitlines())
    assert "Date2026-09-21 14:13 to 2026-09-22 18:00 UTC" in seen
    assert "Molehill0.1.0, then 0.2.0<b>" in seen
    assert "0.2.0<b>" not in text
    with pytest.raises(DataError, match="not as Molehill writes it"):
        write_report(make_run(tmp_path, [begun | {"time": 1e300}, *rest]))
