"""One data owner in a round: what a plan puts into the model, what is sent of it, and what is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from molehill import evidence
from molehill.errors import MessageError, TrainingError
from molehill.molora.interfaces import Settles
from molehill.molora.model import seed_for
from molehill.molora.probes import Told
from molehill.plan import Answers, ClientPlan, ClientReply, EvaluationReply, Figure, Scope, Scores
from molehill.secure.vector import Form, figures_of
from molehill.tasks.batches import Batch, Batches
from molehill.tasks.kind import kind_of
from molehill.tasks.lengths import Examples, Lengths, together
from molehill.wire.clipping import clip, norm
from molehill.wire.exchange import Place
from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.message import Delta, Masked, decode_tree, encode_delta, encode_masked, largest_delta
from molehill.wire.tree import Array, Layout, Tree
from molehill_client.consent import Consent, require_consent
from molehill_client.folds import holdout, strata_of_rows
from molehill_client.masking import Masker, Signer
from molehill_client.scores import batches_of
from molehill_client.state import PersonalState, StateStore
from molehill_client.trainer import Observer, Result
from molehill_client.workbench import Workbench

_log = logging.getLogger(__name__)


@dataclass
class Session:
    """One client's round between `Participant.begin` and `Participant.finish`.

    Attributes:
        plan: What to do.
        state: What the client keeps for itself.
        bytes_down: Length of the blobs that had to be fetched.
        received: Values of the shared tensors before training.
    """

    plan: ClientPlan
    state: PersonalState
    bytes_down: int
    received: Tree


class Participant:
    """A data owner.

    Args:
        bench: Model, task and exchange.
        name: Client id.
        train_rows: Encoded training rows; of these ``personal.holdout`` sets some aside from the rounds.
        test_rows: Encoded held-out rows, never trained on.
        store: Where the personal state lives.
        observe: Called after every local step.
        signer: Vouches for keys of secure aggregation; None trusts the server to pass them on.
        consent: What the owner allows; None allows what the configuration says.
    """

    def __init__(
        self,
        bench: Workbench,
        name: str,
        train_rows: Examples,
        test_rows: Examples,
        store: StateStore,
        observe: Observer | None = None,
        signer: Signer | None = None,
        consent: Consent | None = None,
    ) -> None:
        self.bench = bench
        self.name = name
        self.train_rows = train_rows
        self.test_rows = test_rows
        self.store = store
        self.observe = observe
        self.consent = consent
        self.masker = Masker(name, bench.config, store, signer)

    @property
    def round_rows(self) -> Examples:
        """The training rows that take part in the rounds."""
        return self._parts[0] if self.bench.config.personal.holdout else self.train_rows

    @property
    def aside_rows(self) -> Examples:
        """The training rows that the rounds never see; none where there are too few to set some aside."""
        return self._parts[1] if self.bench.config.personal.holdout else self.train_rows.part(())

    @cached_property
    def _parts(self) -> tuple[Examples, Examples]:
        config, rows = self.bench.config, self.train_rows
        seed = seed_for(config.run.seed, self.name, "holdout")
        strata = strata_of_rows(rows, kind_of(config.task).head)
        aside = holdout(rows.units, strata, config.personal.holdout, seed)
        if not aside.any():
            _log.warning("%s has too few training rows to set any aside: it trains on all of them", self.name)
        return rows.part(np.flatnonzero(~aside)), rows.part(np.flatnonzero(aside))

    @property
    def lengths(self) -> Lengths:
        """Of all its rows."""
        return together([self.train_rows.lengths, self.test_rows.lengths])

    def check(self, plan: ClientPlan) -> None:
        """Refuse a plan that is for another client, base or model, or asks for more than was agreed to.

        Raises:
            MessageError: It is.
            ConsentError: The owner's policy refuses it.
        """
        if plan.client != self.name:
            raise MessageError(f"plan is for client {plan.client!r}, this is {self.name!r}")
        if plan.base != self.bench.base_digest:
            raise MessageError(
                f"plan is for a base with digest {plan.base[:12]}, this client has {self.bench.base_digest[:12]}",
                where=f"client {self.name}",
                mend="Use the same base model and revision on every machine.",
            )
        if plan.layout != self.bench.initial.layout.digest:
            raise MessageError(
                "plan is for a model with other tensors than this client builds",
                where=f"client {self.name}",
                mend="Run the same configuration on server and clients.",
            )
        require_consent(plan, self.bench.config, self.bench.model.layout, self.name)
        if self.consent is not None:
            self.consent.require_plan(plan, self.bench.model.layout)

    def begin(self, plan: ClientPlan, *, after: bool = False) -> Session:
        """Put what the plan names, and the personal state without its residuals, into the model.

        Args:
            plan: The plan.
            after: Start from the state after the plan's round, not before it.
        """
        self.check(plan)
        if self.masked and not after:
            self.masker.ready(plan.round, plan.company)
            assert plan.company is not None  # or it would not be ready
            self.masker.weight(len(self.round_rows), plan.company)  # better refused before the work
        state = self.store.before(plan.round + after)
        state.settle(plan.accepted)
        state.k = plan.k
        bytes_down = self.receive(plan, state)
        received = self._shared(plan)
        kept = self.kept(plan)
        self.bench.model.load({key: value for key, value in state.tree.items() if key in kept})
        self._lean(plan)
        if not after:
            self._settle(plan)
        return Session(plan, state, bytes_down, received)

    def _lean(self, plan: ClientPlan) -> None:
        """Put what the plan leans on into the routers."""
        if not plan.lean:
            return
        model = self.bench.model
        found = {}
        for name, group in model.routers.items():
            part = group.router.scorer.leans
            key = Key(name, NO_EXPERT, f"gate.own.{part}")
            if part is None or plan.scope(key) != "personal":
                raise MessageError(
                    "plan leans on experts, and the routers have nothing of a client's own for that",
                    where=f"client {self.name}, {name}",
                    mend="Run the same configuration on server and clients.",
                )
            site = model.site_of(group)
            routed = model.expert_ids(site)[site.shared :]
            found[key] = np.array([plan.lean.get(expert, 0.0) for expert in routed], np.float32)
        if strange := sorted(plan.lean.keys() - set(model.experts)):
            raise MessageError(
                f"plan leans on an expert that is not there: {strange[0]!r:.40}", where=f"client {self.name}"
            )
        model.load(found)

    def _settle(self, plan: ClientPlan) -> None:
        """Have routers that go by where the rows of the rounds lie find that, once; they keep it.

        Raises:
            TrainingError: The base makes of a row what is not finite.
        """
        groups = self.bench.model.routers.values()
        scorers = [scorer for scorer in (group.router.scorer for group in groups) if isinstance(scorer, Settles)]
        if not any(scorer.unsettled for scorer in scorers):
            return
        model, batches = self.bench.model, batches_of(self.bench, self.round_rows)
        states = torch.cat([model.states_of(batch.input_ids, batch.attention_mask, batch.labels) for batch in batches])
        if strange := int((~states.isfinite()).any(1).sum()):
            raise TrainingError(
                f"the base makes numbers that are not finite of {strange} of {len(states)} rows, and these go by them",
                where=f"client {self.name}, round {plan.round}",
                mend="Set base.precision to fp32, or use another base.",
            )
        for scorer in scorers:
            scorer.settle(states, seed_for(self.bench.config.run.seed, self.name, "places"))

    def kept(self, plan: ClientPlan) -> Layout:
        """What stays with the client in the rounds."""
        scopes = _stays(plan)
        return self.bench.model.layout.where(lambda key: plan.scope(key) in scopes and not key.residual)

    def keep(self, plan: ClientPlan, state: PersonalState, chosen: str = "", *, replaced: bool = False) -> None:
        """Save what of the model in use is the owner's as part of the state after the plan's round.

        Args:
            plan: The plan.
            state: The state before; the rounds go on from its personal tensors, whatever is in the model.
            chosen: Name of the candidate that it is; empty where there was no choice.
            replaced: Whether all tensors are the owner's, and not those alone that the plan calls personal.
        """
        model, before, scopes = self.bench.model, state.tree, _stays(plan)
        state.tree = model.tree(lambda key: plan.scope(key) in scopes and (key.residual or not replaced))
        if replaced:
            state.tree = Tree.of({**{key: value for key, value in before.items() if not key.residual}, **state.tree})
        state.own = model.tree(lambda key: not key.residual and replaced)
        state.chosen = chosen
        self.store.save(plan.round, state)

    def finish(self, session: Session, result: Result, seconds: float) -> ClientReply:
        """Send what was learnt and keep what is personal."""
        plan, state, received = session.plan, session.state, session.received
        trained = self._shared(plan, received.layout)
        change = Tree(received.layout, trained.flat - received.flat)
        if plan.clip is not None:
            change = clip(change, plan.clip)
        memory: dict[Key, Array] = {key: np.array(value) for key, value in state.memory.items()}
        if plan.apart:  # the whole change is sent in every round, so none is owed
            memory = {}
        blob = self._mask(plan, change, result) if self.masked else self._encode(plan, change, result, memory)
        before, started = state.memory, state.round
        if plan.apart:
            memory = {}
        state.owed = Tree.of({key: value + before.get(key, 0) for key, value in change.items() if key in memory})
        state.tree = self.bench.model.tree(self.kept(plan))
        state.memory = Tree.of(memory)
        state.own, state.chosen = Tree(Layout({})), ""  # of the model before this round
        self.store.save(plan.round, state)  # first: what then does not arrive is added back
        digest = self.bench.exchange.put(blob, Place(plan.run, plan.round))
        return ClientReply(
            client=self.name,
            round=plan.round,
            delta=digest,
            bytes_up=len(blob),
            bytes_down=session.bytes_down,
            examples=len(self.round_rows),
            loss=None if self.masked else result.loss,
            seconds=seconds,
            metrics={} if self.masked else result.routing,
            started=started,
            embeddings=self._embeddings(plan, result) if evidence.embedded(self.bench.config) else {},
            places=self._places() if plan.apart and evidence.placed(self.bench.config) else {},
        )

    def _places(self) -> dict[str, list[list[float]]]:
        """Where its rows lie, by router; numbers with the digits that float32 has."""
        scorers = {name: group.router.scorer for name, group in self.bench.model.routers.items()}
        found = {name: scorer.settled() for name, scorer in scorers.items() if isinstance(scorer, Settles)}
        return {name: [[float(str(x)) for x in row] for row in rows.cpu().numpy()] for name, rows in found.items()}

    def _embeddings(self, plan: ClientPlan, result: Result) -> dict[str, dict[str, list[float]]]:
        """Where the tokens of a round lie, and what the experts that the plan lets it train make of them."""
        model, found = self.bench.model, {}
        trained = plan.trained(model.layout)
        for name, values in result.embeddings.items():
            site = model.sites[name]
            ids = (NO_EXPERT, *model.expert_ids(site)[site.shared :])
            kept = {NO_EXPERT, *trained.get(name, ())}
            found[name] = {e: row for e, row in zip(ids, values.tolist(), strict=True) if e in kept}
        return found

    def unusable(self, plan: ClientPlan, reason: str, seconds: float) -> ClientReply:
        """Say that the model of a plan cannot be trained; nothing was learnt, and nothing is kept."""
        return ClientReply(
            client=self.name,
            round=plan.round,
            delta="",
            bytes_up=0,
            bytes_down=0,
            examples=len(self.round_rows),
            loss=None,
            seconds=seconds,
            unusable=reason[:1000],
        )

    @property
    def masked(self) -> bool:
        """Whether the server gets the sum of what clients send, and nothing of this one."""
        return self.bench.config.privacy.secure_aggregation

    def _encode(self, plan: ClientPlan, change: Tree, result: Result, memory: dict[Key, Array]) -> bytes:
        """A delta; with error feedback no longer than is let through, and what is left of it is owed."""
        delta = Delta(
            run=plan.run,
            round=plan.round,
            client=self.name,
            base=plan.base,
            tree=change,
            examples=len(self.round_rows),
            tokens=result.tokens,
        )
        before = dict(memory)
        blob = encode_delta(delta, plan.codec, memory)
        if plan.norm_bound is None or plan.apart or not memory:
            return blob
        wanted = Tree.of({key: value + before.get(key, 0) for key, value in change.items()})
        sent = norm(Tree.of({key: wanted[key] - memory[key] for key in wanted}).flat)
        if sent <= plan.norm_bound:
            return blob
        part = clip(wanted, norm(wanted.flat) * plan.norm_bound / sent)
        left: dict[Key, Array] = {}
        blob = encode_delta(replace(delta, tree=part), plan.codec, left)
        memory |= {key: value + (wanted[key] - part[key]) for key, value in left.items()}
        return blob

    def _mask(self, plan: ClientPlan, change: Tree, result: Result) -> bytes:
        """What the server may see of a change, its weights and its losses: nothing but their part of the sum."""
        company, bound = plan.company, self.bench.config.round.masked_bound
        assert company is not None  # or nothing would have been trained
        size = norm(change.require_finite().flat)
        if bound is not None and size > bound:  # nobody else can tell any more
            raise TrainingError(
                f"its change has norm {size:.3g}, above the bound of {bound:g}",
                where=f"client {self.name}, round {plan.round}",
                mend="Lower train.lr, or raise round.norm_bound.",
            )
        names = figures_of(self.bench.config)
        figures = {"loss": result.loss, **result.routing}
        form = Form(change.layout, len(names))
        values = form.fill(
            change,
            self.masker.weight(len(self.round_rows), company),
            result.tokens if plan.clip is None else None,  # see `Mechanism`: weights by tokens would have to be noised
            [figures[name] for name in names],
        )
        numbers = self.masker.mask(plan.round, company, values)
        return encode_masked(
            Masked(plan.run, plan.round, company.attempt, self.name, plan.base, change.layout.digest, numbers)
        )

    def receive(self, plan: ClientPlan, state: PersonalState) -> int:
        """Put the plan's blobs into the model; returns the bytes that had to be fetched."""
        model, wire = self.bench.model, self.bench.config.wire
        whole = min(wire.max_bytes, largest_delta(model.layout, model.layout))
        self.start_over(plan.k)
        patches: dict[tuple[str, str], list[tuple[Array, Array]]] = {}
        fetched = 0
        for group, digest in sorted(plan.blobs.items()):
            limit = wire.max_bytes if group.startswith("patch.") else whole  # patches grow with the rounds
            blob = self.bench.exchange.get(digest, limit)
            if state.held.get(group) != digest:
                fetched += len(blob)
            state.held[group] = digest
            tree = decode_tree(blob, limit, codec=wire.down)
            parts = {key: value for key, value in tree.items() if not key.role.startswith("patch.")}
            model.load(_truncated(parts, plan.rank))
            for key in tree:
                if key.role == "patch.A":
                    B = tree[key._replace(role="patch.B")]
                    patches.setdefault((key.site, key.expert), []).append((tree[key], B))
        model.set_patches(
            {
                at: (np.concatenate([a for a, _ in ab]), np.concatenate([b for _, b in ab], 1))
                for at, ab in patches.items()
            }
        )
        state.held = {group: digest for group, digest in state.held.items() if group in plan.blobs}
        return fetched

    def start_over(self, k: int | None = None) -> None:
        """The start every client shares: no patches, no residuals, and nothing of whoever used the model last.

        Args:
            k: Experts per token of the client; None leaves it to the selector.
        """
        model = self.bench.model
        model.load(self.bench.initial)
        model.load(Tree(model.layout.where(lambda key: key.residual)))
        model.set_patches({})
        model.use_personal(gate=True, head=True)
        model.use_uniform_gate(uniform=False)
        model.use_k(k)
        model.state.enabled = True

    def _shared(self, plan: ClientPlan, layout: Layout | None = None) -> Tree:
        """Values of the tensors that are sent, cut to this client's rank."""
        tree = self.bench.model.tree(
            layout if plan.rank is None and layout else lambda key: plan.scope(key) == "shared"
        )
        if plan.rank is None:
            return tree
        return Tree.of(_truncated(tree, plan.rank))

    def evaluation(
        self,
        stages: Mapping[str, Scores],
        tokens: dict[str, float],
        seconds: float,
        started: int | None = None,
        probes: Told | None = None,
        *,
        remembered: bool = False,
        answers: Mapping[str, Answers] | None = None,
        gains: Mapping[str, Figure] | None = None,
        chosen: str = "",
    ) -> EvaluationReply:
        """A reply with what was measured, and the round of the personal state it was measured with."""
        return EvaluationReply(
            client=self.name,
            n_train=len(self.round_rows),
            aside=len(self.aside_rows),
            n_test=len(self.test_rows),
            stages=dict(stages),
            gains=dict(gains or {}),
            answers=dict(answers or {}),
            tokens={} if self.masked else tokens,
            probes=probes or {},
            seconds=seconds,
            started=started,
            remembered=remembered,
            chosen=chosen,
        )

    @property
    def batch_sizes(self) -> tuple[int, int]:
        """Rows of every training batch: in the rounds, and of all training rows."""
        most = self.bench.config.train.batch_size
        return min(most, len(self.round_rows)), min(most, len(self.train_rows))

    def batches(self, rows: Examples, seed: int) -> Iterator[Batch]:
        """Endless training batches of some of its rows, on the model's device."""
        device = self.bench.model.flat.device
        batches = Batches(rows, self.bench.config.train.batch_size, seed, self.bench.task)
        return (batch.to(device) for batch in batches)


def _stays(plan: ClientPlan) -> frozenset[Scope]:
    """Scopes of what a client keeps: of one that trains apart, also what it sends."""
    return frozenset({"personal", "shared"}) if plan.apart else frozenset({"personal"})


def _truncated(tree: Mapping[Key, Array], rank: int | None) -> dict[Key, Array]:
    """The first ``rank`` ranks of every expert."""
    if rank is None:
        return dict(tree)
    cut = {"A": lambda value: value[:rank], "B": lambda value: value[:, :rank]}
    return {key: cut.get(key.kind, lambda value: value)(value) for key, value in tree.items()}
