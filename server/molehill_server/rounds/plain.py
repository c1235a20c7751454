"""A plain round: clients train, and their deltas are judged and merged one at a time, as they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice

from molehill import evidence
from molehill.config import Config
from molehill.errors import MessageError
from molehill.plan import ClientPlan, ClientReply
from molehill.wire.clipping import norm
from molehill.wire.message import Delta
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.norms import RoundNorms, kind_of, running, scale_of
from molehill_server.planning.assigning import added, embedded, placed, routed
from molehill_server.planning.planner import expected, looked_at
from molehill_server.privacy.accountant import Ledger
from molehill_server.privacy.draw import Draw
from molehill_server.privacy.mechanism import Mechanism
from molehill_server.records import Global, Update
from molehill_server.rounds.crew import Crew
from molehill_server.rounds.notes import BelowQuorum, Notes, UnusableModelError
from molehill_server.rounds.post import NotYetError, Post
from molehill_server.rounds.record import Record
from molehill_server.rounds.way import Done
from molehill_server.transport import Collection, Incoming
from molehill_server.validation import Limits, open_delta, require_embeddings, require_places


class PlainRound:
    """Does rounds in which the server sees every delta.

    Args:
        config: The run's configuration.
        aggregator: Merges updates.
        post: Reaches the clients.
        crew: Says how many must answer.
        record: Holds the norms of earlier rounds; told how far a round is.
    """

    anew = False  # deltas that were uploaded before a kill count

    def __init__(self, config: Config, aggregator: Aggregator, post: Post, crew: Crew, record: Record) -> None:
        self._aggregator = aggregator
        self._post = post
        self._crew = crew
        self._record = record
        self._limits = Limits.from_config(config)
        self._looked_at = looked_at(config, record.layout)
        self._forms: bool = config.federation.assign.declared("assignment", "forms")
        self._asks, self._gathers = evidence.embedded(config), evidence.placed(config)
        self._metrics = [ref.name for ref in config.molora.losses]
        self._mechanism, self._draw = Mechanism.of(config.privacy), Draw.of(config)
        self._follows = config.round.norm_bound == "auto" and config.privacy.clip is None

    def resumed(self, glob: Global, number: int) -> None:
        """Nothing: what was uploaded before a kill counts in the next attempt."""

    def forget(self) -> None:
        """Nothing is kept."""

    def attempt(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: Notes, ledger: Ledger | None
    ) -> Done:
        """Do a round; see `molehill_server.rounds.way.Way`.

        Raises:
            BelowQuorum: Too few sent a usable update.
        """
        after, report = self._merged(glob, number, attempt, nodes, notes)
        return Done(after, report, notes, ledger)

    def _merged(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: Notes
    ) -> tuple[Global, Mapping[str, float]]:
        notes.norms = self._norms(glob, number)
        plans = self._bounded(self._post.plans(notes.selected, number, glob), glob, notes.norms)
        self._post.grant(plans, attempt, self._limits.delta(glob.tree.layout))
        quorum = len(plans) if self._draw.secret else self._crew.quorum(len(plans))
        collection = self._post.send("train", plans, nodes, f"{number}.{attempt}", self._post.patience(quorum))
        updates = self._updates(glob, plans, collection, notes)
        if not (plans or self._draw.secret):
            return replace(glob, round=number), {}  # nobody was drawn
        if plans and not any(plan.scope(key) == "shared" for plan in plans.values() for key in glob.tree):
            for _ in updates:  # nothing is shared: the clients train for themselves and there is nothing to combine
                pass
            return replace(glob, round=number), {}
        if self._mechanism is None and any(plan.apart for plan in plans.values()):
            updates = _joint(updates, plans)
            first = list(islice(updates, 1))
            return self._aggregator(glob, chain(first, updates)) if first else (replace(glob, round=number), {})
        if self._mechanism is None:
            return self._aggregator(glob, updates)
        layout = expected(self._post.any_plan(number, glob), glob.tree.layout)
        planned = self._draw.expected(len(nodes), len(plans))
        released, report = self._mechanism.release(glob, updates, layout, planned)
        after, merged = self._aggregator(glob, [released])
        return after, {**merged, **report}

    def _norms(self, glob: Global, number: int) -> RoundNorms:
        """What the deltas of a round are held against."""
        if not self._follows:
            return RoundNorms(follows=False)
        kind = kind_of(self._post.any_plan(number, glob), glob.tree.layout)
        return RoundNorms(kind, running(self._record.saved.norms.get(kind, ())))

    def _bounded(self, plans: Mapping[str, ClientPlan], glob: Global, norms: RoundNorms) -> dict[str, ClientPlan]:
        """Plans that say which norm is small enough for certain."""

        def bound(plan: ClientPlan) -> float | None:
            return norms.safe(scale_of(plan, glob.tree.layout)) if norms.follows else self._limits.norm_bound

        return {client: plan.model_copy(update={"norm_bound": bound(plan)}) for client, plan in plans.items()}

    def _updates(
        self, glob: Global, plans: Mapping[str, ClientPlan], collection: Collection, notes: Notes
    ) -> Iterator[Update]:
        """Yield the accepted updates one at a time, as they arrive; at the end those whose norms were held back.

        Raises:
            BelowQuorum: After the last one, when there were too few; not where the draw is secret.
        """
        held: dict[str, Incoming] = {}
        for done, (client, reply) in enumerate(collection, start=1):
            update = None
            try:
                update = self._judge(glob, plans[client], reply, notes)
            except NotYetError:
                held[client] = reply
            except UnusableModelError as error:
                notes.unusable[client] = str(error)
            except MessageError as error:
                notes.quarantined[client] = str(error)
            self._record.log.emit("progress", stage="train", done=done, total=len(plans), client=client)
            if update is not None or (client in held and notes.norms.running is None):  # in a first round all are held
                collection.accept()
            if update is not None:
                yield update
        for client, reply in held.items():
            try:
                yield self._judge(glob, plans[client], reply, notes, again=True)
            except MessageError as error:
                notes.quarantined[client] = str(error)
        notes.missing = collection.missing
        self._post.forget(collection)
        quorum = self._crew.quorum(len(plans))
        if not self._draw.secret and len(notes.accepted) < quorum:
            raise BelowQuorum(quorum)

    def _judge(
        self, glob: Global, plan: ClientPlan, incoming: Incoming, notes: Notes, *, again: bool = False
    ) -> Update:
        """The update that a reply points at.

        Raises:
            MessageError: It cannot be used.
            NotYetError: It must be judged again when all are in: only then can be told whether it is too large.
            UnusableModelError: There is none, for no fault of the client's.
        """
        model = glob.tree.layout

        def read(blob: bytes, reply: ClientReply) -> tuple[Delta, ClientReply]:
            delta = open_delta(blob, reply, plan, model, self._limits)
            require_embeddings(reply, plan, model, asked=self._asks)
            require_places(reply, plan, model, asked=self._gathers and plan.apart)
            if again:
                refusal = notes.norms.refusal(plan.client)
                if refusal:
                    raise MessageError(refusal)
            elif notes.norms.held(plan.client, norm(delta.tree.flat), scale_of(plan, model)):
                raise NotYetError
            return delta, reply

        delta, reply = self._post.open(plan, incoming, notes, self._limits.delta(model), read, again=again)
        assert reply.loss is not None  # it was checked
        notes.losses[plan.client] = reply.loss
        notes.metrics[plan.client] = {name: reply.metrics[name] for name in self._metrics if name in reply.metrics}
        notes.examples[plan.client] = notes.counts[plan.client].counts
        experts = notes.tokens.setdefault(plan.client, {})
        for (_, expert), count in delta.tokens.items():
            experts[expert] = experts.get(expert, 0.0) + count
        values = delta.tree
        if self._looked_at and plan.apart == self._forms:
            notes.seen[plan.client] = added(None, values, self._looked_at)
        if reply.embeddings:
            notes.seen[plan.client] = embedded(reply.embeddings, routed(model))
        if reply.places:
            notes.seen[plan.client] = Tree.of({**notes.seen[plan.client], **placed(reply.places)})
        for key, shape in values.layout.items():
            values[key][...] += glob.tree[key][tuple(map(slice, shape))]  # a lower rank is the first part
        return Update(plan.client, values, notes.examples[plan.client], delta.tokens)


def _joint(updates: Iterator[Update], plans: Mapping[str, ClientPlan]) -> Iterator[Update]:
    """The updates of the shared model; what clients send that train apart is none."""
    for update in updates:
        if not plans[update.client].apart:
            yield update
        del update  # or it would still be in memory while the next is decoded
