"""What a run came to: `summary.json`, built from the run's events.

Every event is one JSON object of `metrics.jsonl` (see `docs/reference/run-folder.md`). A resumed run may hold the same
round twice; the later event counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from molehill.config import Split
from molehill.errors import DataError
from molehill.tasks.kind import kind_of
from molehill.tasks.lengths import loss_in_words
from molehill.tasks.measures import LOSS, OF_ANSWERS, Measure
from molehill.words import counted
from molehill_simulation.few import spread
from molehill_simulation.figures import (
    STAGES,
    ClientFigures,
    Confusion,
    Figures,
    Found,
    Gain,
    Gains,
    Recall,
    Spread,
    TypeF1,
    average,
    complete,
    quantile,
    worst,
)
from molehill_simulation.text import by_name, clean, natural

Event: TypeAlias = Mapping[str, Any]

_NAMED = 5  # clients that are named in a sentence

_LATEST = ("answers", "gains", "tokens", "probes", "chosen")  # of an evaluation, what a later one does not take away

_QUANTILES = {"10%": 0.1, "25%": 0.25, "median": 0.5, "75%": 0.75, "90%": 0.9}


class BaseModelInfo(BaseModel):
    """Which base model: by id, revision and weight digest, never by path alone.

    Attributes:
        id: Hub id, ``sample:`` name or the name of a local folder.
        revision: Commit of a hub model; None for others.
        digest: SHA-256 (hex) of its configuration and weights.
        remarks: What of its layers is not adapted though the targets name it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    revision: str | None = None
    digest: str
    remarks: tuple[str, ...] = ()


