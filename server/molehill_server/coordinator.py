"""The round loop: gather clients, do round after round, commit each, then measure.

It knows no network and no model: messages go through a `Transport`, tensors through an `Exchange`, and how a round is
done is its `Way`'s.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from molehill import __version__
from molehill.config import Config
from molehill.errors import FederationError, MolehillError
from molehill.wire.exchange import Exchange
from molehill.wire.store import save_tree
from molehill.wire.tree import Tree
from molehill_server.aggregate import Aggregator
from molehill_server.broadcast import Broadcast, patch_tree
from molehill_server.check import require
from molehill_server.exchange.grants import Grants
from molehill_server.norms import later
from molehill_server.planning.assigning import Assignment, Leaning, Seen, added, routed
from molehill_server.planning.planner import select, trained
from molehill_server.privacy.accountant import Accountant, Ledger
from molehill_server.privacy.draw import Draw
from molehill_server.records import Global
from molehill_server.roster import Roster
from molehill_server.rounds.crew import Crew
from molehill_server.rounds.masked import MaskedRound
from molehill_server.rounds.measure import Measuring
from molehill_server.rounds.notes import BACK, BelowQuorum, Notes
from molehill_server.rounds.plain import PlainRound
from molehill_server.rounds.post import Post
from molehill_server.rounds.record import Record
from molehill_server.rounds.way import Done, Way
from molehill_server.transport import Transport
from molehill_server.validation import Limits


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
        aggregator = Aggregator.from_config(config.federation, config.run.seed)
        grace = config.round.grace if grace is None else grace
        self._config = config
        self._out = out
        self._grants = grants
        self._limits = Limits.from_config(config)
        self._assignment: Assignment = config.federation.assign.build("assignment")
        self._accountant, self._draw = Accountant.of(config), Draw.of(config)
        self._record = record = Record(config, out, Ledger() if self._accountant else None)
        wire, blobs = config.wire, dict(record.saved.blobs)
        self._broadcast = Broadcast(exchange, wire.down, wire.max_bytes, blobs)
        roster = Roster(transport, record.log, introduction, clients)
        self._crew = crew = Crew(config, transport, roster, record, grace, aggregator.rule.least)
        post = Post(config, record, exchange, transport, self._broadcast, grants, grace)
        self._way: Way = (
            MaskedRound(config, aggregator, post, crew, record, transport, grace, out)
            if config.privacy.secure_aggregation
            else PlainRound(config, aggregator, post, crew, record)
        )
        self._measure = Measuring(config, post, crew, record)

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
            self._record.audit.append("stopped", reason=str(error))
            raise

    def _run(self) -> Tree:
        began = time.perf_counter()
        record, run = self._record, self._config.run
        nodes = self._crew.first()
        learnt = trained(self._config, record.layout).size
        facts = {"run": run.name, "rounds": run.rounds, "clients": list(nodes), "parameters": learnt}
        facts |= {"config_digest": self._config.digest, "version": __version__}
        record.begin(self._crew.roster.rows(nodes), facts)
        if self._assignment.asks and not record.saved.glob.round:  # not committed: it comes to the same once more
            record.saved = replace(record.saved, leanings=self._decided({}, record.saved.glob)[0])
        while record.saved.glob.round < run.rounds:
            self._round(record.saved.glob.round + 1)
        final = self._broadcast.publish(record.saved.glob)
        save_tree(
            self._out / "final.safetensors",
            Tree.of({**final.tree, **patch_tree(final.patches)}),
            {"base": record.base, "round": str(final.round)},
        )
        self._measure(final)
        self._broadcast.drop()
        totals = {"bytes_up": record.saved.bytes_up, "bytes_down": record.saved.bytes_down}
        record.log.emit("end", seconds=time.perf_counter() - began, **totals)
        return final.tree

    def _round(self, number: int) -> None:
        """One round with its retries."""
        began = time.perf_counter()
        record = self._record
        glob = self._broadcast.publish(record.saved.glob)
        after, report, notes, ledger = self._way.resumed(glob, number) or self._attempts(glob, number)
        spent = {"epsilon": self._accountant.epsilon(ledger.rounds)} if self._accountant and ledger else {}
        record.log.emit(
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
        seen, leanings, after = self._assigned(notes, after)
        record.commit(
            replace(
                record.saved,
                glob=after,
                seen=seen,
                leanings=leanings,
                blobs=dict(self._broadcast.blobs),
                bytes_up=record.saved.bytes_up + notes.bytes_up,
                bytes_down=record.saved.bytes_down + notes.bytes_down,
                privacy=ledger,
                norms=later(record.saved.norms, notes.norms.kind, notes.norms.median(notes.accepted)),
                accepted={**record.saved.accepted, **dict.fromkeys(notes.accepted, number)},
            )
        )
        self._way.forget()

    def _assigned(self, notes: Notes, after: Global) -> tuple[Mapping[str, Tree], Mapping[str, Leaning], Global]:
        """What an assignment looks at after a round, what of the experts is whose from then on, and the model."""
        saved, assignment = self._record.saved, self._assignment
        if not (assignment.sees or assignment.asks):
            return saved.seen, saved.leanings, after
        seen = dict(saved.seen)
        for client, change in notes.seen.items():
            anew = assignment.forms or assignment.asks
            seen[client] = change if anew else added(seen.get(client), change, change.layout)
        found, after = self._decided(seen, after)
        if assignment.forms:  # what is decided stays so
            seen = {client: change for client, change in seen.items() if client not in found}
        return seen, found, after

    def _decided(self, seen: Mapping[str, Tree], after: Global) -> tuple[Mapping[str, Leaning], Global]:
        """What of the experts is whose after a round, or before the first, and the model."""
        saved, number = self._record.saved, after.round
        run, known = self._config.run, saved.leanings
        experts = routed(saved.glob.tree)
        looked = Seen(number, run.rounds, seen, saved.rows, known, experts, run.seed, after.tree)
        found = self._assignment.assign(looked)
        if found != known:
            tree = after.tree.copy()
            for key, value in self._assignment.form(looked, found).items():
                tree[key][...] = value
            after = replace(after, tree=tree)
            leans = {client: dict(leaning.bias) for client, leaning in found.items()}
            trains = {c: sorted(each.trains) for c, each in found.items() if each.trains is not None}
            self._record.log.emit("assigned", round=number, leans=leans, trains=trains)
        return found, after

    def _attempts(self, glob: Global, number: int) -> Done:
        up = down = 0  # bytes of the attempts before
        need, why = 0, ""
        # After a kill the attempt goes on under its own number, so that deltas that were uploaded in it still count.
        first = 0 if self._grants is None else self._grants.attempt(self._config.run.name, number)
        if self._way.anew and self._grants is not None:
            first += 1  # what was uploaded does not count
        for attempt in range(first, first + self._config.round.retries + 1):
            nodes = self._crew.gathered()
            notes = Notes([], self._crew.counts(nodes), bytes_up=up, bytes_down=down)
            try:
                notes.selected, ledger = self._choose(list(nodes), number, attempt)
                return self._way.attempt(glob, number, attempt, nodes, notes, ledger)
            except BelowQuorum as few:
                self._way.forget()
                up, down, need, why = notes.bytes_up, notes.bytes_down, few.need, few.why
                self._record.log.emit(
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
        raise FederationError(f"round {number}: {why}", mend=BACK) if why else notes.failure(number, need)

    def _choose(self, pool: list[str], number: int, attempt: int) -> tuple[list[str], Ledger | None]:
        """The clients of a round, and what will have been spent after it.

        Raises:
            BelowQuorum: Too few are connected for a round to begin.
            PrivacyError: That is more than there is.
        """
        if len(pool) < self._config.round.min_clients:
            raise BelowQuorum(self._config.round.min_clients)
        ledger = self._record.saved.privacy
        secret = None if ledger is None else ledger.secret
        chosen = select(self._config, pool, number, attempt, secret=secret)
        if self._accountant and ledger:
            ledger = ledger.after(self._draw.spent(len(pool), len(chosen)))
            self._accountant.require(ledger.rounds)
        return chosen, ledger
