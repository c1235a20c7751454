"""What a configuration comes to, before anything runs: the rows of `molehill check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from molehill.config import Config, MethodRef, MoLoRA
from molehill.molora.model import MoLoRAModel
from molehill.secure.company import needed
from molehill.tasks.adapted import open_model
from molehill.tasks.base_model import is_here
from molehill.tasks.devices import remark as remark_of
from molehill.tasks.lengths import Lengths, together
from molehill.tasks.rows import GROUP, TASK, Rows
from molehill.tasks.schema import COLUMNS, class_counts, columns_of, load_rows
from molehill.tasks.sources import is_local
from molehill.tasks.task import Task
from molehill.words import counted
from molehill_server.planning.planner import select
from molehill_server.privacy.accountant import Accountant
from molehill_server.privacy.draw import Draw
from molehill_simulation import experts
from molehill_simulation.data import ClientRows, deal, names_of
from molehill_simulation.engine import machine_of
from molehill_simulation.text import clean, megabytes


def describe(config: Config) -> list[tuple[str, str]]:
    """The plan of a run as labelled facts.

    A base model that is on this machine is loaded and wrapped, which finds targets that match nothing and counts
    what will be trained; rows that are on this machine are read and dealt. Nothing is downloaded for that.

    Args:
        config: A configuration.

    Returns:
        ``(label, text)`` rows; what the user should know of is labelled ``warning``.

    Raises:
        DataError: The rows cannot be read or dealt.
        ModelError: The base cannot be loaded, or the targets do not fit it.
        ConfigError: The parts of the adapter do not fit each other.
    """
    data, molora, train, federation = config.data, config.molora, config.train, config.federation
    owners = None
    about: list[tuple[str, str]] = []
    if is_local(data.source):
        rows_read, task = load_rows(data, config.task)
        owners = deal(data, rows_read, config.run.seed)
        config = config.model_copy(update={"task": task})
        about = _about(rows_read, config)
        names = [f"{clean(name, 60)} is {clean(owner, 60)!r}" for name, owner in names_of(owners).items()]
        about += [("names", "; ".join(names))] if names else []
    model = engine = None
    computed = f"{config.base.precision} on {config.base.device}"
    if is_here(config.base):
        model, _, encode, kernels = open_model(config, offline=True)
        by = f"float32 products by {kernels.products}, attention by {kernels.attention}"
        computed = f"{kernels.precision} on {model.flat.device}, {by}"
        if owners is not None:
            lengths = _lengths(owners, encode)
            about += _in_words(lengths)
            engine = machine_of(config, model, kernels, lengths, len(owners))
    batch = train.batch_size * train.accumulation
    plain = molora.experts == 1 and not molora.shared if model is None else not model.routers
    targets = molora.targets if isinstance(molora.targets, str) else ", ".join(molora.targets)
    rows = [
        ("run", f"{config.run.name}: {counted(config.run.rounds, 'round')}, seed {config.run.seed}"),
        ("base", f"{config.base.model}, {computed}"),
        ("task", f"{config.task.kind}, inputs of at most {config.task.max_length} tokens"),
        ("data", f"{data.source} dealt to {counted(data.clients, 'client')}, {_show(data.partition)}{_rows(owners)}"),
        ("experts", f"{_experts(molora, model)} on {targets}"),
        ("router", "none" if plain else f"{_show(molora.scorer)}, {_show(molora.selector)}, one per {molora.scope}"),
        ("personal", f"gate {config.personal.gate}, head {config.personal.head}"),
        ("training", f"{counted(train.steps, 'step')} of {counted(batch, 'row')}, lr {train.lr:g}"),
        ("federation", f"{_show(federation.policy)}: {_merge(config)}"),
        ("wire", f"{_show(config.wire.up)} up, {_show(config.wire.down)} down"),
    ]
    at = [label for label, _ in rows].index("data") + 1
    rows[at:at] = about
    privacy = config.privacy
    if privacy.clip is not None:
        budget = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
        rows.append(("privacy", f"{budget}, changes clipped to {privacy.clip:g}, noise {privacy.noise:g}"))
        rows += _spent(config)
    if privacy.secure_aggregation:
        rows.append(("masked", f"the server sees sums only, of {needed(config)} clients or more"))
    if model is not None:
        shared, own = model.shared_parameters, model.n_parameters - model.shared_parameters
        personal = f", and {own:,} that stay with each" if own else ""
        head = ", head apart" if config.task.kind == "classification" and not config.task.labels else ""
        count = f"{shared:,} trained per client ({megabytes(4 * shared)} as fp32){personal}{head}"
        rows.insert(5 + len(about), ("parameters", count))
        if engine is not None:
            company = f"{counted(engine.together, 'client')} in the same passes"
            rows.append(("engine", f"{counted(engine.workers, 'process')}, at most {company} ({engine.why})"))
        rows += [("warning", f"molora.targets: {remark}") for remark in model.remarks]
        settings: Any = model.base.config
        known = remark_of(settings.get_text_config(), writes=config.task.kind == "causal-lm")
        rows += [("warning", f"base.model: {known}")] if known else []
    return rows + _unseen(config, base=model is not None, rows=owners is not None)


def _unseen(config: Config, *, base: bool, rows: bool) -> list[tuple[str, str]]:
    """What was not looked at, since it is elsewhere."""
    found = []
    if not base:
        what = "targets, parameters, lengths of rows and how many clients share a pass were not looked at"
        found.append(("warning", f"base.model: {config.base.model} is not on this machine; {what}"))
    if not rows:
        what = f"{config.data.source} is not on this machine; its rows were not looked at"
        found.append(("warning", f"data.source: {what}"))
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
    read = {*columns_of(config.data, config.task, rows.columns), GROUP, TASK, *COLUMNS[config.task.kind]}
    read |= {str(value) for key, value in config.data.partition.params.items() if key == "column"}
    if "messages" in rows.columns:
        read -= {"instruction", "input", "output"}
    unread = [name for name in rows.columns if name not in read]
    if unread:
        about.append(("unread", f"{', '.join(clean(name, 40) for name in unread)} (columns that nothing reads)"))
    return about


def _lengths(owners: Sequence[ClientRows], task: Task) -> Lengths:
    return together([task.encode(rows).lengths for owner in owners for rows in (owner.train, owner.test)])


def _in_words(lengths: Lengths) -> list[tuple[str, str]]:
    """How long the rows are, and what is cut."""
    found = [("tokens", f"of a row: {lengths.quantiles}")]
    if lengths.loss:
        found.append(("cut", lengths.loss))
    if lengths.enough:
        found.append(("enough", lengths.enough))
    return found


def _rows(owners: Sequence[ClientRows] | None) -> str:
    if owners is None:
        return ""
    train, test = (
        experts.spread(len(part) for part in parts) for parts in zip(*((o.train, o.test) for o in owners), strict=True)
    )
    return f": {train} rows each to train on, {test} held out"


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
