"""Flower's control API, called on the coordinator's own machine."""

from __future__ import annotations

import hashlib
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient

from molehill import bundle
from molehill.errors import DeployError
from molehill.pki import Certificate

_STRUCK = "unregistered"


@dataclass(frozen=True)
class Node:
    """A node that Flower knows.

    Attributes:
        number: Flower's number.
        name: Name in its certificate.
        status: ``online``, ``offline`` or ``registered`` (never seen).
        public_key: PEM.
    """

    number: int
    name: str
    status: str
    public_key: bytes


@dataclass(frozen=True)
class RunStatus:
    """A run that Flower knows.

    Attributes:
        number: Flower's number.
        status: ``pending``, ``starting``, ``running`` or ``finished``.
        outcome: Of a finished one: ``completed``, ``failed`` or ``stopped``.
        details: Why.
    """

    number: int
    status: str
    outcome: str
    details: str

    @property
    def unfinished(self) -> bool:
        """Whether it still goes on, or will."""
        return self.status != "finished"


class _Direct(ControlHttpClient):
    """Flower's client, which asks no proxy; the names it sets are those of the pinned version."""

    def __init__(self, base_url: str, *, verify: ssl.SSLContext, timeout: float = 30.0, **_: Any) -> None:
        self._base_url = base_url
        self._interceptors, self._retry_invoker = (), None
        self._client = httpx.Client(verify=verify, timeout=timeout, trust_env=False)


class Control:
    """Talks to the SuperLink.

    Args:
        address: ``127.0.0.1:PORT``.
        ca: Certificate of the SuperLink's authority.
    """

    def __init__(self, address: str, ca: Path) -> None:
        self._client = _Direct.from_server_address(
            address, insecure=False, root_certificates=ca.read_bytes(), interceptors=()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """All registered nodes."""
        return [node for node in self._all() if node.status != _STRUCK]

    def _all(self) -> list[Node]:
        """Also those that were struck off, whose keys Flower never takes again."""
        found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.name, node.status, bytes(node.public_key)) for node in found]

    def register(self, certificate: Certificate) -> None:
        """Let the owner of a certificate in as a node; nothing happens when its key is known.

        A key that had the same name before (the certificate was renewed) is struck off.

        Raises:
            DeployError: The key was struck off, or is another name's.
        """
        key, known = certificate.public_pem, self._all()
        for node in known:
            if node.public_key == key:
                if node.status != _STRUCK and node.name == certificate.name:
                    return
                what = f"the key of {certificate.name} is that of {node.name} ({node.status})"
                raise DeployError(what, mend="Make a new one on that machine: molehill pki request --renew")
        for node in known:
            if node.name == certificate.name and node.status != _STRUCK:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.number))
        self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=certificate.name))

    def strike(self, certificate: Certificate) -> None:
        """Strike off whoever is registered with the key of a certificate; Flower never takes this key again."""
        for node in self.nodes():
            if node.public_key == certificate.public_pem:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.number))

    def start(self, given: dict[str, str | int]) -> int:
        """Start a run of what every node has installed; only names travel, no code.

        Args:
            given: The run configuration.

        Returns:
            Its number.
        """
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / bundle.NAME).write_text(bundle.TEXT, encoding="utf-8")
            built = build_fab_from_disk(Path(folder))
        fab = Fab(hash_str=hashlib.sha256(built).hexdigest(), content=built)
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(given)))
        return int(self._client.StartRun(request).run_id)

    def runs(self) -> dict[int, RunStatus]:
        """All runs by number."""
        found = self._client.ListRuns(ListRunsRequest()).run_dict
        return {
            number: RunStatus(number, run.status.status, run.status.sub_status, run.status.details)
            for number, run in found.items()
        }

    def stop(self, number: int) -> None:
        """Stop a run."""
        self._client.StopRun(StopRunRequest(run_id=number))
