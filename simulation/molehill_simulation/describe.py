"""What a configuration comes to, before anything runs: the rows of `molehill check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, Self

from molehill.config import Config, MethodRef, MoLoRA
from molehill.errors import ConfigError
from molehill.molora.model import MoLoRAModel
from molehill.plan import scope_of
from molehill.secure.company import needed
from molehill.tasks.adapted import Adapted, open_model
from molehill.tasks.base_model import is_here
from molehill.tasks.batches import IGNORE
from molehill.tasks.devices import remark as remark_of
from molehill.tasks.kind import kind_of
from molehill.tasks.lengths import Examples, Lengths, together
from molehill.tasks.rows import DOMAIN, GROUP, STRATUM, TASK, Rows
from molehill.tasks.schema import class_counts, columns_of, load_rows
from molehill.tasks.sources import is_local
from molehill.tasks.units import set_aside
from molehill.wire.tree import Layout
from molehill.words import counted
from molehill_server.planning.planner import scopes, select, trained
from molehill_server.privacy.accountant import Accountant
from molehill_server.privacy.draw import Draw
from molehill_simulation import experts
from molehill_simulation.census import ClientFacts, census, lacking
from molehill_simulation.data import ClientRows, deal, names_of
from molehill_simulation.engine import machine_of
from molehill_simulation.memory import Memory, memory
from molehill_simulation.probe import Estimate, estimate
from molehill_simulation.summary import Machine
from molehill_simulation.text import clean, megabytes
from molehill_simulation.traffic import Traffic, traffic


@dataclass
class Description:
    """What a configuration comes to.

    Attributes:
        plan: Labelled facts, in the order in which people read them.
        warnings: What the user should know of.
        clients: What every client has; empty where the rows are not on this machine.
        parameters: How many numbers a client trains and keeps; None where the base is not on this machine.
        traffic: How many bytes the run sends; None where the base is not on this machine, and of what cannot run.
        memory: What it takes; None where base or rows are not on this machine, and of what cannot run.
        time: How long it takes; None as well where nobody asked.
    """

    plan: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    clients: list[ClientFacts] = field(default_factory=list)
    parameters: Parameters | None = None
    traffic: Traffic | None = None
    memory: Memory | None = None
    time: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a JSON document."""
        found: dict[str, Any] = {"plan": dict(self.plan), "clients": [client.as_dict() for client in self.clients]}
        if self.parameters is not None:
            found["parameters"] = self.parameters._asdict()
        if self.traffic is not None:
            found["bytes"] = self.traffic.as_dict()
        if self.memory is not None:
            found["memory"] = self.memory.as_dict()
        if self.time is not None:
            found["time"] = self.time.as_dict()
        return found


class Parameters(NamedTuple):
    """Numbers of one client, at the highest rank.

    Attributes:
        trained: In the rounds, by `molehill_server.planning.planner.trained`.
        unsent: Of these, the ones that never leave the client.
        residual: Fitted after the rounds; they never leave the client either.
        frozen: Of the adapter, and stay as they were sent.
    """

    trained: int
    unsent: int
    residual: int
    frozen: int

    @classmethod
    def of(cls, config: Config, layout: Layout) -> Self:
        """Those of a model, by its layout."""
        learnt, last = trained(config, layout), min(2, config.run.rounds)
        every = [scopes(config, number) for number in range(1, last + 1)]
        unsent = learnt.where(lambda key: all(scope_of(each, key) != "shared" for each in every))
        fitted = layout.where(lambda key: key.residual and scope_of(every[-1], key) == "personal")
        rest = layout.where(lambda key: not key.residual).size
        return cls(learnt.size, unsent.size, fitted.size, rest - learnt.size)

    @property
    def words(self) -> str:
        """In a line."""
        parts = [f"{self.trained:,} trained per client ({megabytes(4 * self.trained)} as fp32)"]
        parts += [f"{self.unsent:,} of them never sent"] if self.unsent else []
        parts += [f"and {self.residual:,} that stay with each"] if self.residual else []
        parts += [f"{self.frozen:,} frozen"] if self.frozen else []
        return ", ".join(parts)