class Machine(BaseModel):
    """How one machine computed all clients; other choices give the same figures but for rounding.

    Attributes:
        precision: Type of the frozen weights and of what they compute, ``fp32`` or ``bf16``.
        products: What multiplied float32 matrices, ``mkl`` or ``onednn``.
        attention: Whose it was, ``torch`` or ours, by ``products`` of matrices.
        workers: Processes.
        together: Most clients in the same passes.
        why: What was measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: str
    products: str
    attention: str
    workers: int
    together: int
    why: str


class Summary(BaseModel):
    """The content of `summary.json`.

    Attributes:
        task: What is learnt; the accuracy of a causal LM is over answer tokens, each given the right ones before it.
        clients: Every client that was there to be scored, sorted by id.
        mean: Unweighted mean over the clients that have a figure for every stage that was run, so that stages compare.
        worst: Lowest of these clients, stage by stage.
        token_accuracy: ``mean`` and ``worst`` of a causal LM by their name, or of words; None for a classification.
        macro_f1: The same two of macro-F1; None for a causal LM.
        loss: The same two of the mean cross-entropy in nats.
        perplexity: The same two of the perplexity per answer token; None for a classification.
        exact_match: The same two of the answers that the final models wrote (``evaluate.generate``), as the next three:
            share of those that are the right one.
        normalised_match: Share of those that are so without regard to case, punctuation and English articles.
        rouge_l: Mean ROUGE-L, in [0, 1].
        chrf: Mean chrF2, in [0, 1].
        figures: The same two of what else the task measures, by name.
        classes: Rows of every class, or entities of every type, to train on and held out, by client; empty where the
            rows are not here, as in a deployment, or have no classes.
        confusion: Which class is taken for which by the final models; None where the rows are not here, or have no
            classes.
        recall: Recall of every class, over all clients; empty where that is not known.
        type_f1: F1 of every type of entities, over all clients; empty where none are looked for.
        gains: By measure how much better the personalised models are than those trained alone, on the same held-out
            rows; over the clients that told. Empty where there were no baselines.
        lengths: How many tokens the rows have before they are cut, in words; empty where the rows are not here.
        probes: Figures of ``evaluate.probes`` over the held-out rows of all clients, by name and ``site/figure``.
        rounds: Rounds completed.
        seconds: Wall time of the run; of a resumed run at least that of all its rounds.
        bytes_up: Encoded deltas, all clients and rounds.
        bytes_down: Blobs fetched, all clients and rounds.
        base_model: The base.
        config_digest: SHA-256 (hex) of the resolved configuration.
        unscored: The clients of the run that ``mean`` and ``worst`` are not over, with the reason.
        anew: The clients whose personal state was gone in the course of the run, so that they started anew.
        remembered: How many clients' baselines are those of an earlier run on the machine of a simulation.
        machine: How the machine of a simulation computed it; None of a deployment.
        split: Which held-out rows all figures are about.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str = "classification"
    clients: tuple[ClientFigures, ...]
    mean: Figures
    worst: Figures
    token_accuracy: Spread | None = None
    macro_f1: Spread | None = None
    loss: Spread | None = None
    perplexity: Spread | None = None
    exact_match: Spread | None = None
    normalised_match: Spread | None = None
    rouge_l: Spread | None = None
    chrf: Spread | None = None
    figures: dict[str, Spread] = Field(default_factory=dict)
    classes: dict[str, dict[str, tuple[int, int]]] = Field(default_factory=dict)
    confusion: Confusion | None = None
    recall: dict[str, Recall] = Field(default_factory=dict)
    type_f1: dict[str, TypeF1] = Field(default_factory=dict)
    gains: dict[str, Gains] = Field(default_factory=dict)
    lengths: str = ""
    probes: dict[str, dict[str, float]] = Field(default_factory=dict)
    rounds: int
    seconds: float
    bytes_up: int
    bytes_down: int
    base_model: BaseModelInfo
    config_digest: str
    unscored: dict[str, str] = Field(default_factory=dict)
    anew: tuple[str, ...] = ()
    remembered: int = 0
    machine: Machine | None = None
    split: Split = "test"

    @property
    def scored(self) -> str:
        """What the rows are called that the figures are about, in front of the word."""
        return "held-out" if self.split == "test" else self.split

    @property
    def caveats(self) -> list[str]:
        """What must be said beside the figures, one sentence each."""
        said = []
        if self.split != "test":
            said.append(f"all figures are of the {self.split} rows, to choose settings by, and not of the test rows")
        if self.unscored:
            done = len(self.complete)
            why = [f"{clean(client, 40)}: {clean(reason)}" for client, reason in self.unscored.items()]
            more = [f"and {len(why) - _NAMED} more"] if len(why) > _NAMED else []
            counts = f"mean and worst are over the {done} of {done + len(why)} clients that have all figures"
            said.append(f"{counts}; {'; '.join([*why[:_NAMED], *more])}")
        if self.anew:
            more = [f"and {len(self.anew) - _NAMED} more"] if len(self.anew) > _NAMED else []
            names = ", ".join([*(clean(client, 40) for client in self.anew[:_NAMED]), *more])
            said.append(f"personal state was lost and begun anew, so the figures are not what they would be: {names}")
        if self.remembered:
            of = f"of {self.remembered} of {len(self.clients)} clients"
            said.append(
                f'baselines {of} are those of an earlier run here; evaluate.baselines = "anew" trains them again'
            )
        return said

    @property
    def measure(self) -> Measure:
        """What a run is judged by."""
        return kind_of(self.task).measures[0]

    @property
    def by_class(self) -> Mapping[str, Recall | TypeF1]:
        """How well every class is found over all clients: its recall, or the F1 of its entities."""
        return self.type_f1 or self.recall

    @property
    def spans(self) -> bool:
        """Whether classes are of entities in the rows, and not of rows."""
        return kind_of(self.task).spans

    @property
    def longest(self) -> float:
        """What a bar of full length stands for: the most that the first measure can be, or else the most that it is."""
        every = [value for client in self.clients for value in client.row if value is not None]
        every += [ends[1] for client in self.clients for ends in client.interval.values()]
        return self.measure.most or max(every, default=1.0) or 1.0

    @property
    def columns(self) -> tuple[Measure, ...]:
        """What tables show, that by which a run is judged first; a summary of an older version has not all of it."""
        first, *others = kind_of(self.task).measures
        return (first, *(each for each in others if each.tabled and any(c.of(each) for c in self.clients)))

    @property
    def of_answers(self) -> tuple[Measure, ...]:
        """What was measured of answers that were written; empty where none were."""
        return tuple(
            each
            for each in kind_of(self.task).measures
            if each.name in OF_ANSWERS and getattr(self, each.name) is not None
        )

    @property
    def gained(self) -> tuple[Measure, ...]:
        """By what tables tell the gain over alone: two measures at most, that by which a run is judged first."""
        return tuple(each for each in kind_of(self.task).measures if each.name in self.gains)[:2]

    def cells(self, client: ClientFigures) -> tuple[Figures, ...]:
        """The figures of a client in the order of the columns."""
        return (client, *(client.of(each) or Figures() for each in self.columns[1:]))

    @property
    def means(self) -> tuple[Figures, ...]:
        """The means in the order of the columns."""
        return (self.mean, *(each.mean for each in self._spreads))

    @property
    def worsts(self) -> tuple[Figures, ...]:
        """The worst figures in the order of the columns."""
        return (self.worst, *(each.worst for each in self._spreads))

    @property
    def _spreads(self) -> list[Spread]:
        none = Spread(mean=Figures(), worst=Figures())
        return [getattr(self, each.name, None) or self.figures.get(each.name, none) for each in self.columns[1:]]

    @property
    def complete(self) -> tuple[ClientFigures, ...]:
        """The clients that ``mean`` and ``worst`` are over."""
        return complete(self.clients)

    @property
    def shown(self) -> tuple[ClientFigures, ...]:
        """The clients that tables name: all, or of very many so many from the worst to the best by their last stage."""
        sign = -1.0 if self.measure.lower else 1.0
        by_figure = sorted(self.clients, key=lambda client: (client.last is None, sign * (client.last or 0.0)))
        named = {client.id for client in spread(by_figure)}
        return tuple(client for client in self.clients if client.id in named)

    @property
    def told_shown(self) -> str:
        """What of the clients tables name, in a sentence; empty when it is all."""
        named, every = len(self.shown), len(self.clients)
        if named == every:
            return ""
        return (
            f"{named} of {every:,} clients are shown, at equal distances from the worst to the best; "
            "means, worst and quantiles are over all"
        )

    @property
    def quantiles(self) -> tuple[tuple[str, tuple[Figures, ...]], ...]:
        """What a part of the clients stays below, column by column and stage by stage; by name."""
        columns = list(zip(*(self.cells(client) for client in self.complete), strict=True))
        return tuple((name, tuple(quantile(part, column) for column in columns)) for name, part in _QUANTILES.items())

    @property
    def told_losses(self) -> str:
        """The mean losses in words, each with its interval; empty where none is known."""
        mean = Figures() if self.loss is None else self.loss.mean
        measured = zip(STAGES, mean.row, strict=True)
        return ", ".join(f"{stage} {mean.told(stage, LOSS)}" for stage, value in measured if value is not None)

    @property
    def told_chosen(self) -> str:
        """What the clients made of the final model, in words; empty where there was no choice, or none was told."""
        counts = Counter(client.chosen for client in self.clients if client.chosen)
        told = ", ".join(f"{clean(name, 40)} by {number}" for name, number in counts.most_common())
        return f"made of the final model: {told} of {counted(len(self.clients), 'client')}" if told else ""

    @property
    def told_cut(self) -> str:
        """What of the rows was cut off or not learnt, in sentences; empty when it was nothing."""
        cut, lost, unlearnt = (sum(getattr(c, name) for c in self.clients) for name in ("cut", "lost", "unlearnt"))
        rows = sum(client.n_train + client.aside + client.n_test for client in self.clients) + lost
        return loss_in_words(cut, lost, rows, unlearnt)

    def to_json(self) -> str:
        """The summary as indented JSON with the names of the format."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def rounds_of(events: Iterable[Event]) -> list[Event]:
    """The round events in order of round, the last one of each round."""
    latest = {event["round"]: event for event in events if event["event"] == "round"}
    return [latest[number] for number in sorted(latest)]


def evaluations_of(events: Iterable[Event]) -> dict[str, dict[str, Any]]:
    """The evaluation of every client by id, sorted; stages from several events are merged, later ones winning."""
    merged: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "evaluation":
            known = merged.setdefault(event["client"], {"stages": {}, **{key: {} for key in _LATEST}})
            stages = {**known["stages"], **event["stages"]}
            latest = {key: event.get(key) or known[key] for key in _LATEST}
            merged[event["client"]] = {**event, "stages": stages, **latest}
    return dict(by_name(merged))


def summarise(
    events: Iterable[Event],
    base_model: BaseModelInfo,
    config_digest: str,
    task: str = "classification",
    classes: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
    lengths: str = "",
    probes: Mapping[str, dict[str, float]] | None = None,
    confusions: Mapping[str, Confusion] | None = None,
    found: Mapping[str, Found] | None = None,
) -> Summary:
    """Build the summary of a run.

    Args:
        events: The run's events.
        base_model: The base.
        config_digest: Digest of the resolved configuration.
        task: What is learnt.
        classes: Rows of every class to train on and held out, by client, where they are known.
        lengths: How many tokens the rows have, where they are known.
        probes: Figures of the run's probes.
        confusions: Which class is taken for which, by client, where that is known.
        found: Which entities are found, by client, where that is known.

    Returns:
        The summary.
    """
    events, confusions, found = list(events), confusions or {}, found or {}
    rounds = rounds_of(events)
    confusion = Confusion.over(confusions.values()) if confusions else None
    measures = kind_of(task).measures
    first, named = measures[0], [measure for measure in measures if measure.name in ClientFigures.model_fields]
    others = [measure for measure in measures if measure not in named]
    clients = tuple(
        ClientFigures(
            id=client,
            n_train=evaluation["n_train"],
            n_test=evaluation["n_test"],
            cut=evaluation.get("cut", 0),
            lost=evaluation.get("lost", 0),
            unlearnt=evaluation.get("unlearnt", 0),
            aside=evaluation.get("aside", 0),
            chosen=evaluation["chosen"] or "",
            recall=confusions[client].recall if client in confusions else {},
            type_f1=found[client].f1 if client in found else {},
            answered=max((said["n"] for said in evaluation["answers"].values()), default=0),
            **{measure.name: _figures(measure, evaluation) for measure in named},
            figures={each.name: told for each in others if (told := _figures(each, evaluation)) is not None},
            gains={name: Gain.model_validate(gain) for name, gain in evaluation["gains"].items()},
            **_values(first, evaluation),
        )
        for client, evaluation in evaluations_of(events).items()
    )
    scored = complete(clients)
    reasons = {event["client"]: event["reason"] for event in events if event["event"] == "failed"}
    known = {client.id for client in scored}
    expected = sorted({client.id for client in clients} | joined(events), key=natural)
    ends = [event["seconds"] for event in events if event["event"] == "end"]
    return Summary(
        task=task,
        clients=clients,
        mean=average(first, scored),
        worst=worst(first, scored),
        **{measure.name: _spread(measure, scored) for measure in named},
        figures={each.name: both for each in others if (both := _spread(each, scored)) is not None},
        classes={client: dict(counts) for client, counts in by_name(classes or {})},
        confusion=confusion,
        recall={} if confusion is None else confusion.recall,
        type_f1=Found.over(found.values()).f1,
        gains={each.name: Gains.over(gains) for each in measures if (gains := _gains(each, clients))},
        lengths=lengths,
        probes=dict(probes or {}),
        rounds=len(rounds),
        seconds=max([*ends, sum(event["seconds"] for event in rounds)]),
        bytes_up=sum(event["bytes_up"] for event in rounds),
        bytes_down=sum(event["bytes_down"] for event in rounds),
        base_model=base_model,
        config_digest=config_digest,
        unscored={c: reasons.get(c, "it has not all figures") for c in expected if c not in known},
        anew=tuple(sorted({event["client"] for event in events if event["event"] == "anew"}, key=natural)),
        remembered=sum(bool(part.get("remembered")) for part in evaluations_of(events).values()),
    )


def joined(events: Iterable[Event]) -> set[str]:
    """Every client that ever took part."""
    events = list(events)
    began = {client for event in events if event["event"] in {"start", "resume"} for client in event["clients"]}
    return began | {event["client"] for event in events if event["event"] == "joined"}


def read_summary(path: Path) -> Summary:
    """Read `summary.json`.

    Raises:
        DataError: The file cannot be read or is not a summary.
    """
    try:
        return Summary.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the summary: {error.strerror}", where=str(path)) from None
    except ValueError:
        raise DataError("not the summary of a run", where=str(path), mend="Was the file edited?") from None


def _values(measure: Measure, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A measure and its interval by stage, as `Figures` have them."""
    said: dict[str, Mapping[str, Any]] = evaluation["answers"]
    stages = {stage: {**scores, "answers": said.get(stage)} for stage, scores in evaluation["stages"].items()}
    interval = {stage: found for stage, scores in stages.items() if (found := measure.within(scores)) is not None}
    return {**{stage: measure.of(scores) for stage, scores in stages.items()}, "interval": interval}


def _figures(measure: Measure, evaluation: Mapping[str, Any]) -> Figures | None:
    found = Figures.model_validate(_values(measure, evaluation))
    return None if found.last is None else found


def _gains(measure: Measure, clients: Iterable[ClientFigures]) -> dict[str, Gain]:
    return {client.id: client.gains[measure.name] for client in clients if measure.name in client.gains}


def _spread(measure: Measure, clients: Iterable[ClientFigures]) -> Spread | None:
    rows = [figures for client in clients if (figures := client.of(measure)) is not None]
    return Spread(mean=average(measure, rows), worst=worst(measure, rows)) if rows else None
