"""What a trainer is started with; apart from it, since it imports torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Post:
    """What a trainer is started with; paths are absolute.

    Attributes:
        name: Name in this machine's certificate.
        server: Host of the coordinator.
        exchange: ``HOST:PORT`` of the exchange; None is the coordinator's host, and the port that it says.
        data: This owner's rows.
        test: Its held-out rows; None holds out a part of ``data``.
        identity: Identity folder.
        passphrase_file: Its first line opens the identity's key.
        state: Folder for what must survive a restart.
        socket: Where to answer.
        base: Folder of the base model on this machine; None takes the name that the coordinator gives.
        device: Overrides ``base.device``; None leaves it to the run.
        gpu_memory: Part of the GPU's memory that may be used.
        keyring: Whether the key of the personal state lies in the operating system's keyring.
        policy: The owner's policy; None allows what a run's configuration says.
    """

    name: str
    server: str
    data: str
    test: str | None
    identity: str
    passphrase_file: str | None
    state: str
    socket: str
    exchange: str | None = None
    base: str | None = None
    device: str | None = None
    gpu_memory: float = 1.0
    keyring: bool = False
    policy: str | None = None

    def command(self) -> list[str]:
        """How to start the trainer."""
        return [sys.executable, "-m", "molehill_client.deploy.trainer", json.dumps(asdict(self))]
