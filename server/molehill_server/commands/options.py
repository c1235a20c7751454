"""Options that several commands of a coordinator have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

State = Annotated[
    Path, typer.Option("--state", envvar="MOLEHILL_STATE_DIR", help="Folder for what must survive a restart.")
]
STATE = Path("coordinator")
