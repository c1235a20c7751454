"""``molehill simulate``: a federation on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from molehill.extras import needs
from molehill.terminal import Json
from molehill_simulation.commands.running import EXTRA, Out, Overrides, Resume, conduct

if TYPE_CHECKING:
    from molehill.config import Config
    from molehill_simulation.summary import Summary
    from molehill_simulation.ui import RunView

__all__ = ["EXTRA", "simulate"]


def simulate(
    config: Annotated[Path | None, typer.Argument(help="TOML file; the demo when omitted.", show_default=False)] = None,
    out: Out = None,
    overrides: Overrides = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="One process, or Flower's Ray engine.")] = "local",
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine, from private rows to personalised models.

    With --resume and no CONFIG, the configuration in the run folder is used.
    """

    def work(resolved: Config, folder: Path, view: RunView) -> Summary:
        with needs(EXTRA):
            from molehill_simulation.simulate import simulate as run
        return run(resolved, folder, engine=engine, observer=view)

    conduct(
        work, config, out, overrides, resume=resume, as_json=as_json, default=_demo(),
        command=["molehill", "simulate"], options=[] if engine == "local" else ["--engine", engine],
    )  # fmt: skip


def _demo() -> Path:
    """The configuration that runs when none is named."""
    return Path(__file__).parents[1] / "demo.toml"
