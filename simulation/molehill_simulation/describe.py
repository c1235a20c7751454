"""What a configuration comes to, before anything runs: the rows of `molehill check`."""

from __future__ import annotations

from pathlib import Path

from molehill.config import Config, MethodRef
from molehill.molora.build import wrap
from molehill.tasks.base_model import load_base
from molehill_simulation.text import megabytes


def describe(config: Config) -> list[tuple[str, str]]:
    """The plan of a run as labelled facts.

    A base model that is on this machine is loaded and wrapped, which finds targets that match nothing and counts
    what will be trained; a hub model is not downloaded for that.

    Args:
        config: A configuration.

    Returns:
        ``(label, text)`` rows.

    Raises:
        ModelError: The base cannot be loaded, or the targets do not fit it.
        ConfigError: The parts of the adapter do not fit each other.
    """
    data, molora, train, federation = config.data, config.molora, config.train, config.federation
    plain = molora.experts == 1 and not molora.shared
    shared = f" and {molora.shared} always-on" if molora.shared else ""
    experts = "one LoRA" if plain else f"{molora.experts} routed{shared}"
    targets = molora.targets if isinstance(molora.targets, str) else ", ".join(molora.targets)
    rows = [
        ("run", f"{config.run.name}: {config.run.rounds} rounds, seed {config.run.seed}"),
        ("base", f"{config.base.model}, {config.base.precision} on {config.base.device}"),
        ("task", f"{config.task.kind}, inputs of at most {config.task.max_length} tokens"),
        ("data", f"{data.source} dealt to {data.clients} clients by {_show(data.partition)}"),
        ("experts", f"{experts} of rank {molora.rank} on {targets}"),
        ("router", "none" if plain else f"{_show(molora.scorer)}, {_show(molora.selector)}, one per {molora.scope}"),
        ("personal", f"gate {config.personal.gate}, head {config.personal.head}"),
        ("training", f"{train.steps} steps of {train.batch_size * train.accumulation} rows, lr {train.lr:g}"),
        ("federation", f"{_show(federation.policy)}: {_merge(config)}"),
        ("wire", f"{_show(config.wire.up)} up, {_show(config.wire.down)} down"),
    ]
    if config.base.model.startswith("sample:") or Path(config.base.model).expanduser().is_dir():
        model = wrap(load_base(config.base, config.task).model, molora, gate=config.personal.gate, seed=config.run.seed)
        count = model.n_parameters
        rows.insert(5, ("parameters", f"{count:,} trained per client ({megabytes(4 * count)} as fp32), head apart"))
    return rows


def _merge(config: Config) -> str:
    federation = config.federation
    parts = [("space", federation.space), ("rule", federation.rule)]
    parts += [("lower", federation.lower)] if federation.lower.name != "none" else []
    parts += [("server optimiser", federation.server_opt)] if federation.server_opt.name != "none" else []
    return ", ".join(f"{label} {_show(ref)}" for label, ref in parts)


def _show(ref: MethodRef) -> str:
    params = ", ".join(f"{key}={value}" for key, value in ref.params.items())
    return f"{ref.name}({params})" if params else ref.name
