"""The round loop: plan, send, collect, judge, aggregate, commit; then measure.

It knows no network and no model: messages go through a `Transport`, tensors through an `Exchange`, and updates
stream one at a time from the exchange into the aggregation.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from molehill.config import Config
from molehill.errors import FederationError, MessageError, MolehillError, ResumeError
from molehill.plan import ClientPlan, ClientReply, EvaluationReply
from molehill.secure.company import needed
from molehill.wire.clipping import norm
from molehill.wire.exchange import Exchange
from molehill.wire.message import Delta
from molehill.wire.store import load_tree, save_tree
from molehill.wire.tree import Tree
from molehill_server import checkpoint, events
from molehill_server.aggregate import Aggregator
from molehill_server.audit import AuditLog
from molehill_server.broadcast import Broadcast, patch_tree
from molehill_server.check import require
from molehill_server.counts import Count, counts_of
from molehill_server.exchange.grants import Grant, Grants
from molehill_server.norms import RoundNorms, kind_of, later, running, scale_of
from molehill_server.planning.planner import Planner, expected, select
from molehill_server.privacy.accountant import Accountant, Ledger
from molehill_server.privacy.draw import Draw
from molehill_server.privacy.journal import Entry, Facts, Journal
from molehill_server.privacy.mechanism import Mechanism
from molehill_server.privacy.secure import SecureRound, released
from molehill_server.records import Global, Update
from molehill_server.roster import Roster
from molehill_server.transport import POLL, Collection, Incoming, Outgoing, Patience, Transport
from molehill_server.validation import Limits, check_reply, open_delta, parse_reply, parse_scores, require_addressed

T = TypeVar("T")

_BACK = "Mend what kept the others away, then resume."
_ANSWER = 30.0  # seconds in which a node answers that has nothing to compute


class _BelowQuorum(Exception):  # noqa: N818 - not an error yet: the round may be tried again
    """Fewer clients answered than are needed.

    Args:
        need: How many are.
        why: What was missing, where it was no usable update.
    """

    def __init__(self, need: int, why: str = "") -> None:
        super().__init__(need)
        self.need, self.why = need, why


class _HeldBackError(Exception):
    """Whether a delta is too large can be told only when all are in."""


class _UnusableModelError(Exception):
    """A client says that the model it was sent cannot be trained."""


@dataclass
class _Round:
    """What is noted down while a round goes on; its bytes are all that came and went, also for nothing."""

    selected: list[str]
    counts: Mapping[str, Count]  # rows of the clients that are present
    norms: RoundNorms = field(default_factory=lambda: RoundNorms(follows=False))
    accepted: list[str] = field(default_factory=list)
    deltas: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    quarantined: dict[str, str] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, Mapping[str, float]] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: Mapping[str, float] | None = None  # means over rows, where no client tells its own
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def loss(self) -> float | None:
        """Mean training loss over rows; None when nobody trained."""
        return self._mean(self.losses) if self.figures is None else self.figures["loss"]

    @property
    def routing(self) -> dict[str, float | None]:
        """Mean of every routing loss over the rows of the clients that name it."""
        if self.figures is not None:
            return {name: figure for name, figure in sorted(self.figures.items()) if name != "loss"}
        names = sorted({name for metrics in self.metrics.values() for name in metrics})
        return {name: self._mean({c: m[name] for c, m in self.metrics.items() if name in m}) for name in names}

    def _mean(self, values: Mapping[str, float]) -> float | None:
        rows = sum(self.examples[client] for client in values)
        return sum(value * self.examples[client] for client, value in values.items()) / rows if rows else None


class _Done(NamedTuple):
    """What came of a round."""

    after: Global
    report: Mapping[str, float]
    notes: _Round
    ledger: Ledger | None


class Coordinator:
    """Runs one federation, from the start or from its last checkpoint.

    Args:
        config: The run's configuration.
        out: Run folder; holds ``initial.safetensors``, receives ``checkpoints/``, ``metrics.jsonl``,
            ``audit.jsonl`` and ``final.safetensors``.
        exchange: Where blobs and deltas lie.
        transport: Reaches the clients.
        grace: Overrides ``round.grace``, in seconds.
        introduction: What nodes are told when they are asked who they are.
        clients: How many nodes to wait for at the start, up to the round's deadline.
        grants: Told what every client may read and write, where the exchange asks for that; None where clients and
            server share it freely.

    Raises:
        ConfigError: The configuration combines things that do not go together.
        ResumeError: The folder holds a run with another configuration or base model, its audit log was changed, or
            its checkpoints are gone, or the last one under privacy.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        exchange: Exchange,
        transport: Transport,
        *,
        grace: float | None = None,
        introduction: str = "",
        clients: int = 1,
        grants: Grants | None = None,
    ) -> None:
        require(config)
        self._aggregator = Aggregator.from_config(config.federation, config.run.seed)
        self._config = config
        self._out = out
        self._exchange = exchange
        self._transport = transport
        self._grants = grants
        self._grace = config.round.grace if grace is None else grace
        self._initial, meta = load_tree(out / "initial.safetensors")
        if "base" not in meta:
            raise ResumeError("it does not say which base model it is for", where=str(out / "initial.safetensors"))
        self._limits = Limits.from_config(config)
        self._metrics = [ref.name for ref in config.molora.losses]
        self._planner = Planner(config, meta["base"])
        self._secure = config.privacy.secure_aggregation
        self._mechanism, self._accountant = Mechanism.of(config.privacy), Accountant.of(config)
        self._draw = Draw.of(config)
        identity = checkpoint.Identity(config.digest, meta["base"])
        loaded = checkpoint.load(out / "checkpoints", identity, config.wire.max_bytes)
        self._fresh = loaded is None
        ledger = Ledger() if self._accountant else None
        self._saved = loaded or checkpoint.Checkpoint(identity, Global(self._initial), {}, (), privacy=ledger)
        wire = config.wire
        self._broadcast = Broadcast(exchange, wire.down, wire.max_bytes, dict(self._saved.blobs))
        self._late: set[str] = set()
        self._capped: dict[str, Count] = {}  # as it was last told
        self._audit = AuditLog(out / "audit.jsonl", self._saved.audit)
        self._require_newest(loaded)
        if loaded is None:
            (out / "metrics.jsonl").unlink(missing_ok=True)
        else:
            events.rewind(out / "metrics.jsonl", loaded.log)
        self._log = events.EventLog(out / "metrics.jsonl", self._audit.record)
        self._journal = Journal(out / "masked-sum")
        self._roster = Roster(transport, self._log, introduction, clients)

    def _require_newest(self, loaded: checkpoint.Checkpoint | None) -> None:
        """Refuse to begin anew, or to forget what was spent, where the audit log knows of a later round."""
        last, mend = self._audit.round, "Bring it back, or start a new run in another folder."
        if loaded is None and last:
            what = f"there is no checkpoint any more, and round {last} was committed by the audit log"
            raise ResumeError(what, where=str(self._out / "checkpoints"), mend=mend)
        if loaded is not None and self._accountant is not None and last > loaded.glob.round:
            what = f"the checkpoint of round {last} is gone, and with it what that round spent of the privacy budget"
            raise ResumeError(what, where=str(self._out / "checkpoints"), mend=mend)

    def run(self) -> Tree:
        """Do all rounds that are left, then measure.

        Returns:
            The final shared model as clients received it; also saved, with the patches, as ``final.safetensors``.

        Raises:
            FederationError: A round stayed below its quorum, no client came, or none could be scored.
            PrivacyError: The next round would spend more than the privacy budget.
        """
        try:
            return self._run()
        except MolehillError as error:
            self._audit.append("stopped", reason=str(error))
            raise

    def _run(self) -> Tree:
        began = time.perf_counter()
        clients = self._roster.gather(self._config.round.deadline, self._config.round.quorum, self._grace)
        self._begin(clients)
        while self._saved.glob.round < self._config.run.rounds:
            self._round(self._saved.glob.round + 1)
        final = self._broadcast.publish(self._saved.glob)
        save_tree(
            self._out / "final.safetensors",
            Tree.of({**final.tree, **patch_tree(final.patches)}),
            {"base": self._saved.identity.base, "round": str(final.round)},
        )
        self._measure(final)
        self._broadcast.drop()
        totals = {"bytes_up": self._saved.bytes_up, "bytes_down": self._saved.bytes_down}
        self._log.emit("end", seconds=time.perf_counter() - began, **totals)
        return final.tree

    def _begin(self, nodes: Mapping[str, int]) -> None:
        clients = list(nodes)
        facts = {
            "run": self._config.run.name,
            "rounds": self._config.run.rounds,
            "clients": clients,
            "parameters": self._initial.layout.size,
            "config_digest": self._config.digest,
        }
        if self._fresh:
            self._log.emit("start", **facts)
            self._commit(replace(self._saved, clients=tuple(clients), rows=self._roster.rows(nodes)))
        else:
            self._log.emit("resume", round=self._saved.glob.round, **facts)
            self._note_version()  # again: a kill may have come between the commit and its note

    def _commit(self, state: checkpoint.Checkpoint) -> None:
        self._saved = replace(state, log=self._log.commit(), audit=self._audit.head)
        checkpoint.save(self._out / "checkpoints", self._saved)
        self._note_version()

    def _note_version(self) -> None:
        glob = self._saved.glob
        self._audit.append("version", round=glob.round, digest=glob.tree.digest)

    def _present(self) -> dict[str, int]:
        """The node of every client that is connected; clients that are new join the run."""
        nodes = self._roster.refresh(self._grace)
        newcomers = tuple(client for client in nodes if client not in self._saved.clients)
        if newcomers:
            rows = {**self._saved.rows, **self._roster.rows({client: nodes[client] for client in newcomers})}
            self._saved = replace(self._saved, clients=self._saved.clients + newcomers, rows=rows)
        for client in newcomers:
            self._log.emit("joined", client=client)
        return nodes

    def _gathered(self) -> dict[str, int]:
        """Who is connected once there are enough for a round, or when the round's deadline has passed."""
        end = self._transport.now() + self._config.round.deadline
        while len(nodes := self._present()) < self._config.round.min_clients and self._transport.now() < end:
            self._transport.wait(POLL)
        return nodes

    def _counts(self, nodes: Mapping[str, int]) -> dict[str, Count]:
        """What every client that is present counts for; those that count for fewer rows than they name are told of."""
        now = self._roster.rows(nodes)
        counts = counts_of(self._config, {**now, **self._saved.rows}, now)
        for client, count in counts.items():
            if count.why and self._capped.get(client) != count:
                self._log.emit("capped", client=client, rows=count.rows, counts=count.counts, reason=count.why)
            self._capped[client] = count
        return counts

    def _norms(self, glob: Global, number: int) -> RoundNorms:
        """What the deltas of a round are held against."""
        if self._config.round.norm_bound != "auto" or self._config.privacy.clip is not None:
            return RoundNorms(follows=False)
        kind = kind_of(self._any_plan(number, glob), glob.tree.layout)
        return RoundNorms(kind, running(self._saved.norms.get(kind, ())))

    # Training

    def _round(self, number: int) -> None:
        """One round with its retries."""
        began = time.perf_counter()
        glob = self._broadcast.publish(self._saved.glob)
        after, report, notes, ledger = self._resumed(glob, number) or self._attempts(glob, number)
        spent = {"epsilon": self._accountant.epsilon(ledger.rounds)} if self._accountant and ledger else {}
        self._log.emit(
            "round",
            round=number,
            seconds=time.perf_counter() - began,
            selected=notes.selected,
            accepted=notes.accepted,
            deltas=notes.deltas,
            missing=notes.missing,
            quarantined=notes.quarantined,
            unusable=notes.unusable,
            norms=notes.norms.found,
            norm_bound=notes.norms.bound or self._limits.norm_bound,
            loss=notes.loss,
            loss_by_client=notes.losses,
            routing=notes.routing,
            bytes_up=notes.bytes_up,
            bytes_down=notes.bytes_down,
            tokens=notes.tokens,
            report={**report, **spent},
        )
        self._commit(
            replace(
                self._saved,
                glob=after,
                blobs=dict(self._broadcast.blobs),
                bytes_up=self._saved.bytes_up + notes.bytes_up,
                bytes_down=self._saved.bytes_down + notes.bytes_down,
                privacy=ledger,
                norms=later(self._saved.norms, notes.norms.kind, notes.norms.median(notes.accepted)),
                accepted={**self._saved.accepted, **dict.fromkeys(notes.accepted, number)},
            )
        )
        self._journal.drop()

    def _attempts(self, glob: Global, number: int) -> _Done:
        up = down = 0  # bytes of the attempts before
        need, why = 0, ""
        # After a kill the attempt goes on under its own number, so that deltas that were uploaded in it still count.
        first = 0 if self._grants is None else self._grants.attempt(self._config.run.name, number)
        if self._secure and self._grants is not None:
            first += 1  # masked anew with other keys, so what was uploaded does not count
        for attempt in range(first, first + self._config.round.retries + 1):
            nodes = self._gathered()
            notes = _Round([], self._counts(nodes), bytes_up=up, bytes_down=down)
            try:
                notes.selected, ledger = self._choose(list(nodes), number, attempt)
                if self._secure:
                    return self._unmask(glob, self._masked_sum(glob, number, attempt, nodes, notes, ledger))
                return _Done(*self._attempt(glob, number, attempt, nodes, notes), notes, ledger)
            except _BelowQuorum as few:
                self._journal.drop()  # if there is a sum, nobody was asked to unmask it
                up, down, need, why = notes.bytes_up, notes.bytes_down, few.need, few.why
                self._log.emit(
                    "retry",
                    round=number,
                    attempt=attempt,
                    missing=notes.missing,
                    quarantined=notes.quarantined,
                    unusable=notes.unusable,
                )
        if len(nodes) < self._config.round.min_clients:
            raise FederationError(
                f"round {number} cannot begin: {len(nodes)} clients are connected, "
                f"{self._config.round.min_clients} are needed",
                mend="Start the others, then resume.",
            )
        raise FederationError(f"round {number}: {why}", mend=_BACK) if why else _below_quorum(number, notes, need)

    def _choose(self, pool: list[str], number: int, attempt: int) -> tuple[list[str], Ledger | None]:
        """The clients of a round, and what will have been spent after it.

        Raises:
            _BelowQuorum: Too few are connected for a round to begin.
            PrivacyError: That is more than there is.
        """
        if len(pool) < self._config.round.min_clients:
            raise _BelowQuorum(self._config.round.min_clients)
        ledger = self._saved.privacy
        secret = None if ledger is None else ledger.secret
        chosen = select(self._config, pool, number, attempt, secret=secret)
        if self._accountant and ledger:
            ledger = ledger.after(self._draw.spent(len(pool), len(chosen)))
            self._accountant.require(ledger.rounds)
        return chosen, ledger

    def _attempt(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: _Round
    ) -> tuple[Global, Mapping[str, float]]:
        notes.norms = self._norms(glob, number)
        plans = self._bounded(self._plans(notes.selected, number, glob), glob, notes.norms)
        self._grant(plans, attempt, self._limits.delta(glob.tree.layout))
        quorum = len(plans) if self._draw.secret else self._quorum(len(plans))
        collection = self._send("train", plans, nodes, f"{number}.{attempt}", self._patience(quorum))
        updates = self._updates(glob, plans, collection, notes)
        if not (plans or self._draw.secret):
            return replace(glob, round=number), {}  # nobody was drawn
        if plans and not any(plan.scope(key) == "shared" for plan in plans.values() for key in glob.tree):
            for _ in updates:  # nothing is shared: the clients train for themselves and there is nothing to combine
                pass
            return replace(glob, round=number), {}
        if self._mechanism is None:
            return self._aggregator(glob, updates)
        layout = expected(self._any_plan(number, glob), glob.tree.layout)
        planned = self._draw.expected(len(nodes), len(plans))
        released, report = self._mechanism.release(glob, updates, layout, planned)
        after, merged = self._aggregator(glob, [released])
        return after, {**merged, **report}

    def _plans(self, clients: Iterable[str], number: int, glob: Global) -> dict[str, ClientPlan]:
        """A plan per client, whose turn is its place among all clients in the order in which they came."""
        turns = {client: turn for turn, client in enumerate(self._saved.clients)}
        layout, digests, accepted = glob.tree.layout, self._broadcast.digests(), self._saved.accepted
        return {
            client: self._planner.plan(client, number, layout, digests, turns[client], accepted.get(client, 0))
            for client in clients
        }

    def _bounded(self, plans: Mapping[str, ClientPlan], glob: Global, norms: RoundNorms) -> dict[str, ClientPlan]:
        """Plans that say which norm is small enough for certain."""

        def bound(plan: ClientPlan) -> float | None:
            return norms.safe(scale_of(plan, glob.tree.layout)) if norms.follows else self._limits.norm_bound

        return {client: plan.model_copy(update={"norm_bound": bound(plan)}) for client, plan in plans.items()}

    def _any_plan(self, number: int, glob: Global) -> ClientPlan:
        """What all plans of a round have in common where clients have one rank; nobody need be here for it."""
        return self._planner.plan("", number, glob.tree.layout, self._broadcast.digests(), 0)

    def _updates(
        self, glob: Global, plans: Mapping[str, ClientPlan], collection: Collection, notes: _Round
    ) -> Iterator[Update]:
        """Yield the accepted updates one at a time, as they arrive; at the end those whose norms were held back.

        Raises:
            _BelowQuorum: After the last one, when there were too few; not where the draw is secret.
        """
        held: dict[str, Incoming] = {}
        for done, (client, reply) in enumerate(collection, start=1):
            update = None
            try:
                update = self._judge(glob, plans[client], reply, notes)
            except _HeldBackError:
                held[client] = reply
            except _UnusableModelError as error:
                notes.unusable[client] = str(error)
            except MessageError as error:
                notes.quarantined[client] = str(error)
            self._log.emit("progress", stage="train", done=done, total=len(plans), client=client)
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
        self._forget(collection)
        if not self._draw.secret and len(notes.accepted) < self._quorum(len(plans)):
            raise _BelowQuorum(self._quorum(len(plans)))

    # Secure aggregation

    def _masked_sum(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: _Round, ledger: Ledger | None
    ) -> Entry:
        """Have clients exchange keys and shares, train and mask; returns the sum of what arrived, still masked.

        Raises:
            _BelowQuorum: Too few clients stayed. Nothing was unmasked, so the round may be tried again.
        """
        plans = self._plans(notes.selected, number, glob)
        quorum = self._quorum(len(plans))
        floor = needed(self._config)  # below it clients refuse
        if len(plans) < floor:
            raise _BelowQuorum(floor)
        layout = expected(next(iter(plans.values())), glob.tree.layout)
        counts = {client: notes.counts[client].counts for client in plans}
        secure = SecureRound.begin(self._config, layout, number, attempt, counts)
        group = f"{number}.{attempt}"
        patience = self._patience(max(floor, quorum))
        self._stage("query.keys", secure.ask_keys(), secure.take_keys, nodes, group, patience, notes)
        need = max(secure.threshold, quorum)
        patience = self._patience(need)
        self._stage("query.shares", secure.ask_shares(), secure.take_shares, nodes, group, patience, notes)
        plans = {
            client: plans[client].model_copy(update={"company": company})
            for client, company in secure.companies().items()
        }
        most = min(self._limits.max_bytes, secure.largest)
        self._grant(plans, attempt, most)
        collection = self._send("train", plans, nodes, group, patience)
        for done, (client, reply) in enumerate(collection, start=1):
            plan = plans[client]
            try:
                self._open(plan, reply, notes, most, partial(secure.add, plan))
                collection.accept()
            except _UnusableModelError as error:
                notes.unusable[client] = str(error)
            except MessageError as error:
                notes.quarantined[client] = str(error)
            self._log.emit("progress", stage="train", done=done, total=len(plans), client=client)
        notes.missing += collection.missing
        self._forget(collection)
        if len(notes.accepted) < need:
            raise _BelowQuorum(need)
        names = Facts.model_fields.keys() - {"drawn"}
        facts = Facts(**{name: getattr(notes, name) for name in names}, drawn=ledger and ledger.rounds[-1])
        entry = Entry(secure.progress, facts, secure.total)
        self._journal.keep(entry)
        return entry

    def _resumed(self, glob: Global, number: int) -> _Done | None:
        """What comes of a masked sum that an earlier process has left; None when there is none, or too few agree."""
        entry = self._journal.load(self._config.run.name, number) if self._secure else None
        if entry is not None:
            with suppress(_BelowQuorum):
                return self._unmask(glob, entry)
            self._journal.drop()
        return None

    def _unmask(self, glob: Global, entry: Entry) -> _Done:
        """Have the clients agree on who is in a sum, have its masks taken off, and merge it.

        Raises:
            _BelowQuorum: Too few agreed. Nothing was unmasked, so the round may be tried again.
            FederationError: Too few clients helped, or the masks do not cancel.
        """
        progress, facts = entry.progress, entry.facts
        layout = expected(self._any_plan(progress.round, glob), glob.tree.layout)
        secure = SecureRound(self._config, layout, progress, entry.total)
        self._agree(secure)
        self._journal.keep(entry)  # with the signatures: what is asked from here on is asked the same after a kill
        self._gather_shares(secure)
        sums, figures = secure.finish()
        notes = _Round(**facts.model_dump(exclude={"drawn"}), counts={}, figures=figures)
        if self._mechanism is None:
            after, report = self._aggregator(glob, [released(sums, glob, layout)])
        else:
            total = sums.change / progress.cap
            update, noise = self._mechanism.noisy(glob, layout, total, len(progress.arrived), len(facts.selected))
            after, report = self._aggregator(glob, [update])
            report |= noise
        ledger = self._saved.privacy
        if ledger is not None and facts.drawn is not None:
            ledger = ledger.after(facts.drawn)
        return _Done(after, {**report, "updates": len(progress.arrived)}, notes, ledger)

    def _agree(self, secure: SecureRound) -> None:
        """Have those who are in the sum sign who that is: they unmask nothing that not enough of them have signed.

        Raises:
            _BelowQuorum: They did not.
        """
        said = _Round([], {})
        self._insist("agree", secure, secure.ask_agree, secure.take_agreement, said)
        signed, need = len(secure.progress.signatures), secure.threshold
        if signed < need:
            raise _BelowQuorum(need, f"{signed} clients signed who is in the sum, {need} are needed; {_why(said)}")

    def _gather_shares(self, secure: SecureRound) -> None:
        """Ask those who are in the sum for their shares until there are enough, for as long as a round may take.

        No other sum of this round will do, so it is worth to wait for clients that dropped out.

        Raises:
            FederationError: They did not come back.
        """
        progress, said = secure.progress, _Round([], {})
        self._insist("unmask", secure, secure.ask_unmask, secure.take_unmask, said)
        if secure.answers >= secure.threshold:
            return
        raise FederationError(
            f"{secure.answers} of {len(progress.arrived)} clients helped to unmask the sum, {secure.threshold} are "
            f"needed; {_why(said)}",
            where=f"round {progress.round}",
            mend="The sum is kept: start the clients that are in it, and go on with --resume.",
        )

    def _insist(
        self,
        what: str,
        secure: SecureRound,
        questions: Callable[[], Mapping[str, BaseModel]],
        take: Callable[[str, str], None],
        said: _Round,
    ) -> None:
        """Ask those who are in a sum until as many have answered as the threshold, for as long as a round may take.

        Args:
            what: The question, ``agree`` or ``unmask``.
            secure: The sum.
            questions: Asked for the questions to those that have not answered.
            take: Takes an answer.
            said: Filled with who did not answer in the end, and why others do not count.
        """
        progress, deadline = secure.progress, self._config.round.deadline
        end = self._transport.now() + deadline
        each = max(self._grace, deadline / 20, min(deadline, _ANSWER))
        for again in itertools.count():
            left = questions()
            need = secure.threshold - (len(progress.arrived) - len(left))
            if need <= 0:
                return
            nodes = self._present()
            asked = {client: ask for client, ask in left.items() if client in nodes}
            group = f"{progress.round}.{progress.attempt}.{what}.{again}"
            with suppress(_BelowQuorum):
                self._stage(f"query.{what}", asked, take, nodes, group, Patience(each, need, 0.0), said)
                return
            said.missing = sorted(questions().keys() - said.quarantined.keys())
            if not again:
                self._log.emit(
                    "retry",
                    round=progress.round,
                    attempt=progress.attempt,
                    missing=said.missing,
                    quarantined=said.quarantined,
                )
            if self._transport.now() >= end:
                return
            self._transport.wait(max(self._grace, POLL))

    def _stage(
        self,
        kind: str,
        questions: Mapping[str, BaseModel],
        take: Callable[[str, str], None],
        nodes: Mapping[str, int],
        group: str,
        patience: Patience,
        notes: _Round,
    ) -> None:
        """Ask a question of a protocol and pass the answers on.

        Raises:
            _BelowQuorum: Fewer answered than are needed.
        """
        collection = self._send(kind, questions, nodes, group, patience)
        answers = 0
        for client, reply in collection:
            try:
                take(client, _text(reply))
            except MessageError as error:
                notes.quarantined[client] = str(error)
                continue
            collection.accept()
            answers += 1
        notes.missing += collection.missing
        self._forget(collection)
        if answers < patience.quorum:
            raise _BelowQuorum(patience.quorum)

    # Judging

    def _judge(
        self, glob: Global, plan: ClientPlan, incoming: Incoming, notes: _Round, *, again: bool = False
    ) -> Update:
        """The update that a reply points at.

        Raises:
            MessageError: It cannot be used.
            _HeldBackError: It must be judged again when all are in.
            _UnusableModelError: There is none, for no fault of the client's.
        """
        model = glob.tree.layout

        def read(blob: bytes, reply: ClientReply) -> tuple[Delta, ClientReply]:
            delta = open_delta(blob, reply, plan, model, self._limits)
            if again:
                refusal = notes.norms.refusal(plan.client)
                if refusal:
                    raise MessageError(refusal)
            elif notes.norms.held(plan.client, norm(delta.tree.flat), scale_of(plan, model)):
                raise _HeldBackError
            return delta, reply

        delta, reply = self._open(plan, incoming, notes, self._limits.delta(model), read, again=again)
        assert reply.loss is not None  # it was checked
        notes.losses[plan.client] = reply.loss
        notes.metrics[plan.client] = {name: reply.metrics[name] for name in self._metrics if name in reply.metrics}
        notes.examples[plan.client] = notes.counts[plan.client].counts
        experts = notes.tokens.setdefault(plan.client, {})
        for (_, expert), count in delta.tokens.items():
            experts[expert] = experts.get(expert, 0.0) + count
        values = delta.tree
        for key, shape in values.layout.items():
            values[key][...] += glob.tree[key][tuple(map(slice, shape))]  # a lower rank is the first part
        return Update(plan.client, values, notes.examples[plan.client], delta.tokens)

    def _open(
        self,
        plan: ClientPlan,
        incoming: Incoming,
        notes: _Round,
        most: int,
        read: Callable[[bytes, ClientReply], T],
        *,
        again: bool = False,
    ) -> T:
        """Fetch and judge what a reply to ``plan`` points at, ``most`` bytes of it; they count once.

        Raises:
            MessageError: It cannot be used.
            _HeldBackError: It is needed again.
            _UnusableModelError: There is nothing to fetch, for no fault of the client's.
        """
        reply = parse_reply(_text(incoming))
        if reply.unusable:
            require_addressed(reply, plan)
            raise _UnusableModelError(reply.unusable)
        held = False
        try:
            notes.bytes_down += 0 if again else min(reply.bytes_down, self._broadcast.size)
            blob = self._exchange.get(reply.delta, most)
            notes.bytes_up += 0 if again else len(blob)
            check_reply(reply, plan, notes.counts[plan.client].rows)
            found = read(blob, reply)
        except _HeldBackError:
            held = True
            raise
        finally:
            if not held:
                self._discard(reply.delta)
        self._note_start(plan, reply)
        notes.accepted.append(plan.client)
        notes.deltas[plan.client] = reply.delta
        return found

    def _note_start(self, plan: ClientPlan, reply: ClientReply | EvaluationReply) -> None:
        """Say so when a client does not go on from where it was: what it kept for itself is gone."""
        if reply.started is not None and reply.started < plan.accepted:
            facts = {"client": plan.client, "round": plan.round, "kept": reply.started, "accepted": plan.accepted}
            self._log.emit("anew", **facts)

    def _grant(self, plans: Mapping[str, ClientPlan], attempt: int, most: int) -> None:
        """Let these clients, and no others, send their deltas of this attempt, of ``most`` bytes."""
        if self._grants is not None:
            self._grants.renew({client: _grant(plan, attempt, most) for client, plan in plans.items()})

    def _quorum(self, count: int) -> int:
        part = math.ceil(self._config.round.quorum * count)
        return max(self._aggregator.rule.least, self._config.round.min_clients, part)

    def _send(
        self,
        kind: str,
        plans: Mapping[str, BaseModel],
        nodes: Mapping[str, int],
        group: str,
        patience: Patience,
    ) -> Collection:
        messages = [
            (client, Outgoing(nodes[client], kind, group, plan.model_dump_json(), patience.deadline))
            for client, plan in plans.items()
        ]
        return Collection(self._transport, messages, patience, self._late)

    def _patience(self, quorum: int) -> Patience:
        return Patience(self._config.round.deadline, quorum, self._grace)

    def _forget(self, collection: Collection) -> None:
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

    # Measuring

    def _measure(self, final: Global) -> None:
        """Ask every client for its scores: trained alone from the start (if configured), and with the final model.

        Raises:
            FederationError: Nobody's scores with the final model came.
        """
        nodes = self._gathered()
        absent = {client: "it is not connected" for client in self._saved.clients if client not in nodes}
        for client, reason in absent.items():
            self._log.emit("failed", stage="evaluate", client=client, reason=reason)
        replies: dict[str, list[EvaluationReply]] = {client: [] for client in nodes}
        if self._config.evaluate.baselines:
            self._ask("train.baseline", "baseline", self._plans(nodes, 0, final), nodes, replies)
        failed = self._ask("evaluate", "evaluate", self._plans(nodes, final.round, final), nodes, replies)
        for client, parts in replies.items():
            hello = self._roster.hello(nodes[client])
            self._log.emit(
                "evaluation",
                client=client,
                n_train=hello.n_train,
                n_test=hello.n_test,
                cut=hello.cut,
                lost=hello.lost,
                unlearnt=hello.unlearnt,
                stages={stage: scores.model_dump() for part in parts for stage, scores in part.stages.items()},
                tokens=parts[-1].tokens if parts else {},
            )
        if len(failed) == len(nodes):
            reasons = "; ".join(f"{client}: {reason}" for client, reason in {**absent, **failed}.items())
            raise FederationError(f"no client could be scored with the final model: {reasons or 'there is none'}")

    def _ask(
        self,
        kind: str,
        stage: str,
        plans: Mapping[str, ClientPlan],
        nodes: Mapping[str, int],
        replies: Mapping[str, list[EvaluationReply]],
    ) -> dict[str, str]:
        """Add the answers to ``replies``, asking again who fails; returns why the others did not answer."""
        self._log.emit("stage", stage=stage, total=len(plans))
        if self._grants is not None:
            self._grants.renew({client: _grant(plan) for client, plan in plans.items()})
        failed = dict.fromkeys(plans, "")
        for attempt in range(self._config.round.retries + 1):
            there = nodes if attempt == 0 else {**nodes, **self._gathered()}
            left = {client: plans[client] for client in failed}
            failed = self._ask_once(kind, stage, left, there, f"{kind}.{attempt}", replies)
            if not failed:
                break
        for client, reason in failed.items():
            self._log.emit("failed", stage=stage, client=client, reason=reason)
        return failed

    def _ask_once(
        self,
        kind: str,
        stage: str,
        plans: Mapping[str, ClientPlan],
        nodes: Mapping[str, int],
        group: str,
        replies: Mapping[str, list[EvaluationReply]],
    ) -> dict[str, str]:
        failed = {}
        collection = self._send(kind, plans, nodes, group, self._patience(len(plans)))
        for done, (client, reply) in enumerate(collection, start=1):
            try:
                answer = parse_scores(_text(reply), client, kind, self._initial.layout)
            except MessageError as error:
                failed[client] = error.what
            else:
                self._note_start(plans[client], answer)
                replies[client].append(answer)
                collection.accept()
            self._log.emit("progress", stage=stage, done=done, total=len(plans), client=client)
        for client in collection.missing:
            failed[client] = "no answer before the deadline"
        self._forget(collection)
        return failed


