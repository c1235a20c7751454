"""`report.html`: one self-contained page about a run, drawn from its folder.

Names of clients and reasons of refusals come from other machines: the template escapes everything, and the page's
content policy allows neither scripts nor anything from elsewhere.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from molehill import files
from molehill.config import Config, MoLoRA, Task, parse
from molehill.errors import ConfigError, DataError, ResumeError
from molehill.tasks.kind import Kind, kind_of
from molehill.tasks.measures import Measure
from molehill.words import figure
from molehill_server import events as events_file
from molehill_simulation import experts
from molehill_simulation.charts import Plot, Whiskers, bar_plot, line_plot, whisker_plot
from molehill_simulation.few import MOST, Few, spread
from molehill_simulation.figures import STAGES
from molehill_simulation.summary import (
    Event,
    Summary,
    joined,
    read_summary,
    rounds_of,
)
from molehill_simulation.text import by_name, clean, duration, megabytes, moment, natural
from molehill_simulation.token_map import token_map

_LINE_COLOURS = 10
_SAMPLES = 12  # answers that are shown
_CLASSES = 20
_MEAN = "mean of all"  # no client is called so: names have no spaces


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        folder: A run folder, finished or stopped; what a stopped run lacks is left out of the page.

    Returns:
        The path of the page.

    Raises:
        DataError: A file of the run cannot be read.
        ResumeError: The folder does not hold a run.
    """
    if not (folder / "metrics.jsonl").is_file():
        raise ResumeError("not a run folder", where=str(folder), mend="Give the folder that --out named.")
    target = folder / "report.html"
    with files.told("the report", folder, "write it again"):
        files.write(target, render(folder).encode(), mode=files.PRIVATE)
    return target


def render(folder: Path) -> str:
    """The page of a run folder as HTML.

    Args:
        folder: A run folder.

    Returns:
        The page.

    Raises:
        DataError: A file of the run cannot be read.
    """
    events = events_file.read(folder / "metrics.jsonl")
    summary_file, config_file = folder / "summary.json", folder / "config.toml"
    summary = read_summary(summary_file) if summary_file.exists() else None
    config, values = _read_config(config_file) if config_file.exists() else ("", {})
    owners, samples = _owners(folder / "owners.json"), _samples(folder / "samples.json")
    about = {"config": config, "owners": owners, "samples": samples}
    page = _page()
    try:
        told = _kind(values).stages
        content = _content(events, summary, values, _sites(folder / "adapter" / "molora.json"))
        return page.render(stages=STAGES, told=told, summary=summary, **about, **content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"an event or a section of the configuration is not as Molehill writes it ({error!r})",
            where=str(folder),
            mend="Was a file edited, or written by another version?",
        ) from None


