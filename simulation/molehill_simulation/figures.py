"""Figures of models by stage, those of clients, and what many of them come to together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from molehill.intervals import Interval, of_average, of_share
from molehill.tasks.measures import Measure

STAGES = ("base", "local", "global", "personalised")


class Figures(BaseModel):
    """One measure by stage, each on held-out rows; None for a stage that was not run.

    Attributes:
        base: Frozen base with only a head trained on the client.
        local: The same MoLoRA trained on the client alone.
        global_: The federated model (``global`` in JSON).
        personalised: The federated model with the client's own gate and head.
        interval: By stage, the ends of what a figure is in with 95% confidence, were the held-out rows drawn anew and
            the models left as they are; empty where that is not known, as of runs of older versions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    base: float | None = None
    local: float | None = None
    global_: float | None = Field(default=None, alias="global")
    personalised: float | None = None
    interval: dict[str, Interval] = Field(default_factory=dict)

    @property
    def intervals(self) -> tuple[Interval | None, ...]:
        """The intervals in the order of `STAGES`."""
        return tuple(self.interval.get(stage) for stage in STAGES)

    @property
    def row(self) -> tuple[float | None, float | None, float | None, float | None]:
        """The figures in the order of `STAGES`."""
        return self.base, self.local, self.global_, self.personalised

    @property
    def last(self) -> float | None:
        """The figure of the last stage that was run."""
        return next((value for value in reversed(self.row) if value is not None), None)

    def told(self, stage: str, measure: Measure) -> str:
        """One of the figures with its interval, where that is known: ``0.573 (0.535 to 0.606)``."""
        value, ends = self.row[STAGES.index(stage)], self.interval.get(stage)
        return measure.write(value) + (f" ({' to '.join(map(measure.write, ends))})" if ends else "")

    def best(self, measure: Measure) -> float | None:
        """The best figure of a measure."""
        known = [value for value in self.row if value is not None]
        return measure.best(known) if known else None


class Gain(BaseModel):
    """How much better the personalised model is than the one trained alone, on the same held-out rows.

    Attributes:
        value: Above 0 where it is better, be that more or less of the measure.
        interval: Ends of what it is in with 95% confidence, were the held-out rows drawn anew; None where that is not
            known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    interval: Interval | None = None

    @property
    def sign(self) -> int:
        """1 for a gain and -1 for a loss of more than the interval; 0 for neither."""
        low, high = self.interval or (-math.inf, math.inf)
        return (low > 0) - (high < 0)

    def told(self, measure: Measure) -> str:
        """It with its interval: ``+0.021 (+0.003 to +0.039)``."""
        ends = f" ({' to '.join(signed(measure, end) for end in self.interval)})" if self.interval else ""
        return signed(measure, self.value) + ends


class Gains(BaseModel):
    """The gains of all clients that have one, by one measure.

    Attributes:
        mean: Unweighted mean; its interval is of these clients, whose rows are drawn anew.
        worst: The least.
        client: Whose that is.
        gained: Clients that gain more than their interval, so that none of it is at or below 0.
        lost: Clients that lose more than it.
        neither: The others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: Gain
    worst: Gain
    client: str
    gained: int
    lost: int
    neither: int

    @classmethod
    def over(cls, clients: Mapping[str, Gain]) -> Gains:
        """Of clients by id, at least one."""
        found = [*clients.values()]
        ends = [gain.interval for gain in found if gain.interval is not None]
        values = [gain.value for gain in found]
        within = of_average(values, ends) if len(ends) == len(found) else None
        worst = min(clients, key=lambda client: clients[client].value)
        signs = [gain.sign for gain in found]
        return cls(
            mean=Gain(value=_mean(values), interval=within),
            worst=clients[worst],
            client=worst,
            gained=signs.count(1),
            lost=signs.count(-1),
            neither=signs.count(0),
        )

    def told(self, measure: Measure) -> str:
        """All in words, without a name."""
        return f"{self.mean.told(measure)} in the mean and {self.worst.told(measure)} at worst; {self.counted}"

    @property
    def counted(self) -> str:
        """How many clients gain and lose, in words."""
        return f"{self.gained} gain and {self.lost} lose more than their interval, {self.neither} neither"


def signed(measure: Measure, value: float) -> str:
    """A difference as people read it, with its sign."""
    written = measure.write(abs(value))
    return written if value == 0 else f"{'+' if value > 0 else '-'}{written}"


