"""A masked round: clients exchange keys, train, mask, and help to take the masks off the sum of those that stayed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from molehill.config import Config
from molehill.errors import FederationError, MessageError
from molehill.secure.company import needed
from molehill_server.aggregate import Aggregator
from molehill_server.planning.planner import expected
from molehill_server.privacy.accountant import Ledger
from molehill_server.privacy.journal import Entry, Facts, Journal
from molehill_server.privacy.mechanism import Mechanism
from molehill_server.privacy.secure import SecureRound, released
from molehill_server.records import Global
from molehill_server.rounds.crew import Crew
from molehill_server.rounds.notes import BelowQuorum, Notes, UnusableModelError
from molehill_server.rounds.post import Post, text_of
from molehill_server.rounds.record import Record
from molehill_server.rounds.way import Done
from molehill_server.transport import POLL, Patience, Transport

_ANSWER = 30.0  # seconds in which a node answers that has nothing to compute


class MaskedRound:
    """Does rounds in which the server sees nothing but sums.

    Args:
        config: The run's configuration.
        aggregator: Merges the sum.
        post: Reaches the clients.
        crew: Says who is there, and how many must answer.
        record: Holds what was spent; told how far a round is.
        transport: Has the time.
        grace: Seconds to wait for the rest once there are enough.
        out: Run folder, where a sum is kept until its round is committed.
    """

    anew = True  # masked with other keys

    def __init__(
        self,
        config: Config,
        aggregator: Aggregator,
        post: Post,
        crew: Crew,
        record: Record,
        transport: Transport,
        grace: float,
        out: Path,
    ) -> None:
        self._config = config
        self._aggregator = aggregator
        self._post = post
        self._crew = crew
        self._record = record
        self._transport = transport
        self._grace = grace
        self._max_bytes = config.wire.max_bytes
        self._mechanism = Mechanism.of(config.privacy)
        self._journal = Journal(out / "masked-sum")

    def resumed(self, glob: Global, number: int) -> Done | None:
        """What comes of a masked sum that an earlier process has left; None when there is none, or too few agree."""
        entry = self._journal.load(self._config.run.name, number)
        if entry is not None:
            with suppress(BelowQuorum):
                return self._unmask(glob, entry)
            self._journal.drop()
        return None

    def attempt(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: Notes, ledger: Ledger | None
    ) -> Done:
        """Do a round; see `molehill_server.rounds.way.Way`.

        Raises:
            BelowQuorum: Too few clients stayed or agreed. Nothing was unmasked.
            FederationError: Too few clients helped to unmask, or the masks do not cancel.
        """
        return self._unmask(glob, self._masked_sum(glob, number, attempt, nodes, notes, ledger))

    def forget(self) -> None:
        """Drop the sum: its round is committed, or nobody was asked to unmask it."""
        self._journal.drop()

    def _masked_sum(
        self, glob: Global, number: int, attempt: int, nodes: Mapping[str, int], notes: Notes, ledger: Ledger | None
    ) -> Entry:
        """Have clients exchange keys and shares, train and mask; returns the sum of what arrived, still masked.

        Raises:
            BelowQuorum: Too few clients stayed. Nothing was unmasked, so the round may be tried again.
        """
        plans = self._post.plans(notes.selected, number, glob)
        quorum = self._crew.quorum(len(plans))
        floor = needed(self._config)  # below it clients refuse
        if len(plans) < floor:
            raise BelowQuorum(floor)
        layout = expected(next(iter(plans.values())), glob.tree.layout)
        counts = {client: notes.counts[client].counts for client in plans}
        secure = SecureRound.begin(self._config, layout, number, attempt, counts)
        group = f"{number}.{attempt}"
        patience = self._post.patience(max(floor, quorum))
        self._stage("query.keys", secure.ask_keys(), secure.take_keys, nodes, group, patience, notes)
        need = max(secure.threshold, quorum)
        patience = self._post.patience(need)
        self._stage("query.shares", secure.ask_shares(), secure.take_shares, nodes, group, patience, notes)
        plans = {
            client: plans[client].model_copy(update={"company": company})
            for client, company in secure.companies().items()
        }
        most = min(self._max_bytes, secure.largest)
        self._post.grant(plans, attempt, most)
        collection = self._post.send("train", plans, nodes, group, patience)
        for done, (client, reply) in enumerate(collection, start=1):
            plan = plans[client]
            try:
                self._post.open(plan, reply, notes, most, partial(secure.add, plan))
                collection.accept()
            except UnusableModelError as error:
                notes.unusable[client] = str(error)
            except MessageError as error:
                notes.quarantined[client] = str(error)
            self._record.log.emit("progress", stage="train", done=done, total=len(plans), client=client)
        notes.missing += collection.missing
        self._post.forget(collection)
        if len(notes.accepted) < need:
            raise BelowQuorum(need)
        names = Facts.model_fields.keys() - {"drawn"}
        facts = Facts(**{name: getattr(notes, name) for name in names}, drawn=ledger and ledger.rounds[-1])
        entry = Entry(secure.progress, facts, secure.total)
        self._journal.keep(entry)
        return entry

    def _unmask(self, glob: Global, entry: Entry) -> Done:
        """Have the clients agree on who is in a sum, have its masks taken off, and merge it.

        Raises:
            BelowQuorum: Too few agreed. Nothing was unmasked, so the round may be tried again.
            FederationError: Too few clients helped, or the masks do not cancel.
        """
        progress, facts = entry.progress, entry.facts
        layout = expected(self._post.any_plan(progress.round, glob), glob.tree.layout)
        secure = SecureRound(self._config, layout, progress, entry.total)
        self._agree(secure)
        self._journal.keep(entry)  # with the signatures: what is asked from here on is asked the same after a kill
        self._gather_shares(secure)
        sums, figures = secure.finish()
        notes = Notes(**facts.model_dump(exclude={"drawn"}), counts={}, figures=figures)
        if self._mechanism is None:
            after, report = self._aggregator(glob, [released(sums, glob, layout)])
        else:
            total = sums.change / progress.cap
            update, noise = self._mechanism.noisy(glob, layout, total, len(progress.arrived), len(facts.selected))
            after, report = self._aggregator(glob, [update])
            report |= noise
        ledger = self._record.saved.privacy
        if ledger is not None and facts.drawn is not None:
            ledger = ledger.after(facts.drawn)
        return Done(after, {**report, "updates": len(progress.arrived)}, notes, ledger)

    def _agree(self, secure: SecureRound) -> None:
        """Have those who are in the sum sign who that is: they unmask nothing that not enough of them have signed.

        Raises:
            BelowQuorum: They did not.
        """
        said = Notes([], {})
        self._insist("agree", secure, secure.ask_agree, secure.take_agreement, said)
        signed, need = len(secure.progress.signatures), secure.threshold
        if signed < need:
            raise BelowQuorum(need, f"{signed} clients signed who is in the sum, {need} are needed; {said.absences}")

    def _gather_shares(self, secure: SecureRound) -> None:
        """Ask those who are in the sum for their shares until there are enough, for as long as a round may take.

        No other sum of this round will do, so it is worth to wait for clients that dropped out.

        Raises:
            FederationError: They did not come back.
        """
        progress, said = secure.progress, Notes([], {})
        self._insist("unmask", secure, secure.ask_unmask, secure.take_unmask, said)
        if secure.answers >= secure.threshold:
            return
        raise FederationError(
            f"{secure.answers} of {len(progress.arrived)} clients helped to unmask the sum, {secure.threshold} are "
            f"needed; {said.absences}",
            where=f"round {progress.round}",
            mend="The sum is kept: start the clients that are in it, and go on with --resume.",
        )

    def _insist(
        self,
        what: str,
        secure: SecureRound,
        questions: Callable[[], Mapping[str, BaseModel]],
        take: Callable[[str, str], None],
        said: Notes,
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
            nodes = self._crew.present()
            asked = {client: ask for client, ask in left.items() if client in nodes}
            group = f"{progress.round}.{progress.attempt}.{what}.{again}"
            with suppress(BelowQuorum):
                self._stage(f"query.{what}", asked, take, nodes, group, Patience(each, need, 0.0), said)
                return
            said.missing = sorted(questions().keys() - said.quarantined.keys())
            if not again:
                self._record.log.emit(
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
        notes: Notes,
    ) -> None:
        """Ask a question of a protocol and pass the answers on.

        Raises:
            BelowQuorum: Fewer answered than are needed.
        """
        collection = self._post.send(kind, questions, nodes, group, patience)
        answers = 0
        for client, reply in collection:
            try:
                take(client, text_of(reply))
            except MessageError as error:
                notes.quarantined[client] = str(error)
                continue
            collection.accept()
            answers += 1
        notes.missing += collection.missing
        self._post.forget(collection)
        if answers < patience.quorum:
            raise BelowQuorum(patience.quorum)