@functools.cache
def _page() -> Template:
    """The template, compiled once in a process: that takes longer than to fill it in."""
    environment = Environment(
        loader=PackageLoader("molehill_simulation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(clean=clean, figure=figure, zip=zip)
    return environment.get_template("report.html.j2")


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """The text of a configuration and its values."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the run's configuration: {error}", where=str(path)) from None


def _samples(path: Path) -> list[dict[str, str]]:
    """Answers to held-out rows, of as many clients as may be; a deployment has no such file."""
    try:
        found = files.parse_json(path.read_bytes()) if path.exists() else []
        every = [{key: str(each[key]) for key in ("client", "question", "reference", "answer")} for each in found]
    except OSError as error:
        mend = "Bring the file back, or remove it."
        raise DataError(f"cannot read the answers: {error.strerror}", where=str(path), mend=mend) from None
    except (ValueError, LookupError, TypeError):
        raise DataError("not what Molehill writes", where=str(path), mend="Was the file edited?") from None
    by_client: dict[str, list[dict[str, str]]] = {}
    for each in every:
        by_client.setdefault(each["client"], []).append(each)
    turns = [each for turn in zip_longest(*by_client.values()) for each in turn if each is not None][:_SAMPLES]
    return sorted(turns, key=lambda each: natural(each["client"]))


def _owners(path: Path) -> dict[str, str]:
    """Who clients are that had to be renamed; a deployment has no such file."""
    try:
        found = files.parse_json(path.read_bytes()) if path.exists() else {}
    except (OSError, ValueError) as error:
        what = f"cannot read who the clients are: {error}"
        raise DataError(what, where=str(path), mend="Bring the file back, or remove it.") from None
    if not isinstance(found, dict):
        raise DataError("not what Molehill writes", where=str(path), mend="Was the file edited?")
    return {name: str(owner) for name, owner in by_name(found)}


def _content(
    events: Sequence[Event],
    summary: Summary | None,
    config: Mapping[str, Any],
    sites: Mapping[str, Collection[str]] | None,
) -> dict[str, Any]:
    rounds = rounds_of(events)
    numbers = [event["round"] for event in rounds]
    known = sorted({client for event in rounds for client in event["loss_by_client"]}, key=natural)
    count, named = _named(events, known, summary)
    clients = [client for client in known if client in named]
    attempts = _attempts(events)
    refused = Few((at, c, reason) for at, e in attempts for c, reason in by_name(e["quarantined"]))
    styles = {c: f"line-{i}" if len(clients) <= _LINE_COLOURS else "line-many" for i, c in enumerate(clients)}
    curves = {c: {e["round"]: e["loss_by_client"][c] for e in rounds if c in e["loss_by_client"]} for c in clients}
    mean = {event["round"]: event["loss"] for event in rounds if event["loss"] is not None}
    traffic = {"up": [event["bytes_up"] for event in rounds], "down": [event["bytes_down"] for event in rounds]}
    return {
        "name": _start(events).get("run", "run"),
        "facts": _facts(events, summary, config),
        "loss": line_plot(numbers, {**curves, _MEAN: mean}, {**styles, _MEAN: "line-mean"}),
        "traffic": bar_plot(numbers, traffic, lambda count: f"{count / 1e6:.3g} MB"),
        "gains": _gains(summary) if summary else [],
        "clients": count,
        "named": named,
        "classes": _classes(summary, None if len(named) == count else named) if summary and summary.classes else None,
        "heat": token_map(events, named, sites),
        "probes": {name: by_site(figures) for name, figures in (summary.probes if summary else {}).items()},
        "refused": refused,
        "unusable": Few((at, c, reason) for at, e in attempts for c, reason in by_name(e.get("unusable", {}))),
        "norms": _norms(rounds, styles, named | {client for _, client, _ in refused}),
        "capped": Few(
            _by_client((e["client"], e["rows"], e["counts"], e["reason"]) for e in events if e["event"] == "capped")
        ),
        "missing": Few((at, c) for at, e in attempts for c in sorted(e["missing"], key=natural)),
        "failed": Few((e["stage"], e["client"], e["reason"]) for e in events if e["event"] == "failed"),
        "strangers": Few(_by_client((e["client"], e["reason"]) for e in events if e["event"] == "refused")),
    }


def _named(events: Sequence[Event], known: Sequence[str], summary: Summary | None) -> tuple[int, set[str]]:
    """How many clients there are, and those of them that tables and curves show."""
    scored = summary.clients if summary else ()
    everyone = sorted({*known, *joined(events), *(client.id for client in scored)}, key=natural)
    if summary and scored and len(everyone) > MOST:
        return len(everyone), {client.id for client in summary.shown}
    return len(everyone), set(spread(everyone))


def _classes(summary: Summary, named: Collection[str] | None) -> dict[str, Any]:
    """Rows and recall by client and class, or entities and F1; of very many classes those with most of them."""
    totals = Counter[str]()
    for counts in summary.classes.values():
        totals.update({label: train + test for label, (train, test) in counts.items()})
    most = {label for label, _ in totals.most_common(_CLASSES)}
    labels = [label for label in totals if label in most]
    scores = {client.id: client.type_f1 or client.recall for client in summary.clients}
    rows = [
        (client, [(*counts.get(label, (0, 0)), scores.get(client, {}).get(label)) for label in labels])
        for client, counts in summary.classes.items()
        if named is None or client in named
    ]
    return {"labels": labels, "more": len(totals) - len(labels), "rows": rows, "scored": any(scores.values())}


def _gains(summary: Summary) -> list[tuple[Measure, Whiskers]]:
    """By measure the gain over alone: of the mean, then of every client that is shown, the greatest by the first."""
    measures = summary.gained
    clients = [client for client in summary.shown if measures and measures[0].name in client.gains]
    clients.sort(key=lambda client: -client.gains[measures[0].name].value)
    plots = []
    for measure in measures:
        gains = {client.id: client.gains[measure.name] for client in clients if measure.name in client.gains}
        lines = [(name, gain.value, gain.interval or (gain.value,) * 2, gain.sign, gain.told(measure))
                 for name, gain in (("mean", summary.gains[measure.name].mean), *gains.items())]  # fmt: skip
        plots.append((measure, whisker_plot(lines)))
    return plots


def _norms(rounds: Sequence[Event], styles: Mapping[str, str], named: Collection[str]) -> Plot | None:
    """Curves of the norms of what clients sent, also of what was refused, and the bound they were held against."""
    curves: dict[str, dict[int, float]] = {}
    for event in rounds:
        for client, size in event.get("norms", {}).items():
            if client in named:
                curves.setdefault(client, {})[event["round"]] = size
    if not curves:
        return None
    bounds = {event["round"]: event["norm_bound"] for event in rounds if event.get("norm_bound") is not None}
    curves = {**dict(by_name(curves)), **({"the bound": bounds} if bounds else {})}
    names = {client: styles.get(client, "line-many") for client in curves} | {"the bound": "line-mean"}
    return line_plot([event["round"] for event in rounds], curves, names)


def _attempts(events: Sequence[Event]) -> list[tuple[str, Event]]:
    """Every attempt that stayed below its quorum and then every round, by round, each with its name."""
    retries = {(event["round"], event["attempt"]): event for event in events if event["event"] == "retry"}
    rounds = {(event["round"], math.inf): event for event in rounds_of(events)}
    return [
        (str(number) if attempt == math.inf else f"{number}, attempt {attempt + 1}", event)
        for (number, attempt), event in sorted({**retries, **rounds}.items())
    ]


def _facts(events: Sequence[Event], summary: Summary | None, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    rounds, start = rounds_of(events), _start(events)
    up = sum(event["bytes_up"] for event in rounds)
    down = sum(event["bytes_down"] for event in rounds)
    seconds = summary.seconds if summary else sum(event["seconds"] for event in rounds)
    facts = [
        ("Date", _dates(events)),
        ("Molehill", _versions(events)),
        ("Clients", str(len(start.get("clients", ())))),
        ("Rounds", f"{len(rounds)} of {start.get('rounds', len(rounds))}"),
        ("Time", duration(seconds)),
        ("Sent up", megabytes(up)),
        ("Sent down", megabytes(down)),
        ("Trained parameters", f"{start.get('parameters', 0):,}"),
    ]
    if summary:
        base = summary.base_model
        revision = f" at {base.revision[:12]}" if base.revision else ""
        facts.append(("Base model", f"{base.id}{revision} ({base.digest[:12]})"))
        facts += [("Not adapted", remark) for remark in base.remarks]
    spent = [event["report"] for event in rounds if "epsilon" in event.get("report", {})]
    if spent:
        delta = config.get("privacy", {}).get("delta", 0.0)
        noise = f"signal to noise {spent[-1]['signal_to_noise']:.2g} in the last round"
        facts.append(("Privacy", f"epsilon {spent[-1]['epsilon']:.3g} at delta {delta:g}; {noise}"))
    if "molora" in config:
        facts.append(("Adapter", _adapter(config["molora"])))
    if "federation" in config:
        facts.append(("Federation", _federation(config["federation"])))
    if "personal" in config:
        facts.append(("Personal", _personal(config)))
    if "data" in config:
        facts.append(("Data", str(config["data"].get("source", ""))))
    return facts


def _start(events: Sequence[Event]) -> Event:
    return next((event for event in events if event["event"] == "start"), {})


def _dates(events: Sequence[Event]) -> str:
    """When the run began, and where that is another day when it ended, by its events; a dash where there are none."""
    if not events:
        return "-"
    times = [event["time"] for event in events]
    first, last = moment(min(times)), moment(max(times))
    return f"{first} UTC" if first[:10] == last[:10] else f"{first} to {last} UTC"


def _versions(events: Sequence[Event]) -> str:
    """Which version computed the run, and which it went on with; older ones did not say."""
    begun = [event for event in events if event["event"] in {"start", "resume"}]
    return ", then ".join(dict.fromkeys(str(event.get("version", "not noted")) for event in begun)) or "-"


def _kind(config: Mapping[str, Any]) -> Kind:
    return kind_of(str(config.get("task", {}).get("kind", Task().kind)))


def _adapter(molora: Mapping[str, Any]) -> str:
    """The adapter in words: its preset, its experts, how they are chosen, and what else is not as usual."""
    routed, always, usual = int(molora["experts"]), int(molora["shared"]), _usual("molora", molora)
    dealt = _name(molora["allocation"])
    allocation = "" if dealt == MoLoRA().allocation.name else dealt
    text = experts.planned(_name(molora["expert"]), routed, always, int(molora["rank"]), allocation)
    if routed > 1 or always:
        text += f", scored by {_told(molora['scorer'])}, chosen by {_told(molora['selector'])}"
    for key in ("transforms", "blend", "mixer", "topology", "init", "losses"):
        text += _unusual(key, molora[key], getattr(usual, key))
    return f"{molora['preset']}: {text}" if molora.get("preset") else text


def _personal(config: Mapping[str, Any]) -> str:
    """What every client has of its own, of what there is."""
    molora = config.get("molora", {})
    routed = int(molora.get("experts", 2)) > 1 or int(molora.get("shared", 0)) > 0
    has = {"gate": routed, "head": _kind(config).head is not None}
    return ", ".join(f"{part} {config['personal'][part]}" for part, there in has.items() if there) or "nothing"


def _federation(federation: Mapping[str, Any]) -> str:
    """How the server plans and merges, in words."""
    usual = _usual("federation", federation)
    text = f"rule {_told(federation['rule'])} over the {_name(federation['space'])} space"
    for key, what in (("lower", "lowered by"), ("server_opt", "server optimiser"), ("policy", ""), ("select", "")):
        text += _unusual(what or key, federation[key], getattr(usual, key))
    return f"{federation['preset']}: {text}" if federation.get("preset") else text


def _usual(section: str, values: Mapping[str, Any]) -> Any:
    """The section as its preset leaves it, or the defaults where it has none that is installed here."""
    try:
        return getattr(parse({section: {"preset": values["preset"]}} if values.get("preset") else {}), section)
    except ConfigError:
        return getattr(Config(), section)


def _unusual(what: str, given: Any, usual: Any) -> str:
    """The methods of a key after a comma; empty where they are those that it names by itself."""
    methods, known = ([*each] if isinstance(each, list | tuple) else [each] for each in (given, usual))
    if [_name(method) for method in methods] == [method.name for method in known]:
        return ""
    return f", {what} {' and '.join(map(_told, methods)) or 'no more'}"


def _name(ref: Any) -> str:
    """The name of a method, for example ``top_k`` of ``{name = "top_k", k = 2}``."""
    return str(ref["name"] if isinstance(ref, Mapping) else ref)


def _told(ref: Any) -> str:
    """The same with its parameters: ``top_k (k = 2)``."""
    given = [f"{key} = {value}" for key, value in ref.items() if key != "name"] if isinstance(ref, Mapping) else []
    return _name(ref) + (f" ({', '.join(given)})" if given else "")


def _by_client(rows: Iterable[tuple[str, *tuple[Any, ...]]]) -> list[tuple[str, *tuple[Any, ...]]]:
    """Different rows that begin with a client, in the same order."""
    return sorted(set(rows), key=lambda row: (natural(row[0]), row[1:]))


def by_site(figures: Mapping[str, float]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Figures by ``site/figure`` as a table: the names of its columns, and the rows by site."""
    parts = {name: name.partition("/") for name in figures}
    columns = list(dict.fromkeys(figure for _, _, figure in parts.values()))
    sites = dict.fromkeys(site for site, _, _ in parts.values())
    return columns, [(site, [figures.get(f"{site}/{figure}") for figure in columns]) for site in sites]


def _sites(path: Path) -> dict[str, set[str]] | None:
    """Where the run's experts are, by its adapter; None before it has one."""
    try:
        found = files.parse_json(path.read_bytes())["ranks"] if path.exists() else None
        return None if found is None else {str(expert): set(sites) for expert, sites in found.items()}
    except OSError as error:
        mend = "Bring the file back, or remove it."
        raise DataError(f"cannot read the adapter: {error.strerror}", where=str(path), mend=mend) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise DataError("not what Molehill writes", where=str(path), mend="Was the file edited?") from None
