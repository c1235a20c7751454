"""``molehill expert``: an expert, or a gate as a fixed mixture, for peft and Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json

EXTRA = "export"


def expert(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a finished run, an adapter, or a LoRA of peft.")
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[EXPERT]", help="The expert; none for the mixture of --as.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write.", show_default=False)
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            "--as",
            "--gate",
            metavar="CLIENT|global",
            show_default=False,
            help="Without EXPERT: whose mean weights all experts get. With it: whose head a classifier has.",
        ),
    ] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Write a whole model of Transformers, with the experts in its weights.")
    ] = False,
    float32: Annotated[
        bool, typer.Option("--float32", help="Of --merged: in float32, even where the base has fewer bits.")
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled rows to take the mean over.", show_default="those of a simulation"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also a mixture that differs too much from the routed model.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Where the base model is now.", show_default="as in the run")] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="--state of a lab machine, for its own gate.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an expert as a folder that peft opens by itself, or, with --merged, Transformers.

    It answers as `molehill generate --as EXPERT` does.
    """
    with explained(as_json):
        if out is None:
            raise ConfigError("nothing to write", mend="Give --out DIR.")
        if float32 and not merged:
            raise ConfigError("an adapter is in float32 as it is", where="--float32", mend="It goes with --merged.")
        with needs(EXTRA):
            from molehill_export.elsewhere import Wanted, write_elsewhere
            from molehill_simulation.source import AS, open_source

        try:
            with Console(stderr=True, quiet=as_json).status("Loading the model") as status:
                wanted = Wanted(name, gate, merged, float32, rows, force)
                found = open_source(source, base, state, option=AS)
                made = write_elsewhere(found, out, wanted, progress=status.update)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        told: dict[str, Any] = {
            "out": str(out), "opens": made.opens, "base": made.base or None, "dtype": made.dtype, "rank": made.rank,
            "bytes": made.size,
        }  # fmt: skip
        fixed = made.fixed
        if fixed is not None:
            told["static"] = {
                "exact": fixed.exact, "texts": fixed.texts, "logit_error": fixed.error, "agreement": fixed.agreement
            }  # fmt: skip
        if as_json:
            print_json(told)
            return
        rank = f", rank {made.rank}" if made.rank else ""
        typer.echo(f"{made.opens}.from_pretrained({str(out)!r}) opens it: {made.size / 1e6:.2f} MB, {made.dtype}{rank}")
        if made.base:
            typer.echo(f"Its base is {made.base}")
        if fixed is not None and not fixed.exact:
            typer.echo(
                f"The mixture is static: all tokens get the mean weights of {fixed.texts} texts. The likeliest answer "
                f"is that of the routed model in {fixed.agreement:.1%}, the relative logit error {fixed.error:.1e}."
            )