def describe(config: Config, *, sound: bool = True, probe: int = 0) -> Description:
    """The plan of a run.

    A base model that is on this machine is loaded and wrapped, which finds targets that match nothing and counts
    what will be trained; rows that are on this machine are read and dealt. Nothing is downloaded for that.

    Args:
        config: A configuration.
        sound: Whether it could run; of what could not, less is worked out.
        probe: Steps that are trained to tell how long it takes; 0 for none.

    Raises:
        DataError: The rows cannot be read or dealt.
        ModelError: The base cannot be loaded, or the targets do not fit it.
        ConfigError: The parts of the adapter do not fit each other, or steps are to be trained without base or rows.
        TrainingError: They cannot be trained.
    """
    seen = _look(config)
    if probe and sound and seen.examples is None:
        what = "steps can be trained only where base and rows are, and one of them is not on this machine"
        raise ConfigError(what, where="--probe", mend="Leave it out, or fetch them first.")
    config, adapted = seen.config, seen.adapted
    found = Description(clients=census(seen.owners or (), config.task, seen.examples))
    found.plan = _plan(config, adapted, seen.owners, _of_rows(seen, found.clients))
    if adapted is not None:
        _describe_model(found, config, adapted)
    machine = None
    if adapted is not None and seen.examples is not None:
        found.warnings += _unasked(config, seen.examples)
        machine = machine_of(config, adapted.model, adapted.kernels, _lengths(seen.examples), len(seen.examples))
        company = f"{counted(machine.together, 'client')} in the same passes"
        found.plan.append(("engine", f"{counted(machine.workers, 'process')}, at most {company} ({machine.why})"))
    if adapted is not None and sound:
        _describe_traffic(found, config, adapted)
        if machine is not None:
            _describe_machine(found, seen, adapted, machine, probe)
    unseen = ["other machines and the network between them"]
    if found.time is None:
        unseen.append("time (--probe 3 trains some steps)")
    found.plan.append(("not looked at", ", ".join(unseen)))
    found.warnings += _unseen(config, base=adapted is not None, rows=seen.owners is not None)
    return found


@dataclass(frozen=True)
class _Seen:
    """What of a run is on this machine; None what is not.

    Attributes:
        config: The run, with the task's labels where they are known.
        rows: All rows.
        owners: The same, dealt.
        adapted: The base with its adapter.
        examples: The rows of every owner encoded, to train on and held out.
    """

    config: Config
    rows: Rows | None
    owners: list[ClientRows] | None
    adapted: Adapted | None
    examples: list[tuple[Examples, Examples]] | None

    @property
    def to_train(self) -> list[tuple[str, Examples]]:
        """Names of the owners with their encoded training rows; empty where there are none."""
        both = zip(self.owners or (), self.examples or (), strict=False)
        return [(owner.name, train) for owner, (train, _) in both]


def _look(config: Config) -> _Seen:
    rows = owners = adapted = examples = None
    if is_local(config.data.source):
        rows, task = load_rows(config.data, config.task)
        owners = deal(config.data, rows, config.run.seed, config.evaluate.split)
        config = config.model_copy(update={"task": task})
    if is_here(config.base):
        adapted = open_model(config, offline=True)
        if owners is not None:
            examples = [(adapted.task.encode(owner.train), adapted.task.encode(owner.test)) for owner in owners]
    return _Seen(config, rows, owners, adapted, examples)


def _of_rows(seen: _Seen, clients: Sequence[ClientFacts]) -> list[tuple[str, str]]:
    """Facts about the rows that are here."""
    if seen.rows is None or seen.owners is None:
        return []
    about = _about(seen.rows, seen.config)
    about += _set_aside(seen.rows, seen.config)
    names = [f"{clean(name, 60)} is {clean(owner, 60)!r}" for name, owner in names_of(seen.owners).items()]
    about += [("names", "; ".join(names))] if names else []
    absent = lacking(clients)
    about += (
        [("lacking", f"{absent} have no {'entity' if kind_of(seen.config.task).spans else 'row'}")] if absent else []
    )
    return about + ([] if seen.examples is None else _in_words(_lengths(seen.examples)))


def _describe_model(found: Description, config: Config, adapted: Adapted) -> None:
    """What is trained, and what of the base is worth knowing."""
    model = adapted.model
    found.parameters = Parameters.of(config, model.layout)
    head = ", head apart" if kind_of(config.task).missing(config.task) else ""
    at = [label for label, _ in found.plan].index("experts") + 1
    found.plan.insert(at, ("parameters", f"{found.parameters.words}{head}"))
    found.warnings += [f"molora.targets: {remark}" for remark in model.remarks]
    settings: Any = model.base.config
    known = remark_of(settings.get_text_config(), writes=kind_of(config.task).writes)
    found.warnings += [f"base.model: {known}"] if known else []


