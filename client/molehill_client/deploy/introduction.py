"""How the coordinator introduces a run to a lab machine."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Introduction(BaseModel):
    """How the coordinator introduces a run.

    Attributes:
        config: The run's configuration, TOML; ``data.source`` is ignored.
        exchange_port: Port of the exchange on the coordinator's host.
        version: Version of Molehill there.
        instance: Tells the run from others of its name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    exchange_port: int = Field(ge=1, le=65535)
    version: str
    instance: str = ""
