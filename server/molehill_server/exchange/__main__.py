"""``python -m molehill_server.exchange``."""

from __future__ import annotations

import typer

from molehill_server.exchange.serve import run

typer.run(run)
