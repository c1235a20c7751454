"""``molehill edge``: the group of all verbs for bundles on a device."""

from __future__ import annotations

import typer

from molehill_edge.commands import bundles, experts
from molehill_edge.commands.bench import bench
from molehill_edge.commands.info import info
from molehill_edge.commands.opening import EXTRA
from molehill_edge.commands.personalise import personalise
from molehill_edge.commands.run import run

__all__ = ["EXTRA", "app"]

app = typer.Typer(
    help="Bundles on a device: get them, run them, make them yours. Needs no torch.", no_args_is_help=True
)
app.command()(run)
app.command()(info)
app.command()(bench)
app.command()(personalise)
app.command()(bundles.pull)
app.command()(bundles.update)
app.command("list")(bundles.list_bundles)
app.command()(experts.experts)
app.command()(experts.add)
app.command()(experts.remove)
app.command()(experts.policy)
