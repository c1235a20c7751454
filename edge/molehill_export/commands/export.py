"""``molehill export``: a run or adapter becomes a bundle, or a LoRA for llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from molehill.errors import ConfigError
from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json, show_table
from molehill_edge import likeness

if TYPE_CHECKING:
    from molehill_protos.v1.bundle_pb2 import Manifest

EXTRA = "export"


# What only a bundle has, by the name of the parameter.
_BUNDLES = (
    "quantize", "block", "experts", "spare_slots", "bundle_id", "version", "expires", "expert_files",
    "router_ranks",
)  # fmt: skip


def export(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a finished run, an adapter, or a LoRA of peft.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="BUNDLE", help="Folder to write; with the suffix .molehill, one file.", show_default=False
        ),
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLIENT|global",
            help="Whose gate; the first is the default one. A client called global: client:global.",
            show_default="global",
        ),
    ] = None,
    quantize: Annotated[Literal["fp32", "int8", "int4"], typer.Option(help="Bits of base and experts.")] = "int8",
    block: Annotated[
        Literal["128", "256"],
        typer.Option(help="Weights of an int4 base that share a scale; 256 is smaller, and faster with few experts."),
    ] = "128",
    experts: Annotated[str | None, typer.Option(metavar="A,B,...", help="Experts to take.", show_default="all")] = None,
    spare_slots: Annotated[
        int, typer.Option(min=0, max=64, help="Empty places for experts that a device may add.")
    ] = 0,
    bundle_id: Annotated[str, typer.Option("--id", help="Name of the bundle.", show_default="that of the run")] = "",
    version: Annotated[int, typer.Option("--bundle-version", min=1, help="Must grow with every publication.")] = 1,
    expires: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Day from which on devices refuse it.", show_default="never"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model is now.", show_default="as in the run")] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="--state of a lab machine, for its own gate.", show_default=False)
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Labelled rows to measure on.", show_default="those of a simulation"),
    ] = None,
    expert_files: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write every expert as a file too, to add on a device.", show_default=False),
    ] = None,
    router_ranks: Annotated[
        bool,
        typer.Option("--router-ranks", help="Let devices choose experts by their places, as some strategies do."),
    ] = False,
    gguf: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a LoRA that llama.cpp reads instead: one --expert, or the mean weights of one --gate.",
            show_default=False,
        ),
    ] = None,
    expert: Annotated[str | None, typer.Option(help="The expert of --gguf.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Also when it differs too much from the original.")] = False,
    as_json: Json = False,
) -> None:
    """Make a quantised ONNX bundle that runs without torch, and measure it against the original."""
    with explained(as_json):
        if gguf is not None or out is None:
            _refuse_those_of_bundles(context)
            _lora(source, out, gguf, expert, gate or [], rows, force, base, state, as_json)
            return
        if expert is not None:
            raise ConfigError("--expert goes with --gguf", mend="Choose those of a bundle with --experts.")
        with needs(EXTRA):
            from molehill_export.base import is_built
            from molehill_export.export import Options
            from molehill_export.export import export as write
            from molehill_simulation.source import open_source

        options = Options(
            gates=tuple(gate or ("global",)),
            scheme=quantize,
            block=int(block),
            experts=None if experts is None else tuple(name.strip() for name in experts.split(",")),
            spare=spare_slots,
            id=bundle_id,
            version=version,
            expires=0 if expires is None else int(expires.replace(tzinfo=UTC).timestamp()),
            force=force,
            rows=rows,
            expert_files=expert_files,
            router_ranks=router_ranks,
        )
        console = Console(stderr=True, quiet=as_json)
        try:
            with console.status("Loading the model") as status:
                found = open_source(source, base, state, streamed=is_built)
                manifest = write(found, out, options, progress=status.update)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        told = _told(manifest)
        if as_json:
            print_json({"bundle": str(out), **told})
        else:
            _show(told, out)


def _refuse_those_of_bundles(context: typer.Context) -> None:
    """Refuse options that change nothing in a LoRA."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in _BUNDLES and source is not None and source.name == "COMMANDLINE":
            raise ConfigError("a LoRA for llama.cpp has no such thing", where=parameter.opts[0], mend="Leave it out.")