def _grant(plan: ClientPlan, attempt: int = 0, max_bytes: int | None = None) -> Grant:
    """What a plan lets its client do; without ``max_bytes`` it sends no delta."""
    reads = tuple(sorted(set(plan.blobs.values())))
    write = max_bytes is not None
    return Grant(run=plan.run, round=plan.round, attempt=attempt, read=reads, write=write, max_bytes=max_bytes or 0)


def _text(incoming: Incoming) -> str:
    if incoming.text is None:
        raise MessageError(incoming.error)
    return incoming.text


def _below_quorum(number: int, notes: _Round, need: int) -> FederationError:
    """Say who answered in a round that failed, and why the others did not count."""
    parts = [f"round {number} is below its quorum: {len(notes.accepted)} of {len(notes.selected)} clients answered"]
    parts.append(f"with a usable update, {need} are needed")
    parts += filter(None, [_why(notes)])
    if not notes.unusable:
        return FederationError("; ".join(parts), mend=_BACK)
    client, reason = next(iter(notes.unusable.items()))
    parts.append(f"{', '.join(notes.unusable)} cannot train the model they were sent ({client}: {reason.rstrip('.')})")
    mend = (
        f"What was merged in round {number - 1} may have ruined the model: compare the norms in the report, and begin "
        "anew with a lower round.norm_bound or a rule against bad clients."
        if number > 1
        else "Lower train.lr, or set base.precision to fp32."
    )
    return FederationError("; ".join(parts), mend=mend)


def _why(notes: _Round) -> str:
    """Who did not answer, and why others do not count."""
    parts = [f"no answer from {', '.join(notes.missing)}"] if notes.missing else []
    return "; ".join([*parts, *(f"{client}: {reason}" for client, reason in notes.quarantined.items())])
