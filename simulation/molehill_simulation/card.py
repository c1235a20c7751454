"""What a run folder can say to others: a model card, a data card of counts, and a privacy report in plain words.

All of it comes from the files of the run; what they do not hold is said as such. The model card names no owner.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from molehill import __version__, config, files
from molehill.errors import ConfigError, DataError, ResumeError
from molehill.evidence import KINDS, Moment
from molehill.molora.adapter import Manifest, read_manifest
from molehill.tasks.kind import kind_of
from molehill.tasks.measures import Measure
from molehill.wire.store import load_tree
from molehill_server import audit
from molehill_server.events import read
from molehill_simulation.experts import planned
from molehill_simulation.figures import STAGES, Figures
from molehill_simulation.summary import Event, Summary, joined, read_summary, rounds_of
from molehill_simulation.text import clean, megabytes, natural

MODEL, DATA, PRIVACY = "README.md", "data-card.md", "privacy.md"
_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~])")
_WHEN: dict[Moment, str] = {"run": "In the run", "evaluate": "At the end", "train.baseline": "At the end"}
_EXPERTS = "experts, small matrices beside the base model"  # whatever kind they are
_WHAT = {  # a kind of tensor in words
    "gate": "routers, which choose among the experts",
    "head": "the classifier",
}


@dataclass(frozen=True)
class _Run:
    """What the files of a finished run say.

    Attributes:
        folder: The run folder.
        config: Its configuration.
        summary: What it came to.
        adapter: Description of its adapter.
        events: All that happened.
    """

    folder: Path
    config: config.Config
    summary: Summary
    adapter: Manifest
    events: Sequence[Event]

    @property
    def rounds(self) -> list[Event]:
        """Its rounds."""
        return rounds_of(self.events)

    @property
    def simulated(self) -> bool:
        """Whether all owners were on one machine."""
        return self.summary.machine is not None

    @property
    def epsilon(self) -> float | None:
        """The privacy that was spent; None where nothing bounds it."""
        spent = [event["report"]["epsilon"] for event in self.rounds if "epsilon" in event.get("report", {})]
        return max(spent, default=None)


def write_cards(run: Path, out: Path | None = None) -> list[Path]:
    """Write the three files.

    Args:
        run: Folder of a finished run.
        out: Where to; nothing is written over there. None for ``card`` in the run folder, which is written anew.

    Returns:
        Their paths.

    Raises:
        ConfigError: There is such a file already.
        DataError: A file of the run cannot be read.
        ResumeError: The folder does not hold a finished run.
    """
    texts = render(run)
    folder = out or run / "card"
    there = [folder / name for name in texts if out is not None and (folder / name).exists()]
    if there:
        raise ConfigError("there is something already", where=str(there[0]), mend="Choose another --out.")
    with files.told("the cards", folder, "write them again"):
        files.make_folder(folder)
        for name, text in texts.items():
            files.write(folder / name, text.encode(), mode=files.PRIVATE)
    return [folder / name for name in texts]


def render(run: Path) -> dict[str, str]:
    """The three texts by the name of their file.

    Raises:
        DataError: A file of the run cannot be read.
        ResumeError: The folder does not hold a finished run.
    """
    found = _open(run)
    try:
        return {MODEL: _model_card(found), DATA: _data_card(found), PRIVACY: _privacy(found)}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"an event is not as Molehill writes it ({error!r})", where=str(run / "metrics.jsonl"),
            mend="Was the file edited, or written by another version?",
        ) from None  # fmt: skip


def _open(folder: Path) -> _Run:
    if not (folder / "metrics.jsonl").is_file():
        raise ResumeError("not a run folder", where=str(folder), mend="Give the folder that --out named.")
    if not (folder / "summary.json").is_file() or not (folder / "adapter").is_dir():
        mend = f"Finish it: molehill simulate --out {folder} --resume"
        raise ResumeError("this run has not ended yet", where=str(folder), mend=mend)
    return _Run(
        folder, config.load(folder / "config.toml"), read_summary(folder / "summary.json"),
        read_manifest(folder / "adapter"), read(folder / "metrics.jsonl"),
    )  # fmt: skip


# ---- the model card ----------------------------------------------------------------------------------------------


def _model_card(run: _Run) -> str:
    summary, settings = run.summary, run.config
    on_hub = not run.adapter.base["id"].startswith(("local:", "sample:"))
    task, owners = kind_of(summary.task).pipeline, len(joined(run.events))
    dataset = f"{summary.scored} rows, mean over {_count(len(summary.complete), 'owner')}"
    results = [
        EvalResult(
            task_type=task, dataset_type="private", dataset_name=dataset, metric_type=measure.name,
            metric_value=round(value, 4), metric_name=f"{measure.title}, {stage}",
        )
        for measure, mean, _ in _measured(summary)
        for stage, value in zip(STAGES, mean.row, strict=True)
        if value is not None and stage in {"global", "personalised"}
    ]  # fmt: skip
    front = ModelCardData(
        base_model=run.adapter.base["id"] if on_hub else None, library_name="peft", pipeline_tag=task,
        tags=["molehill", "mixture-of-experts", "federated-learning"],
        model_name=settings.run.name if results else None, eval_results=results or None,
    )  # fmt: skip
    base = run.adapter.base
    at = f" at revision {base['revision']}" if base.get("revision") else ""
    section = run.adapter.molora
    made_of = planned(section.expert.name, section.experts, section.shared, section.rank)
    trained = f"trained by {_count(owners, 'data owner')} in {_count(summary.rounds, 'round')}"
    where = " of a simulation on one machine" if run.simulated else ""
    lines = [
        "---", front.to_yaml().strip(), "---", "", f"# {_text(settings.run.name)}", "",
        f"{_text(made_of)} on the frozen base {_text(base['id'])}{at}, {trained}{where}.",
        f"Molehill {__version__} wrote this card.", "",
        "| | |", "|---|---|",
        f"| Base, SHA-256 of settings and weights | {base['digest']} |",
        f"| Task | {task}, at most {settings.task.max_length} tokens |",
    ]  # fmt: skip
    if run.adapter.labels:
        lines.append(f"| Classes | {', '.join(map(_text, run.adapter.labels))} |")
    lines += [
        f"| Experts | {len(run.adapter.ranks)}, each a folder in `experts/` |",
        f"| What stays with each owner | {_stays(run)} |",
        f"| Configuration, SHA-256 | {summary.config_digest} |",
        "", "## Figures", "",
    ]  # fmt: skip
    lines += _figures(summary)
    lines += [
        "", "## What is known of its privacy", "", *_differential(run), "", *_secure(run), "",
        "## What this card does not know", "",
        "The licence of the base and of the data, which languages and whom the data are about, what the model is good",
        "for beyond these figures, and how it errs: its owners have to say so before they pass it on.",
    ]  # fmt: skip
    return _joined(lines)


def _measured(summary: Summary) -> Iterator[tuple[Measure, Figures, Figures]]:
    """What was measured, with its mean and worst over owners."""
    yield from zip(summary.columns, summary.means, summary.worsts, strict=True)


def _figures(summary: Summary) -> list[str]:
    shown = [stage for stage, value in zip(STAGES, summary.mean.row, strict=True) if value is not None]
    if not shown:
        return ["No figures were measured."]
    lines = [f"| | {' | '.join(shown)} |", f"|---|{'---|' * len(shown)}"]
    for measure, mean, worst in _measured(summary):
        for what, figures in (("mean over owners", mean), ("worst over owners", worst)):
            cells = " | ".join(figures.told(stage, measure) for stage in shown)
            lines.append(f"| {measure.title}, {what} | {cells} |")
    tested = sum(client.n_test for client in summary.complete)
    headed = kind_of(summary.task).head is not None
    lines += [
        "",
        f"On {_count(tested, f'{summary.scored} row')} of {_count(len(summary.complete), 'owner')}, every owner alike.",
        *(["In brackets is what a figure is in with 95% confidence."] if summary.mean.interval else []),
        f"Base: the frozen base{', with a head trained by each owner' if headed else ''}. Local: each owner alone.",
        f"Global: the shared model. Personalised: with each owner's own gate{' and head' if headed else ''}.",
    ]
    if summary.gained:
        lines += [
            "",
            "Gain over alone: of each owner the personalised model over the local one, on the same held-out rows.",
            *(f"In {each.title}: {summary.gains[each.name].told(each)}." for each in summary.gained),
        ]
    if summary.unscored:
        lines.append(f"{_count(len(summary.unscored), 'owner')} of the run are not in them, for want of figures.")
    if summary.anew:
        lines.append(f"{_count(len(summary.anew), 'owner')} lost personal state and began it anew.")
    return lines


# ---- the data card -----------------------------------------------------------------------------------------------


def _data_card(run: _Run) -> str:
    summary, data = run.summary, run.config.data
    trained, aside, tested = (sum(getattr(c, name) for c in summary.clients) for name in ("n_train", "aside", "n_test"))
    told = f", {aside:,} of them set aside from the rounds," if aside else ""
    source = Path(data.source).name if Path(data.source).suffix else data.source  # not where it lies
    lines = [
        f"# Data of {_text(run.config.run.name)}", "",
        "Counts only; no row is in this file, and none was read for it.",
        "It names the owners: read it before you pass it on.", "",
        f"{_count(len(joined(run.events)), 'owner')} took part; {len(summary.clients)} told their counts:",
        f"{_count(trained + aside, 'row')} to train on{told} and {tested:,} held out.", "",
    ]  # fmt: skip
    if run.simulated:
        lines.append(f"The rows are those of {_text(source)}, dealt to owners ({_text(data.partition.name)}).")
    else:
        lines.append("The rows are on the owners' machines; the numbers are those that the machines told.")
    if summary.lengths:
        lines += ["", f"Lengths: {_text(summary.lengths)}."]
    if summary.told_cut:
        lines += ["", f"{_text(summary.told_cut[0].upper() + summary.told_cut[1:])}."]
    lines += ["", "| owner | to train on | held out | too long |", "|---|---:|---:|---:|"]
    for client in sorted(summary.clients, key=lambda each: natural(each.id)):
        to_train = f"{client.n_train + client.aside:,}"
        lines.append(f"| {_text(client.id)} | {to_train} | {client.n_test:,} | {client.cut:,} |")
    if summary.classes:
        labels = sorted({label for counts in summary.classes.values() for label in counts})
        things = "Entities of each type" if summary.spans else "Rows of each class"
        lines += ["", f"{things}, to train on and held out:", ""]
        lines += [f"| owner | {' | '.join(map(_text, labels))} |", f"|---|{'---:|' * len(labels)}"]
        for owner, counts in sorted(summary.classes.items(), key=lambda item: natural(item[0])):
            cells = (counts.get(label, (0, 0)) for label in labels)
            lines.append(f"| {_text(owner)} | {' | '.join(f'{a:,} and {b:,}' for a, b in cells)} |")
    elif kind_of(summary.task).labelled:
        things = "entities each type" if summary.spans else "rows each class"
        lines += ["", f"How many {things} has is not in the run folder: the rows were not on this machine."]
    lines += [
        "", "## What this card does not know", "",
        ("Where the rows come from, who wrote them and whom they are about, in which languages, under which licence "
        "and on which legal basis, how they were labelled, and whether any row is there twice."),
    ]  # fmt: skip
    return _joined(lines)


# ---- the privacy report ------------------------------------------------------------------------------------------


def _privacy(run: _Run) -> str:
    return _joined([
        f"# What left whose machine: {_text(run.config.run.name)}", "",
        "For a data-protection officer, from the files of the run folder alone. It names the owners.", _where(run), "",
        "## Who took part", "", *_took_part(run),
        "", "## What left each machine", "", *_left(run),
        "", "## In which rounds, and how much", "", *_by_round(run),
        "", "## What stayed", "",
        f"No row, and no text, is part of any message. Also with each owner stays: {_stays(run)}.",
        "", "## What the model may tell about an owner", "", *_differential(run),
        "", "## What the coordinator can read", "", *_secure(run),
        "", "## Evidence", "", *_evidence(run),
        "", "## What this report does not know", "",
        "- On which legal basis owners took part, and whether the people whom the rows are about know of it.",
        "- Whether programs on the owners' machines and on the coordinator's were those that Molehill ships.",
        "- Who has had the run folder, the model or a bundle since.",
        "- What an owner's own policy allowed or refused: that is written on its own machine (`molehill client`).",
        "- How many bytes of a round each machine sent: only their sum is kept.",
    ])  # fmt: skip


def _where(run: _Run) -> str:
    if run.simulated:
        return (
            "It was a simulation: all rows lay on one machine, and nothing left it. What an owner's machine would have "
            "sent is what is told here."
        )
    return "Owners took part from machines of their own; what they sent went to one coordinator."


def _took_part(run: _Run) -> list[str]:
    chosen, used, refused, missing = (Counter[str]() for _ in range(4))
    numbers: dict[str, list[int]] = {}
    for event in run.rounds:
        chosen.update(event["selected"])
        used.update(event["accepted"])
        refused.update(event["quarantined"].keys())
        missing.update(event["missing"])
        for client in {*event["accepted"], *event["quarantined"]}:
            numbers.setdefault(client, []).append(int(event["round"]))
    everyone = sorted({*joined(run.events), *chosen, *numbers}, key=natural)
    lines = [
        "| owner | asked in rounds | sent in rounds | used | refused | did not answer |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for each in everyone:
        sent = _ranges(numbers.get(each, ()))
        lines.append(f"| {_text(each)} | {chosen[each]} | {sent} | {used[each]} | {refused[each]} | {missing[each]} |")
    strangers = {event["client"] for event in run.events if event["event"] == "refused"}
    if strangers:
        lines += ["", f"Turned away before they could take part: {len(strangers)}."]
    failed = sorted({event["client"] for event in run.events if event["event"] == "failed"}, key=natural)
    if failed:
        lines += ["", f"Without figures at the end: {', '.join(map(_text, failed))}."]
    return lines


def _left(run: _Run) -> list[str]:
    sizes: Counter[str] = Counter()
    shared, _ = load_tree(run.folder / "final.safetensors")
    for key, value in shared.items():
        if not key.role.startswith("patch."):
            sizes[_WHAT.get(key.kind, _EXPERTS)] += int(value.size)
    told = "; ".join(f"{what} ({count:,} numbers)" for what, count in sorted(sizes.items()))
    masked = run.config.privacy.secure_aggregation
    lines = [
        "- Its name, and the address that it was connected from.",
        f"- In its rounds, changes of what all train together: {told}. A round may ask for a part of them.",
        f"  They are numbers in the format {_text(run.config.wire.up.name)}. Rows can sometimes be reconstructed from",
        f"  such changes, the more so the fewer rows there are{', which is why they were masked' if masked else ''}.",
    ]
    if masked:
        lines.append("- Public keys, and encrypted shares of the secrets that masks are made of.")
    return [*lines, *(f"- {_WHEN[kind.moment]}: {kind.meaning}." for kind in KINDS if kind.asked(run.config))]


def _by_round(run: _Run) -> list[str]:
    lines = [
        "| round | sent by | received | of them refused | sent to owners | day |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for event in run.rounds:
        refused = len(event["quarantined"])
        day = datetime.fromtimestamp(event["time"], UTC).date().isoformat()
        senders = _count(len(event["accepted"]) + refused, "owner")
        lines.append(
            f"| {event['round']} | {senders} | {event['bytes_up']:,} bytes | {refused} "
            f"| {event['bytes_down']:,} bytes | {day} |"
        )
    up, down = run.summary.bytes_up, run.summary.bytes_down
    lines += ["", f"In all {megabytes(up)} came from owners and {megabytes(down)} went to them."]
    again = sum(event["event"] == "retry" for event in run.events)
    if again:
        lines.append(f"{again} attempts at a round had to be begun again; what was sent in them is among these bytes.")
    lines.append("Bytes of scores, keys and refusals, which are messages of their own, are not in these figures.")
    return lines


def _differential(run: _Run) -> list[str]:
    privacy = run.config.privacy
    if run.epsilon is None:
        return [
            "There was no differential privacy, so nothing bounds what the model tells. Whoever has it can test",
            "whether some text was likely among an owner's rows; a model that writes may repeat what it often read.",
        ]
    times = math.exp(min(run.epsilon, 700))  # which is no longer a number beyond
    return [
        f"Differential privacy by owner: epsilon {run.epsilon:.3g} of a budget of {privacy.epsilon:g}, at delta",
        f"{privacy.delta:g}, with changes clipped to {privacy.clip:g} and noise of {privacy.noise:g} times that. But",
        f"for that delta, an outcome is at most {times:.3g} times as likely with all rows of one owner as without.",
        "Single rows are not protected one by one. Gates and heads that stay with an owner are not in the bound, nor",
        "is what is told of losses, counts and scores.",
    ]


def _secure(run: _Run) -> list[str]:
    if not run.config.privacy.secure_aggregation:
        return ["There was no secure aggregation: the coordinator could read what every single owner sent."]
    lines = [
        "Secure aggregation: the coordinator could read the sum of what the owners of a round sent, and nothing of a",
        "single one, while no more than a third of them worked with it and it had no round repeated.",
    ]
    return [*lines, "In a simulation nobody vouches for the keys."] if run.simulated else lines


def _stays(run: _Run) -> str:
    personal = run.config.personal
    beside = "its own addition to the shared {}"
    kept = {"anchored": beside, "convex": beside, "personal": "its {}", "split": "its own part of the {}"}
    parts: list[tuple[str, str]] = [("router", personal.gate)] if run.config.molora.experts > 1 else []
    parts += [(f"{run.summary.task} head", personal.head)] if kind_of(run.summary.task).head is not None else []
    told = [kept[how].format(what) for what, how in parts if how in kept]
    return " and ".join(told) or "nothing of the model"


def _evidence(run: _Run) -> list[str]:
    path = run.folder / "audit.jsonl"
    lines = [
        f"- Configuration, SHA-256: `{run.summary.config_digest}`",
        f"- Base, SHA-256: `{run.adapter.base['digest']}`",
    ]
    if not path.is_file():
        return [*lines, "- The run folder has no audit log: nothing shows that its files are as they were written."]
    try:
        verdict = audit.verify(path)
    except DataError as error:
        return [*lines, f"- **The audit log does not hold**: {_text(str(error))}"]
    return [
        *lines,
        f"- Audit log, last hash: `{verdict.head}` ({verdict.entries} entries; each follows from the one before).",
        "  Who can write that file could have written it anew: compare with a hash that was noted elsewhere",
        "  (`molehill audit verify --head`).",
    ]


# ---- words -------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """Words of others, without what Markdown or HTML would make of them."""
    return _MARKS.sub(r"\\\1", clean(value)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in words: ``1-3, 5``; a dash for none."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "-"


def _joined(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"