def _describe_traffic(found: Description, config: Config, adapted: Adapted) -> None:
    """What is sent."""
    named = [(client.client, client.rows) for client in found.clients]
    found.traffic = traffic(config, adapted.model, adapted.base.digest, named)
    found.plan += found.traffic.words
    if found.traffic.largest > config.wire.max_bytes:
        large = f"{megabytes(found.traffic.largest)} are sent at once, more than {config.wire.max_bytes:,} bytes"
        found.warnings.append(f"wire.max_bytes: {large}; the run would stop")


def _describe_machine(found: Description, seen: _Seen, adapted: Adapted, machine: Machine, probe: int) -> None:
    """What a run takes of this machine."""
    config, to_train = seen.config, seen.to_train
    found.memory = memory(config, adapted, machine, to_train)
    found.plan += found.memory.words
    if found.memory.short:
        found.warnings.append("engine.workers: a run takes more memory than this machine has")
    if probe:
        held_out = [len(test) for _, test in seen.examples or ()]
        found.time = estimate(config, adapted, machine, to_train, held_out, probe)
        found.plan += found.time.words


def _plan(
    config: Config, adapted: Adapted | None, owners: Sequence[ClientRows] | None, about: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """What the configuration says, in words; ``about`` is of the rows."""
    data, molora, train, federation = config.data, config.molora, config.train, config.federation
    model = None if adapted is None else adapted.model
    computed = f"{config.base.precision} on {config.base.device}"
    if adapted is not None:
        kernels = adapted.kernels
        by = f"float32 products by {kernels.products}, attention by {kernels.attention}"
        computed = f"{kernels.precision} on {adapted.model.flat.device}, {by}"
    batch = train.batch_size * train.accumulation
    plain = molora.experts == 1 and not molora.shared if model is None else not model.routers
    targets = molora.targets if isinstance(molora.targets, str) else ", ".join(molora.targets)
    rows = [
        ("run", f"{config.run.name}: {counted(config.run.rounds, 'round')}, seed {config.run.seed}"),
        ("base", f"{config.base.model}, {computed}"),
        ("task", f"{config.task.kind}, inputs of at most {config.task.max_length} tokens"),
        (
            "data",
            f"{data.source} dealt to {counted(data.clients, 'client')}, {_show(data.partition)}{_rows(owners, config)}",
        ),
        *about,
        ("experts", f"{_experts(molora, model)} on {targets}"),
        ("router", "none" if plain else f"{_show(molora.scorer)}, {_show(molora.selector)}, one per {molora.scope}"),
        ("personal", _personal(config, plain=plain)),
        ("training", f"{counted(train.steps, 'step')} of {counted(batch, 'row')}, lr {train.lr:g}"),
        ("federation", f"{_show(federation.policy)}: {_merge(config)}"),
        ("wire", f"{_show(config.wire.up)} up, {_show(config.wire.down)} down"),
    ]
    privacy = config.privacy
    if privacy.clip is not None:
        budget = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
        rows.append(("privacy", f"{budget}, changes clipped to {privacy.clip:g}, noise {privacy.noise:g}"))
        rows += _spent(config)
    if privacy.secure_aggregation:
        rows.append(("masked", f"the server sees sums only, of {needed(config)} clients or more"))
    return rows


def _personal(config: Config, *, plain: bool) -> str:
    """What every client has of its own, of what there is."""
    has = {"gate": not plain, "head": kind_of(config.task).head is not None}
    return ", ".join(f"{part} {getattr(config.personal, part)}" for part, there in has.items() if there) or "nothing"


def _unseen(config: Config, *, base: bool, rows: bool) -> list[str]:
    """What was not looked at, since it is elsewhere."""
    found = []
    if not base:
        what = "targets, parameters, lengths of rows and how many clients share a pass were not looked at"
        found.append(f"base.model: {config.base.model} is not on this machine; {what}")
    if not rows:
        found.append(f"data.source: {config.data.source} is not on this machine; its rows were not looked at")
    return found


def _spent(config: Config) -> Iterator[tuple[str, str]]:
    """What all rounds cost, and why."""
    accountant, draw, clients = Accountant.of(config), Draw.of(config), config.data.clients
    if accountant is None:
        return
    asked = len(select(config, [str(number) for number in range(clients)], 1, 0))
    each = draw.spent(clients, asked)
    how = "no draw is counted"
    if each.rate is not None:
        how = f"each client is drawn with probability {each.rate:g}"
    elif each.sample < each.population:
        how = f"{each.sample} of {each.population} clients are drawn"
    epsilon, rounds = accountant.epsilon([each] * config.run.rounds), counted(config.run.rounds, "round")
    yield "spends", f"epsilon {epsilon:.3g} in {rounds}; {how}"


def _about(rows: Rows, config: Config) -> list[tuple[str, str]]:
    """Classes with their counts, and columns that nothing reads."""
    about = []
    counts = class_counts(rows, config.task)
    if counts:
        about.append(("classes", ", ".join(f"{clean(name, 60)} {count}" for name, count in counts.items())))
    ours = kind_of(config.task).reads(rows.columns)
    read = {*columns_of(config.data, config.task, rows.columns), GROUP, STRATUM, TASK, DOMAIN, *ours}
    read |= {str(value) for key, value in config.data.partition.params.items() if key == "column"}
    filled = [each for each in ours if each in rows.columns and any(value not in ("", None) for value in rows[each])]
    about.append(("reads", " and ".join(repr(clean(config.data.columns.get(name, name), 40)) for name in filled)))
    unread = [name for name in rows.columns if name not in read]
    if unread:
        about.append(("unread", f"{', '.join(clean(name, 40) for name in unread)} (columns that nothing reads)"))
    return about


def _set_aside(rows: Rows, config: Config) -> list[tuple[str, str]]:
    """What no run trains on or tests with."""
    fraction = config.data.validation_fraction
    if not fraction:
        return []
    count, scored = sum(set_aside(rows, fraction)), config.evaluate.split == "validation"
    use = "all figures are about them" if scored else 'evaluate.split = "validation" looks at them'
    return [("validation", f"{counted(count, 'row')} of {len(rows)} set aside, whatever the seed; {use}")]


def _unasked(config: Config, examples: Sequence[tuple[Examples, Examples]]) -> list[str]:
    """That there is nothing to answer where all of all rows is learnt."""
    if not config.evaluate.generate or any(
        IGNORE in row.labels for both in examples for part in both for row in part if isinstance(row.labels, list)
    ):
        return []
    return ["evaluate.generate: the rows are plain text, which asks nothing, so nothing is answered"]


def _lengths(examples: Sequence[tuple[Examples, Examples]]) -> Lengths:
    return together([part.lengths for both in examples for part in both])


def _in_words(lengths: Lengths) -> list[tuple[str, str]]:
    """How long the rows are, and what is cut."""
    found = [("tokens", f"of a row: {lengths.quantiles}")]
    if lengths.loss:
        found.append(("cut", lengths.loss))
    if lengths.enough:
        found.append(("enough", lengths.enough))
    return found


def _rows(owners: Sequence[ClientRows] | None, config: Config) -> str:
    if owners is None:
        return ""
    train, test = (
        experts.spread(len(part) for part in parts) for parts in zip(*((o.train, o.test) for o in owners), strict=True)
    )
    use = "for validation" if config.evaluate.split == "validation" else "held out"
    return f": {train} rows each to train on, {test} {use}"


def _experts(molora: MoLoRA, model: MoLoRAModel | None) -> str:
    """The experts that the sites have, as a range where they differ; what is planned where there is no base to see."""
    if model is None:
        allocation = "" if molora.allocation == type(molora)().allocation else _show(molora.allocation)
        return experts.planned(molora.expert.name, molora.experts, molora.shared, molora.rank, allocation)
    sites = model.sites.values()
    some: list[experts.Some] = []
    for what, groups in (
        ("routed", [site.bank.ranks[site.shared :] for site in sites]),
        ("always-on", [site.bank.ranks[: site.shared] for site in sites]),
    ):
        present = [ranks for ranks in groups if ranks]
        some.append((what, map(len, present), chain(*present)))
    bank, lone = next(iter(sites)).bank, not model.routers and not any(site.shared for site in sites)
    return experts.in_words(bank.noun, bank.size, some, lone=lone)


def _merge(config: Config) -> str:
    federation, usual = config.federation, type(config.federation)()
    parts = [("space", federation.space), ("rule", federation.rule)]
    parts += [("lower", federation.lower)] if federation.lower != usual.lower else []
    parts += [("server optimiser", federation.server_opt)] if federation.server_opt != usual.server_opt else []
    return ", ".join(f"{label} {_show(ref)}" for label, ref in parts)


def _show(ref: MethodRef) -> str:
    params = ", ".join(f"{key}={value}" for key, value in ref.params.items())
    return f"{ref.name}({params})" if params else ref.name
