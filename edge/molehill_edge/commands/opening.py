"""What the verbs for a bundle share: their options, how a bundle is opened by them, and how they tell of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from molehill.extras import needs
from molehill.terminal import say

if TYPE_CHECKING:
    from molehill_edge.bundle import Bundle
    from molehill_edge.trust import Trust

EXTRA = "edge"

StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        envvar="MOLEHILL_STORE",
        help="Where bundles lie on this device.",
        show_default="the user's data folder",
    ),
]
Name = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="Id of a bundle in the store; with --insecure-local, a folder or file.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure-local", help="Open an unsigned folder or archive. Anybody could have written it.")
]
GateOption = Annotated[
    str | None, typer.Option("--gate", metavar="NAME|FILE", help="Instead of the bundle's default.", show_default=False)
]
Experts = Annotated[
    str | None,
    typer.Option("--experts", metavar="A,B,...", help="Choose from these experts only.", show_default=False),
]
StrategyName = Annotated[
    str | None,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="How an answer follows from the model; see: molehill methods decoding.",
        show_default="the model's own logits",
    ),
]
Assigned = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the strategy; repeatable.", show_default=False),
]
Threads = Annotated[int | None, typer.Option(min=1, help="Processor threads.", show_default="1 or all: the faster")]
Spin = Annotated[
    bool | None,
    typer.Option("--spin/--no-spin", help="Threads wait for work awake, not asleep.", show_default="the faster"),
]
Memory = Annotated[int | None, typer.Option(min=1, help="Refuse what needs more MiB.", show_default="no limit")]


@contextlib.contextmanager
def opened(
    name: str,
    *,
    insecure: bool,
    store: Path | None,
    threads: int | None = None,
    spin: bool | None = None,
    memory_mb: int | None = None,
    gate: str | None = None,
    experts: str | None = None,
) -> Iterator[Bundle]:
    """A bundle with a gate and a choice of experts."""
    with needs(EXTRA):
        from molehill_edge.bundle import Bundle

    trust = _trust(insecure, store)
    with Bundle.open(name, trust=trust, threads=threads, spin=spin, memory_mb=memory_mb) as bundle:
        if gate is not None:
            bundle.swap_gate(gate)
        if experts is not None:
            bundle.choose_experts(named(experts))
        yield bundle


def named(experts: str) -> list[str]:
    """The ids in the option that lists experts."""
    return [each.strip() for each in experts.split(",") if each.strip()]


def _trust(insecure: bool, store: Path | None) -> Trust:
    with needs(EXTRA):
        if insecure:
            from molehill_edge.trust import InsecureLocal

            return InsecureLocal(lambda warning: say(Text(warning, "bold red")))
        from molehill_edge.store import Store

        return Store(store)


def who(bundle: Bundle) -> dict[str, Any]:
    """What programs are told of the bundle that answered."""
    return {"id": bundle.manifest.id, "version": bundle.manifest.version, "gate": bundle.gate.name}