class Recall(Figures):
    """Of one class, the share of its held-out rows that the final models take for it.

    Attributes:
        n: Held-out rows of the class.
    """

    n: int


class TypeF1(Figures):
    """F1 of the entities of one type by the final models.

    Attributes:
        n: Entities of the type in the held-out rows.
    """

    n: int


class ClientFigures(Figures):
    """One client's figures by the first measure of its task, such as the accuracy, and what goes with them.

    Attributes:
        id: The client.
        n_train: Its training rows that took part in the rounds.
        n_test: Its held-out rows.
        cut: Its rows, of both kinds, that are longer than ``task.max_length`` and lost their end.
        lost: Of these, rows that lost their whole answer and were left out.
        unlearnt: Its answers that are read and not learnt, since the chat template edits them once others follow.
        aside: Its training rows that the rounds never saw.
        chosen: Which of ``personal.candidates`` its personalised model is; empty where there was no choice.
        token_accuracy: The accuracies of a causal LM by their name, or of words; None for a classification.
        macro_f1: Unweighted mean F1 over classes; None for a causal LM.
        recall: Recall of every class that it has held-out rows of; empty where that is not known.
        type_f1: F1 of every type of entities that its held-out rows have; empty where none are looked for.
        loss: Mean cross-entropy in nats, of a row or of an answer token.
        perplexity: Exponential of the loss per answer token; None for a classification.
        answered: Held-out rows that the final models answered.
        exact_match: Share of these answers that are the right one; None where none were written, as the next three.
        normalised_match: Share that is so without regard to case, punctuation and English articles.
        rouge_l: Mean ROUGE-L, in [0, 1].
        chrf: Mean chrF2, in [0, 1].
        figures: What else its task measures, by name.
        gains: By measure how much better the personalised model is than the local one; empty where that is not known.
    """

    id: str
    n_train: int
    n_test: int
    cut: int = 0
    lost: int = 0
    unlearnt: int = 0
    aside: int = 0
    chosen: str = ""
    token_accuracy: Figures | None = None
    macro_f1: Figures | None = None
    recall: dict[str, Recall] = Field(default_factory=dict)
    type_f1: dict[str, TypeF1] = Field(default_factory=dict)
    loss: Figures | None = None
    perplexity: Figures | None = None
    answered: int = 0
    exact_match: Figures | None = None
    normalised_match: Figures | None = None
    rouge_l: Figures | None = None
    chrf: Figures | None = None
    figures: dict[str, Figures] = Field(default_factory=dict)
    gains: dict[str, Gain] = Field(default_factory=dict)

    def of(self, measure: Measure) -> Figures | None:
        """The figures by a measure; None where there are none."""
        found: Figures | None = getattr(self, measure.name, None) or self.figures.get(measure.name)
        return found


class Spread(BaseModel):
    """One measure over the clients that have a figure for every stage that was run.

    Attributes:
        mean: Unweighted mean; of perplexities the exponential of the mean loss.
        worst: Worst, stage by stage: the lowest, or the highest of what should be low.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: Figures
    worst: Figures


class Confusion(BaseModel):
    """Which class the final models take for which, over the held-out rows of one client or of all.

    Attributes:
        labels: Names of the classes.
        counts: By stage, how many rows of each class (row) were taken for each (column); where a row has any number of
            them, how many rows of each class were found (column 0) and missed (column 1).
        exclusive: Whether a row has one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: tuple[str, ...]
    counts: dict[str, tuple[tuple[int, ...], ...]]
    exclusive: bool = True

    @classmethod
    def of(
        cls, labels: Sequence[str], counts: Mapping[str, Sequence[Sequence[int]]], *, exclusive: bool = True
    ) -> Confusion:
        """Of one client.

        Args:
            labels: Names of the classes.
            counts: Its counts, by stage.
            exclusive: Whether a row has one of the classes.
        """
        return cls.model_validate({"labels": labels, "counts": counts, "exclusive": exclusive})

    @classmethod
    def over(cls, clients: Iterable[Confusion]) -> Confusion:
        """The sum over clients, at least one, which know the same classes."""
        clients = list(clients)
        labels, total = clients[0].labels, dict[str, list[list[int]]]()
        for each in clients:
            for stage, matrix in each.counts.items():
                known = total.setdefault(stage, [[0] * len(row) for row in matrix])
                total[stage] = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(known, matrix, strict=True)]
        return cls.of(labels, total, exclusive=clients[0].exclusive)

    @property
    def recall(self) -> dict[str, Recall]:
        """Recall of every class that has held-out rows."""
        found = {}
        for at, label in enumerate(self.labels):
            rows = {stage: counts[at] for stage, counts in self.counts.items()}
            n = max((sum(row) for row in rows.values()), default=0)
            if n:
                right = at if self.exclusive else 0
                shares = {stage: row[right] / sum(row) for stage, row in rows.items()}
                interval = {stage: of_share(share, n) for stage, share in shares.items()}
                found[label] = Recall.model_validate({"n": n, **shares, "interval": interval})
        return found