def _lora(
    source: Path,
    out: Path | None,
    gguf: Path | None,
    expert: str | None,
    gates: Sequence[str],
    rows: Path | None,
    force: bool,
    base: str | None,
    state: Path | None,
    as_json: bool,
) -> None:
    """Write a LoRA for llama.cpp, and say what is in it."""
    if gguf is None or out is not None:
        raise ConfigError(
            "nothing to write" if gguf is None else "--out and --gguf exclude each other",
            mend="Give --out for a bundle, or --gguf for a LoRA that llama.cpp reads.",
        )
    if len(gates) > 1:
        raise ConfigError("a LoRA has one gate", where="--gate", mend="Give one of them.")
    if gguf.exists():
        raise ConfigError("there is something already", where=str(gguf), mend="Choose another --gguf.")
    gguf.absolute().parent.stat()  # a folder that there is not is refused now, and not after minutes
    with needs("gguf"):
        from molehill_export.base import is_built
        from molehill_export.gguf_lora import Wanted, export_lora
        from molehill_simulation.source import open_source

    with Console(stderr=True, quiet=as_json).status("Loading the model"):
        wanted = Wanted(expert, gates[0] if gates else None, rows, force)
        try:
            made = export_lora(open_source(source, base, state, streamed=is_built), gguf, wanted)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    fixed = made.fixed
    told: dict[str, Any] = {
        "gguf": str(gguf),
        "bytes": gguf.stat().st_size,
        "experts": list(made.experts),
        "rank": made.rank,
        "linears": made.linears,
    }
    if fixed is not None:
        told["static"] = {
            "exact": fixed.exact, "texts": fixed.texts, "logit_error": fixed.error, "agreement": fixed.agreement
        }  # fmt: skip
    if as_json:
        print_json(told)
        return
    typer.echo(f"{', '.join(made.experts)}: rank {made.rank} at {made.linears} linears, {told['bytes'] / 1e6:.2f} MB")
    if fixed is not None and not fixed.exact:
        typer.echo(
            f"The mixture is static: all tokens get the mean weights of {fixed.texts} texts. The likeliest token is "
            f"that of the routed model in {fixed.agreement:.1%}, the relative logit error {fixed.error:.1e}."
        )
    typer.echo(f"Written to {gguf}")


def _told(manifest: Manifest) -> dict[str, Any]:
    return {
        "id": manifest.id,
        "version": manifest.version,
        "quantisation": manifest.quantisation.base,
        "gate": manifest.provenance.gate,
        "experts": [slot.id for slot in manifest.slots if slot.id],
        "bytes": {file.path: file.length for file in manifest.files},
        "parity": likeness.told(manifest.parity),
    }


def _show(told: dict[str, Any], out: Path) -> None:
    parity, sizes = told["parity"], told["bytes"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("bundle", f"{told['id']}, version {told['version']}, {told['quantisation']}, gate {told['gate']}")
    for path, size in sorted(sizes.items(), key=lambda item: -item[1]):
        table.add_row(f"  {path}", f"{size / 1e6:9.2f} MB")
    table.add_row("size", f"{sum(sizes.values()) / 1e6:11.2f} MB")
    alike = f"{parity['agreement']:.1%} of predictions alike, relative logit error {parity['logit_error']:.1e}"
    table.add_row("parity", f"{alike} ({parity['texts']} texts)")
    if parity["rows"]:
        figure, figures = likeness.figure_row(parity)
        table.add_row(figure, f"{figures} ({parity['rows']} rows)")
    show_table(table)
    Console().print(f"Written to {out}", soft_wrap=True, highlight=False, markup=False)
