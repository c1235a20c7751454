"""What ``molehill generate`` and ``molehill chat`` share: their options, and how a trained model is opened by them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from molehill.extras import needs

if TYPE_CHECKING:
    from molehill_simulation.loaded import Loaded

EXTRA = "simulation"

Trained = Annotated[
    Path, typer.Argument(metavar="RUN|ADAPTER", help="Folder of a finished run, an adapter, or a LoRA of peft.")
]
As = Annotated[
    str, typer.Option("--as", metavar="WHO", help="Whose gate: global, a client, an expert alone, or base for none.")
]
StrategyName = Annotated[
    str, typer.Option("--strategy", metavar="NAME", help="How an answer follows; see: molehill methods decoding.")
]
Assigned = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the strategy; repeatable.", show_default=False),
]
Longest = Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.", show_default="256, or what fits")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Draw from this many likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Draw from tokens of this probability together.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End an answer before this string; may be repeated.", show_default=False)
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of the draws.", show_default="a new one")]
Base = Annotated[str | None, typer.Option(help="Where the base model is now.", show_default="as in the run")]
State = Annotated[
    Path | None, typer.Option(metavar="DIR", help="--state of a lab machine, for its own gate.", show_default=False)
]

Large = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="A larger base with the same tokenizer, to be steered.", show_default=False),
]


def opened(
    path: Path, who: str, base: str | None, state: Path | None, others: Mapping[str, str | None], *, quiet: bool
) -> Loaded:
    """A trained model, with those of other models that are given; says meanwhile that it is loaded."""
    with needs(EXTRA), Console(stderr=True, quiet=quiet).status("Loading the model"):
        from molehill_simulation.loaded import load

        given = {name: model for name, model in others.items() if model is not None}
        return load(path, who, base=base, state=state, others=given)


def told(model: Loaded) -> dict[str, Any]:
    """What programs are told of the model that answered."""
    return {"name": model.source.name, "as": model.who}