class Found(BaseModel):
    """What entities the final models find, in the held-out rows of one client or of all.

    Attributes:
        counts: By stage and type, how many are right, were found and are there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    counts: dict[str, dict[str, tuple[int, int, int]]]

    @classmethod
    def over(cls, clients: Iterable[Found]) -> Found:
        """The sum over clients."""
        total: dict[str, dict[str, tuple[int, int, int]]] = {}
        for each in clients:
            for stage, types in each.counts.items():
                known = total.setdefault(stage, {})
                for name, (right, found, there) in types.items():
                    a, b, c = known.get(name, (0, 0, 0))
                    known[name] = (a + right, b + found, c + there)
        return cls(counts=total)

    @property
    def f1(self) -> dict[str, TypeF1]:
        """F1 of every type that is there; it follows from what is right of all that are found or there, a share."""
        made: dict[str, TypeF1] = {}
        for name in dict.fromkeys(name for types in self.counts.values() for name in types):
            by_stage = {stage: types[name] for stage, types in self.counts.items() if name in types}
            n = max(there for _, _, there in by_stage.values())
            if not n:
                continue
            shares = {stage: (right, found + there - right) for stage, (right, found, there) in by_stage.items()}
            ends = {stage: of_share(right / every, every) for stage, (right, every) in shares.items()}
            made[name] = TypeF1.model_validate(
                {
                    "n": n,
                    **{stage: _f1(right / every) for stage, (right, every) in shares.items()},
                    "interval": {stage: (_f1(low), _f1(high)) for stage, (low, high) in ends.items()},
                }
            )
        return made


def _f1(share: float) -> float:
    """F1 of a share of what is found or there."""
    return 2 * share / (1 + share)


def complete(clients: tuple[ClientFigures, ...]) -> tuple[ClientFigures, ...]:
    """The clients that have every stage that any of them has."""
    run = {stage for client in clients for stage, value in zip(STAGES, client.row, strict=True) if value is not None}
    return tuple(
        client
        for client in clients
        if run and all(value is not None for stage, value in zip(STAGES, client.row, strict=True) if stage in run)
    )


def average(measure: Measure, rows: Sequence[Figures]) -> Figures:
    """The mean by stage, with its interval where all have one; of perplexities that of their logarithms, the losses."""
    there, back = (math.log, math.exp) if measure.logarithmic else (float, float)
    mean = _over(rows, lambda values: back(_mean([there(value) for value in values])))
    interval = {}
    for at, stage in enumerate(STAGES):
        known = [(row.row[at], row.intervals[at]) for row in rows]
        pairs = [(value, ends) for value, ends in known if value is not None and ends is not None]
        if pairs and len(pairs) == sum(value is not None for value, _ in known):
            values = [there(value) for value, _ in pairs]
            low, high = of_average(values, [(there(low), there(high)) for _, (low, high) in pairs])
            interval[stage] = (back(low), back(high))
    return mean.model_copy(update={"interval": interval})


def worst(measure: Measure, rows: Sequence[Figures]) -> Figures:
    """The worst by stage, with the interval of its client."""
    found, interval = _over(rows, measure.worst), {}
    for at, stage in enumerate(STAGES):
        ends = next((row.intervals[at] for row in rows if row.row[at] == found.row[at] is not None), None)
        if ends is not None:
            interval[stage] = ends
    return found.model_copy(update={"interval": interval})


def quantile(part: float, rows: Iterable[Figures]) -> Figures:
    """What a part of the figures stays below, stage by stage."""
    return _over(rows, lambda values: sorted(values)[round(part * (len(values) - 1))])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _over(rows: Iterable[Figures], fold: Callable[[list[float]], float]) -> Figures:
    columns = zip(STAGES, zip(*(figures.row for figures in rows), strict=True), strict=False)
    known = {stage: [value for value in values if value is not None] for stage, values in columns}
    return Figures.model_validate({stage: fold(values) for stage, values in known.items() if values})
