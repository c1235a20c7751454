"""Plans go out to clients, and what their replies point at comes in, or is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from molehill.config import Config
from molehill.errors import MessageError
from molehill.plan import ClientPlan, ClientReply, EvaluationReply
from molehill.wire.exchange import Exchange
from molehill_server.broadcast import Broadcast
from molehill_server.exchange.grants import Grant, Grants
from molehill_server.planning.assigning import Leaning
from molehill_server.planning.planner import Planner
from molehill_server.records import Global
from molehill_server.rounds.notes import Notes, UnusableModelError
from molehill_server.rounds.record import Record
from molehill_server.transport import Collection, Incoming, Outgoing, Patience, Transport
from molehill_server.validation import check_reply, parse_reply, require_addressed

T = TypeVar("T")


class NotYetError(Exception):
    """What a reply points at cannot be judged yet, and is needed again."""


class Post:
    """Sends plans and fetches deltas.

    Args:
        config: The run's configuration.
        record: Who takes part in the run; told about clients that begin anew.
        exchange: Where blobs and deltas lie.
        transport: Reaches the clients.
        broadcast: What clients fetch.
        grants: Told what every client may read and write; None where clients and server share the exchange freely.
        grace: Seconds to wait for the rest once there are enough.
    """

    def __init__(
        self,
        config: Config,
        record: Record,
        exchange: Exchange,
        transport: Transport,
        broadcast: Broadcast,
        grants: Grants | None,
        grace: float,
    ) -> None:
        self._record = record
        self._exchange = exchange
        self._transport = transport
        self._broadcast = broadcast
        self._grants = grants
        self._deadline, self._grace = config.round.deadline, grace
        self._planner = Planner(config, record.base)
        self._late: set[str] = set()

    def plans(self, clients: Iterable[str], number: int, glob: Global, *, trains: bool = True) -> dict[str, ClientPlan]:
        """A plan per client, whose turn is its place among all clients in the order in which they came.

        Args:
            clients: Their ids.
            number: The round.
            glob: The shared model.
            trains: Whether they are to train on; else a newcomer has the shared model as it is, once there is one.
        """
        turns = {client: turn for turn, client in enumerate(self._record.saved.clients)}
        layout, digests, saved = glob.tree.layout, self._broadcast.digests(), self._record.saved
        unknown = Leaning() if saved.leanings and not trains else None
        return {
            client: self._planner.plan(
                client,
                number,
                layout,
                digests,
                turns[client],
                saved.accepted.get(client, 0),
                saved.leanings.get(client, unknown),
            )
            for client in clients
        }

    def any_plan(self, number: int, glob: Global) -> ClientPlan:
        """What all plans of a round have in common where clients have one rank; nobody need be here for it."""
        some = next(iter(self._record.saved.leanings.values()), None)
        return self._planner.plan("", number, glob.tree.layout, self._broadcast.digests(), 0, leaning=some)

    def grant(self, plans: Mapping[str, ClientPlan], attempt: int = 0, most: int | None = None) -> None:
        """Let these clients, and no others, do what their plans say in this attempt.

        Args:
            plans: By client.
            attempt: At the round.
            most: Bytes of the delta that each may send; None lets them send none.
        """
        if self._grants is not None:
            self._grants.renew({client: _grant(plan, attempt, most) for client, plan in plans.items()})

    def patience(self, quorum: int) -> Patience:
        """A round's patience, when so many answers are enough."""
        return Patience(self._deadline, quorum, self._grace)

    def send(
        self, kind: str, plans: Mapping[str, BaseModel], nodes: Mapping[str, int], group: str, patience: Patience
    ) -> Collection:
        """Send plans, or questions, and begin to collect the replies."""
        messages = [
            (client, Outgoing(nodes[client], kind, group, plan.model_dump_json(), patience.deadline))
            for client, plan in plans.items()
        ]
        return Collection(self._transport, messages, patience, self._late)

    def open(
        self,
        plan: ClientPlan,
        incoming: Incoming,
        notes: Notes,
        most: int,
        read: Callable[[bytes, ClientReply], T],
        *,
        again: bool = False,
    ) -> T:
        """Fetch and judge what a reply to ``plan`` points at, ``most`` bytes of it; they count once.

        Args:
            plan: What the client was told to do.
            incoming: Its reply.
            notes: Told what was taken.
            most: Bytes that are fetched.
            read: Reads and judges them.
            again: Whether this reply was opened before.

        Raises:
            MessageError: It cannot be used.
            NotYetError: ``read`` raised it: it is opened again.
            UnusableModelError: There is nothing to fetch, for no fault of the client's.
        """
        reply = parse_reply(text_of(incoming))
        if reply.unusable:
            require_addressed(reply, plan)
            raise UnusableModelError(reply.unusable)
        held = False
        try:
            notes.bytes_down += 0 if again else min(reply.bytes_down, self._broadcast.size)
            blob = self._exchange.get(reply.delta, most)
            notes.bytes_up += 0 if again else len(blob)
            check_reply(reply, plan, notes.counts[plan.client].rows)
            found = read(blob, reply)
        except NotYetError:
            held = True
            raise
        finally:
            if not held:
                self._discard(reply.delta)
        self.note_start(plan, reply)
        notes.accepted.append(plan.client)
        notes.deltas[plan.client] = reply.delta
        return found

    def note_start(self, plan: ClientPlan, reply: ClientReply | EvaluationReply) -> None:
        """Say so when a client does not go on from where it was: what it kept for itself is gone."""
        if reply.started is not None and reply.started < plan.accepted:
            facts = {"client": plan.client, "round": plan.round, "kept": reply.started, "accepted": plan.accepted}
            self._record.log.emit("anew", **facts)

    def forget(self, collection: Collection) -> None:
        """Drop what came too late to be used."""
        for incoming in collection.overdue:
            try:
                self._discard(ClientReply.model_validate_json(incoming.text or "").delta)
            except ValidationError:
                continue  # no train reply, so there is nothing to drop

    def _discard(self, name: str) -> None:
        """Drop a delta. A client may name anything: neither nonsense nor what others still fetch is dropped.

        An exchange that knows grants keeps a round's deltas until the next one begins: a coordinator that is killed
        before it commits finds them there.
        """
        if self._grants is None and name not in self._broadcast.digests().values():
            with suppress(MessageError):
                self._exchange.drop(name)


def text_of(incoming: Incoming) -> str:
    """The text of a reply.

    Raises:
        MessageError: The client failed.
    """
    if incoming.text is None:
        raise MessageError(incoming.error)
    return incoming.text


def _grant(plan: ClientPlan, attempt: int, most: int | None) -> Grant:
    reads = tuple(sorted(set(plan.blobs.values())))
    return Grant(
        run=plan.run, round=plan.round, attempt=attempt, read=reads, write=most is not None, max_bytes=most or 0
    )
