"""Who calls through the door, what for, and how much of it: calls of nodes are judged before Flower hears of them."""

from __future__ import annotations

import binascii
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509

from molehill.errors import MolehillError
from molehill.gateway import Call, RefusedError, Visit
from molehill.pki import Certificate
from molehill_server.deploy import replies

# What Flower's nodes call: all of its node API but to unregister, which the coordinator does.
CALLS = {
    *("register-node", "activate-node", "deactivate-node", "send-node-heartbeat", "get-run", "get-fab"),
    *("pull-messages", "push-messages", "pull-object", "push-object", "confirm-message-received"),
}
_KEY = b"flwr-public-key"  # the header in which Flower's nodes show the key they sign with


@dataclass(frozen=True)
class Budget:
    """What calls of nodes may take.

    Attributes:
        held: Bytes of bodies in memory, of all nodes.
        held_by_node: Of them, of one node.
        burst: Bytes that a node may send at once.
        rate: Bytes per second that it may send after that.
    """

    held: int = 32 * 2**20
    held_by_node: int = 8 * 2**20
    burst: float = 16.0 * 2**20
    rate: float = 2.0**16


@dataclass
class _Account:
    """What a node has used."""

    held: int = 0
    sent: float = 0.0  # bytes that its rate has not made good yet
    at: float = 0.0  # when that was


class Guard:
    """Judges the calls of nodes (`molehill.gateway.Guard`).

    A call must be signed with the key of the certificate that its connection was opened with: Flower itself knows
    nothing of certificates, and would take a key that was struck off the list for as long as it is registered.

    Args:
        guests: Certificates (DER) of who is inside, by the names of their sockets; see `open_door`.
        admit: Raises an error for a certificate that does not hold any more.
        budget: What calls may take.
    """

    def __init__(
        self, guests: Mapping[str, bytes], admit: Callable[[Certificate], object], budget: Budget | None = None
    ) -> None:
        self._guests, self._admit, self._budget = guests, admit, budget or Budget()
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._held = 0

    @contextmanager
    def __call__(self, call: Call) -> Iterator[Visit]:
        """Let a call be here; raises `RefusedError`."""
        shown = self._guests.get(call.peer)
        if shown is None:
            raise RefusedError(403, "a call of nobody")
        certificate = _certificate(shown)
        visit = _Visit(self, call, certificate.name)
        try:
            self._require_right(call, certificate)
            yield visit
        except RefusedError as refused:
            refused.who = certificate.name
            raise
        finally:
            self.hold(certificate.name, -visit.size)

    def _require_right(self, call: Call, certificate: Certificate) -> None:
        if call.path.rpartition("/")[2] not in CALLS:
            raise RefusedError(404, "no call of a node")
        try:
            self._admit(certificate)
        except MolehillError as error:
            raise RefusedError(403, str(error)) from None
        if _key(call) != certificate.public_pem:
            raise RefusedError(401, "a key that is not its certificate's")

    def spend(self, name: str, size: int) -> None:
        """Let a node have sent ``size`` bytes more."""
        budget, account, now = self._budget, self._accounts[name], time.monotonic()
        account.sent = max(0.0, account.sent - (now - account.at) * budget.rate) + size
        account.at = now
        if account.sent > budget.burst:
            raise RefusedError(429, f"more than {budget.rate:.0f} bytes a second")
        if account.held > budget.held_by_node or self._held > budget.held:
            raise RefusedError(503, f"too much at a time, {account.held} bytes of it of this node")

    def hold(self, name: str, size: int) -> None:
        """Let a node have ``size`` bytes more in memory."""
        self._accounts[name].held += size
        self._held += size


class _Visit(Visit):
    def __init__(self, guard: Guard, call: Call, name: str) -> None:
        super().__init__()
        self._guard, self._call, self._name = guard, call, name

    def more(self, size: int) -> None:
        self._guard.hold(self._name, size)
        super().more(size)
        self._guard.spend(self._name, size)

    def whole(self, body: bytes) -> None:
        replies.judge(self._call.path, body)


def _key(call: Call) -> bytes | None:
    """The key a call claims to be signed with; None when it shows none, or several."""
    shown = [value for name, value in call.headers if name.lower() == _KEY]
    if len(shown) != 1:
        return None
    try:
        return b64decode(shown[0], validate=True)
    except binascii.Error:
        return None


@lru_cache(maxsize=1024)
def _certificate(der: bytes) -> Certificate:
    return Certificate(x509.load_der_x509_certificate(der))
