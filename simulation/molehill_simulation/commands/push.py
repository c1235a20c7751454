"""``molehill push``: a run's shared adapter on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from molehill.extras import needs
from molehill.terminal import INTERRUPTED, Json, explained, print_json

EXTRA = "simulation"


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Name on the hub, such as ORG/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it; else it is private.")] = False,
    as_json: Json = False,
) -> None:
    """Upload the adapter that all owners share to the Hugging Face hub, with its model card.

    Personal gates and heads stay here. The hub's own settings count: HF_TOKEN or `hf auth login`, and HF_ENDPOINT.
    """
    with explained(as_json):
        with needs(EXTRA):
            from molehill_simulation.push import push as upload

        try:
            with Console(stderr=True, quiet=as_json).status("Uploading"):
                address = upload(run, repo, public=public)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        if as_json:
            print_json({"repository": repo, "commit": address})
        else:
            typer.echo(address)
