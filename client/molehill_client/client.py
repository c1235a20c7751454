"""One data owner: trains from a plan, keeps its personal state, and evaluates on its own held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molehill import __version__
from molehill.errors import MessageError, TrainingError
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Hello, Scores
from molehill.secure.vector import Form, figures_of
from molehill.tasks.batches import Batch, Batches, eval_batches
from molehill.tasks.lengths import Examples, Lengths, together
from molehill.tasks.metrics import ScoreSum
from molehill.tasks.task import Example
from molehill.wire.clipping import clip, norm
from molehill.wire.exchange import Place
from molehill.wire.keys import Key
from molehill.wire.message import Delta, Masked, decode_tree, encode_delta, encode_masked, largest_delta
from molehill.wire.tree import Array, Layout, Tree
from molehill_client.consent import Consent, require_consent
from molehill_client.masking import Masker, Signer
from molehill_client.state import PersonalState, StateStore
from molehill_client.together import baseline_together, evaluate_together, train_together
from molehill_client.trainer import Observer, Result
from molehill_client.workbench import Workbench


@dataclass
class Session:
    """One client's round between `Client.begin` and `Client.finish`.

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


class Client:
    """A data owner.

    Args:
        bench: Model, task and exchange.
        name: Client id.
        train_rows: Encoded training rows.
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
    def lengths(self) -> Lengths:
        """Of all its rows."""
        return together([self.train_rows.lengths, self.test_rows.lengths])

    # ---- messages --------------------------------------------------------------------------------------------

    def hello(self) -> Hello:
        """Say who this is."""
        return Hello(
            client=self.name,
            n_train=len(self.train_rows),
            n_test=len(self.test_rows),
            version=__version__,
            cut=self.lengths.cut,
            lost=self.lengths.lost,
            unlearnt=self.lengths.unlearnt,
        )

    def train(self, plan: ClientPlan) -> ClientReply:
        """Train one round and put the delta of the shared tensors into the exchange.

        Raises:
            MessageError: The plan or its blobs do not fit this client.
            TrainingError: The loss is not finite.
        """
        return train_together([self], [plan])[0]

    def evaluate(self, plan: ClientPlan) -> EvaluationReply:
        """Fit the residuals to the model as received, keep them, and score the global and the personalised model.

        Only this client's held-out rows are scored, and only its training rows are fitted to.
        """
        return evaluate_together([self], [plan])[0]

    def baseline(self, plan: ClientPlan) -> EvaluationReply:
        """Train and score what this client could do alone.

        ``base`` is the frozen base with only a head; ``local`` is the same MoLoRA trained on this client's rows
        for as many steps as the federation gives it.
        """
        return baseline_together([self], [plan])[0]

    # ---- parts -----------------------------------------------------------------------------------------------

    def _check(self, plan: ClientPlan) -> None:
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
        self._check(plan)
        if self._masked and not after:
            self.masker.ready(plan.round, plan.company)
            assert plan.company is not None  # or it would not be ready
            self.masker.weight(len(self.train_rows), plan.company)  # better refused before the work
        state = self.store.before(plan.round + after)
        state.settle(plan.accepted)
        bytes_down = self._receive(plan, state)
        self.bench.model.load({key: value for key, value in state.tree.items() if not key.residual})
        return Session(plan, state, bytes_down, self._shared(plan))

    def keep(self, plan: ClientPlan, state: PersonalState) -> None:
        """Save the personal tensors that are in the model as part of the state after the plan's round."""
        state.tree = self.bench.model.tree(lambda key: plan.scope(key) == "personal")
        self.store.save(plan.round, state)

    def globally(self, plan: ClientPlan) -> dict[str, Scores]:
        """Score what every client gets: no personal tensors.

        A head that nobody shares is the exception, since without one there is nothing to score; of a gate that nobody
        shares, all experts weigh alike, or what the parts that stay choose from.
        """
        self._check(plan)
        model = self.bench.model
        state = self.store.before(plan.round + 1)
        self._receive(plan, state)
        keeps = {key.kind for key in self.bench.initial if plan.scope(key) == "personal"}
        model.load({key: value for key, value in state.tree.items() if key.kind == "head" and "head" in keeps})
        model.use_personal(gate=False, head=False)
        kept = [key for key in self.bench.initial if key.kind == "gate" and plan.scope(key) == "personal"]
        model.use_uniform_gate(not all(key.own for key in kept))
        model.load({key: np.zeros_like(self.bench.initial[key]) for key in kept if key.own})
        return {"global": self.score()}

    def personally(self, stages: dict[str, Scores]) -> dict[str, float]:
        """Score the model as it is, into ``stages``; returns the tokens that every expert got."""
        model = self.bench.model
        model.use_uniform_gate(uniform=False)
        model.use_personal(gate=True, head=True)
        model.count_tokens(on=True)
        stages["personalised"] = self.score()
        model.count_tokens(on=False)
        tokens: dict[str, float] = {}
        for (_, expert), mass in model.tokens().items():
            tokens[expert] = tokens.get(expert, 0.0) + mass
        return tokens

    def finish(self, session: Session, result: Result, seconds: float) -> ClientReply:
        """Send what was learnt and keep what is personal."""
        plan, state, received = session.plan, session.state, session.received
        trained = self._shared(plan, received.layout)
        change = Tree(received.layout, trained.flat - received.flat)
        if plan.clip is not None:
            change = clip(change, plan.clip)
        memory: dict[Key, Array] = {key: np.array(value) for key, value in state.memory.items()}
        blob = self._mask(plan, change, result) if self._masked else self._encode(plan, change, result, memory)
        before, started = state.memory, state.round
        state.owed = Tree.of({key: value + before.get(key, 0) for key, value in change.items() if key in memory})
        state.tree = self.bench.model.tree(lambda key: plan.scope(key) == "personal" and not key.residual)
        state.memory = Tree.of(memory)
        self.store.save(plan.round, state)  # first: what then does not arrive is added back
        digest = self.bench.exchange.put(blob, Place(plan.run, plan.round))
        return ClientReply(
            client=self.name,
            round=plan.round,
            delta=digest,
            bytes_up=len(blob),
            bytes_down=session.bytes_down,
            examples=len(self.train_rows),
            loss=None if self._masked else result.loss,
            seconds=seconds,
            metrics={} if self._masked else result.routing,
            started=started,
        )

    def unusable(self, plan: ClientPlan, reason: str, seconds: float) -> ClientReply:
        """Say that the model of a plan cannot be trained; nothing was learnt, and nothing is kept."""
        return ClientReply(
            client=self.name,
            round=plan.round,
            delta="",
            bytes_up=0,
            bytes_down=0,
            examples=len(self.train_rows),
            loss=None,
            seconds=seconds,
            unusable=reason[:1000],
        )

    @property
    def _masked(self) -> bool:
        return self.bench.config.privacy.secure_aggregation

    def _encode(self, plan: ClientPlan, change: Tree, result: Result, memory: dict[Key, Array]) -> bytes:
        """A delta; with error feedback no longer than is let through, and what is left of it is owed."""
        delta = Delta(
            run=plan.run,
            round=plan.round,
            client=self.name,
            base=plan.base,
            tree=change,
            examples=len(self.train_rows),
            tokens=result.tokens,
        )
        before = dict(memory)
        blob = encode_delta(delta, plan.codec, memory)
        if plan.norm_bound is None or not memory:
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
            self.masker.weight(len(self.train_rows), company),
            result.tokens if plan.clip is None else None,  # see `Mechanism`: weights by tokens would have to be noised
            [figures[name] for name in names],
        )
        numbers = self.masker.mask(plan.round, company, values)
        return encode_masked(
            Masked(plan.run, plan.round, company.attempt, self.name, plan.base, change.layout.digest, numbers)
        )

    def _receive(self, plan: ClientPlan, state: PersonalState) -> int:
        """Put the plan's blobs into the model; returns the bytes that had to be fetched."""
        model, wire = self.bench.model, self.bench.config.wire
        whole = min(wire.max_bytes, largest_delta(model.layout, model.layout))
        self.start_over()
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

    def start_over(self) -> None:
        """The start every client shares: no patches, no residuals, and nothing of whoever used the model last."""
        model = self.bench.model
        model.load(self.bench.initial)
        model.load(Tree(model.layout.where(lambda key: key.residual)))
        model.set_patches({})
        model.use_personal(gate=True, head=True)
        model.use_uniform_gate(uniform=False)
        model.state.enabled = True

    def _shared(self, plan: ClientPlan, layout: Layout | None = None) -> Tree:
        """Values of the tensors that are sent, cut to this client's rank."""
        tree = self.bench.model.tree(
            layout if plan.rank is None and layout else lambda key: plan.scope(key) == "shared"
        )
        if plan.rank is None:
            return tree
        return Tree.of(_truncated(tree, plan.rank))

    def base(self, plan: ClientPlan) -> dict[str, Scores]:
        """Score the frozen base with only a head."""
        self._check(plan)
        self.start_over()
        if self.bench.model.head is not None:
            return {"base": self._head_only()}
        self.bench.model.state.enabled = False
        try:
            return {"base": self.score()}
        finally:
            self.bench.model.state.enabled = True

    def _head_only(self) -> Scores:
        """Train only the head on cached features of the frozen base; until the loss stops falling."""
        model, head = self.bench.model, self.bench.model.head
        assert head is not None
        model.state.enabled = False
        model.eval()
        x, y = self._features(self.train_rows)
        x_test, y_test = self._features(self.test_rows)
        model.state.enabled = True
        weight = torch.zeros_like(head.weight, requires_grad=True)
        bias = torch.zeros_like(head.bias, requires_grad=True)
        scale = x.std().clamp_min(1e-6)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimiser.zero_grad()
            loss = F.cross_entropy(F.linear(x / scale, weight, bias), y) + 1e-3 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped torch
            return float(loss.detach())

        optimiser.step(closure)  # type: ignore[no-untyped-call]  # untyped torch
        with torch.no_grad():
            score = ScoreSum(classes=len(bias))
            score.add(F.linear(x_test / scale, weight, bias), y_test)
        return score.scores()

    @torch.no_grad()
    def _features(self, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
        model = self.bench.model
        assert model.head is not None
        features, labels = [], []
        for batch in self._eval_batches(rows):
            mask = batch.attention_mask.bool()
            features.append(model.head.pool(model.hidden(batch.input_ids, mask), mask))
            labels.append(batch.labels)
        return torch.cat(features), torch.cat(labels)

    @torch.no_grad()
    def score(self) -> Scores:
        """Score the model as it is on the held-out rows."""
        model = self.bench.model
        model.eval()
        total = ScoreSum(classes=len(model.head.bias) if model.head is not None else None)
        for batch in self._eval_batches(self.test_rows):
            forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.task_ids)
            total.add(forward.logits, forward.labels)
        return total.scores()

    def evaluation(
        self, stages: Mapping[str, Scores], tokens: dict[str, float], seconds: float, started: int | None = None
    ) -> EvaluationReply:
        """A reply with what was measured, and the round of the personal state it was measured with."""
        return EvaluationReply(
            client=self.name,
            n_train=len(self.train_rows),
            n_test=len(self.test_rows),
            stages=dict(stages),
            tokens={} if self._masked else tokens,
            seconds=seconds,
            started=started,
        )

    @property
    def batch_size(self) -> int:
        """Rows of every training batch."""
        return min(self.bench.config.train.batch_size, len(self.train_rows))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches on the model's device."""
        device = self.bench.model.flat.device
        batches = Batches(self.train_rows, self.bench.config.train.batch_size, seed, self.bench.task)
        return (batch.to(device) for batch in batches)

    def _eval_batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        device = self.bench.model.flat.device
        size = self.bench.config.evaluate.batch_size
        return (batch.to(device) for batch in eval_batches(rows, size, self.bench.task))


def _truncated(tree: Mapping[Key, Array], rank: int | None) -> dict[Key, Array]:
    """The first ``rank`` ranks of every expert."""
    if rank is None:
        return dict(tree)
    cut = {"A": lambda value: value[:rank], "B": lambda value: value[:, :rank]}
    return {key: cut.get(key.kind, lambda value: value)(value) for key, value in tree.items()}
