"""``molehill client``: a machine with private rows that takes part in a federation."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from molehill import address, logs
from molehill.extras import needs
from molehill.terminal import Json, State, explained, print_json, say, show_table

EXTRA = "client"

app = typer.Typer(help="A machine with private rows that takes part in a federation.", no_args_is_help=True)

_STATE = Path("node")
_STAGES = ("base", "local", "global", "personalised")


@app.command()
def join(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator.")],
    identity: Annotated[Path, typer.Option(help="Identity folder of this machine (molehill pki).")],
    data: Annotated[Path, typer.Option(help="Private rows: JSONL, CSV or Parquet file.")],
    test: Annotated[
        Path | None, typer.Option(help="Held-out rows.", show_default="data.test_fraction of the rows")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the certificate must say.", show_default="what it says")
    ] = None,
    state: State = _STATE,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Its first line opens the key.", show_default=False)
    ] = None,
    exchange: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Where to fetch and send adapters.", show_default="where the coordinator says"
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            envvar="MOLEHILL_BASE",
            help="Folder of the base model on this machine.",
            show_default="the hub id that the run names",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="as the run says")] = None,
    gpu_memory: Annotated[float, typer.Option(min=0.05, max=1.0, help="Part of the GPU's memory to use.")] = 1.0,
    keyring: Annotated[
        bool, typer.Option("--keyring", help="Keep the key of the personal state in the system's keyring.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(
            envvar="MOLEHILL_POLICY",
            help="What a run may ask of this machine (molehill client policy).",
            show_default="whatever its configuration says",
        ),
    ] = None,
) -> None:
    """Take part in a federation until Ctrl-C: train on the rows of this machine, which do not leave it."""
    with explained():
        with needs(EXTRA):
            from molehill_client.deploy.join import Membership
            from molehill_client.deploy.join import join as run

        logs.begin()
        host, port = address.parse(server)
        if exchange is not None:
            exchange = address.join(*address.parse(exchange))
        member = Membership(
            host=host,
            port=port,
            identity=identity,
            data=data,
            state=state,
            test=test,
            name=name,
            passphrase_file=passphrase_file,
            exchange=exchange,
            base=base,
            device=device,
            gpu_memory=gpu_memory,
            keyring=keyring,
            policy=policy,
        )
        run(
            member,
            ready=lambda own: say(Text(f"{own} has joined {server}; it trains when the coordinator asks")),
            tell=lambda text, **facts: say(Text(text), **facts),
            warn=lambda text: say(Text.assemble(("warning: ", "bold yellow"), text)),
        )
        say(Text("left the federation"))


@app.command()
def policy(
    file: Annotated[Path, typer.Argument(help="The policy.")] = Path("policy.toml"),
    init: Annotated[bool, typer.Option("--init", help="Write a careful one to begin with.")] = False,
    as_json: Json = False,
) -> None:
    """Check what a run may ask of this machine, or write a careful policy."""
    with explained(as_json):
        with needs(EXTRA):
            from molehill_client import policy as policies

        if init:
            policies.begin(file)
        word = policies.read(file)
        if as_json:
            print_json({"file": str(file), "digest": word.digest, "policy": word.policy.model_dump(mode="json")})
            return
        if init:
            say(Text(f"wrote {file}; name the bases in it, and join with --policy {file}"))
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        for section, values in word.policy.model_dump(mode="json").items():
            for key, value in values.items():
                said = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
                table.add_row(f"{section}.{key}", Text(said))
        table.add_row("digest", Text(word.digest))
        show_table(table)


@app.command()
def status(state: State = _STATE, as_json: Json = False) -> None:
    """Show what this machine is doing, and what went wrong last."""
    with explained(as_json):
        with needs(EXTRA):
            from molehill_client.deploy.join import status as ask

        found = ask(state)
        if as_json:
            print_json(found)
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        since = time.time() - found.pop("since")
        for hidden in ("pid", "limit", "lines"):
            found.pop(hidden, None)
        for key, value in {**found, "for": f"{since:.0f} s"}.items():
            if value is not None:
                table.add_row(key, Text(str(value)))
        show_table(table)


@app.command()
def evaluate(
    state: State = _STATE,
    data: Annotated[
        Path | None, typer.Option(help="Rows to score on.", show_default="this machine's held-out rows")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score the last run's final model on this machine, shared and personalised; `client join` must be running."""
    with explained(as_json):
        with needs(EXTRA):
            from molehill_client.deploy.join import require_joined
            from molehill_client.deploy.join import status as state_of
            from molehill_client.deploy.line import Request, ask

        text = "" if data is None else str(data.resolve())
        if state_of(state).get("limit") is not None:
            say(Text("the machine is training; this comes after it"))
        answer = json.loads(ask(require_joined(state).socket, Request("score", text)))
        if as_json:
            print_json({"n_test": answer["n_test"], "stages": answer["stages"]})
            return
        table = Table(box=SIMPLE_HEAD)
        causal = all(scores["macro_f1"] is None for scores in answer["stages"].values())
        shares = ("token accuracy", "perplexity") if causal else ("accuracy", "macro-F1")
        for column in ("model", *shares, "loss"):
            table.add_column(column, justify="left" if column == "model" else "right")
        for stage in _STAGES:
            if stage in answer["stages"]:
                scores = answer["stages"][stage]
                loss = scores["loss"]
                other = f"{math.exp(min(loss, 700)):.4g}" if causal else f"{scores['macro_f1']:.3f}"
                table.add_row(stage, f"{scores['accuracy']:.3f}", other, f"{loss:.4f}")
        show_table(table)


@app.command()
def forget(
    state: State = _STATE,
    run: Annotated[str | None, typer.Option(help="Name of the run.", show_default="all of them")] = None,
) -> None:
    """Remove this machine's personal gates, heads and last delta."""
    with explained():
        with needs(EXTRA):
            from molehill_client.deploy.join import forget as remove

        gone = remove(state, run)
        say(Text(f"forgot {', '.join(gone)}" if gone else "there was nothing to forget"))
