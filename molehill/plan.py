"""What the server tells a client to do in a round, and what the client answers."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from molehill.config import MethodRef
from molehill.secure.messages import Company
from molehill.wire.keys import Key

Scope: TypeAlias = Literal["shared", "personal", "frozen"]
Scopes: TypeAlias = tuple[tuple[str, Scope], ...]  # patterns over wire names, the first that matches wins
Fraction: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Amount: TypeAlias = Annotated[FiniteFloat, Field(ge=0)]
Sum: TypeAlias = Annotated[float, Field(ge=-1e30, le=1e30)]  # so that the sums of many clients are finite, too
HUGE = 1e39  # a loss: more than any of 32 bits, and a mean of several is finite, too
Loss: TypeAlias = Annotated[float, Field(ge=0, le=HUGE)]


class Hello(BaseModel):
    """What a client says about itself.

    Attributes:
        client: Its id.
        n_train: Training rows that take part in the rounds.
        n_test: Held-out rows.
        version: Version of Molehill it runs.
        cut: Rows, of both kinds, that are longer than ``task.max_length`` and lose their end.
        lost: Of these, rows without any token of an answer, which are left out of the other two counts.
        unlearnt: Answers that are read and not learnt, since the chat template edits them once others follow.
        aside: Training rows that the rounds never see (``personal.holdout``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    client: str = Field(pattern=r"^[^\W_][\w.@-]{0,127}$")  # letters of any script; it names a folder
    n_train: int = Field(ge=0)
    n_test: int = Field(ge=0)
    version: str
    cut: int = Field(default=0, ge=0)
    lost: int = Field(default=0, ge=0)
    unlearnt: int = Field(default=0, ge=0)
    aside: int = Field(default=0, ge=0)


def scope_of(scopes: Scopes, key: Key) -> Scope:
    """What happens to ``key``; what no pattern matches is frozen."""
    return next((scope for pattern, scope in scopes if fnmatchcase(key.name, pattern)), "frozen")


class ClientPlan(BaseModel):
    """Everything a client may not decide alone.

    Attributes:
        format: Version of this message; another version is refused.
        run: Name of the run.
        round: Round number, from 1.
        client: Id of the client the plan is for.
        base: Digest of the base weights.
        layout: Digest of the layout of the shared model the blobs hold.
        blobs: Digest of every blob to fetch, by group: ``e0.A`` (a factor of an expert), ``gate``,
            ``head`` or ``patch.3``.
        scopes: Patterns over wire names with what happens to matching tensors; the first match wins and
            a tensor that nothing matches is frozen. ``shared`` is trained and sent, ``personal`` is trained and
            stays, ``frozen`` is not trained.
        rank: Highest rank this client trains per expert; None means the full rank.
        k: Experts per token of this client; None leaves it to the selector.
        steps: Optimiser steps in this round.
        seed: Seed of batches and dropout in this round.
        codec: How the delta is encoded.
        clip: Largest L2 norm of the delta; a larger one is scaled down before it is encoded. None for no limit.
        accepted: The last round in which the server could use a delta of this client; 0 for none. What error feedback
            was left of a later one is to be sent again.
        norm_bound: L2 norm up to which no delta of this client is refused for its size in this round; None where that
            is not known before. Error feedback sends no more than this at once and owes the rest, or what has gathered
            while deltas did not count would be refused for ever.
        company: Whose masks to add under secure aggregation; only of a ``train`` message.
        lean: What the client's own part of the routers says of experts, by their ids, in place of what it said; see
            `molehill.molora.interfaces.Scorer.lean_means`. Empty leaves it as it is; zeros say that it is nothing.
        apart: The client trains by itself: from the start values, or what it kept of an earlier such round, and not
            from the shared model, of which it fetches nothing. It sends how far it is from the start values, and keeps
            what it sent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    run: str
    round: int = Field(ge=0)
    client: str
    base: str
    layout: str
    blobs: dict[str, str]
    scopes: Scopes
    rank: int | None = Field(default=None, ge=1)
    k: int | None = Field(default=None, ge=1)
    steps: int = Field(ge=1)
    seed: int = Field(ge=0)
    codec: MethodRef
    clip: float | None = Field(default=None, gt=0)
    accepted: int = Field(ge=0)
    norm_bound: float | None = Field(default=None, ge=0)
    company: Company | None = None
    lean: dict[str, Annotated[FiniteFloat, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    apart: bool = False

    def scope(self, key: Key) -> Scope:
        """What happens to ``key`` under this plan."""
        return scope_of(self.scopes, key)

    def trained(self, keys: Iterable[Key]) -> dict[str, set[str]]:
        """The routed experts of every site of which the plan lets anything learn."""
        found: dict[str, set[str]] = {}
        for key in keys:
            if key.routed and self.scope(key) != "frozen":
                found.setdefault(key.site, set()).add(key.expert)
        return found


class ClientReply(BaseModel):
    """What a client answers to a train message; the delta itself lies in the exchange.

    Attributes:
        client: Id of the client.
        round: The plan's round.
        delta: Digest of the encoded delta in the exchange.
        bytes_up: Length of the encoded delta in bytes.
        bytes_down: Length in bytes of the blobs that were fetched for this plan.
        examples: Rows the client trains on in the rounds.
        loss: Mean training loss over the round; None under secure aggregation, where it is part of the sum.
        seconds: Wall time of the local work.
        metrics: Mean of every routing loss over the round, unweighted, by name; empty under secure aggregation.
        unusable: Why the model that the client was sent cannot be trained, which is no fault of the client's; there is
            no delta then. Empty when it was trained.
        started: The round after which the personal state was left that the client started from; 0 for none.
        embeddings: By router, where the tokens of the round lie in mean (``-``), and what every routed expert that the
            plan lets learn makes of them, ``[r]``; empty where no assignment asks for it, and under ``privacy``.
        places: By router, the centres of the clusters of the client's rows, ``[n, w]``, one for every expert that the
            plan lets learn, with zeros where there are fewer clusters; of a client that trains apart where an
            assignment goes by them, else empty, and under ``privacy``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    client: str
    round: int
    delta: str
    bytes_up: int = Field(ge=0)
    bytes_down: int = Field(ge=0)
    examples: int = Field(ge=1)
    loss: float | None
    seconds: Amount
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    unusable: str = Field(default="", max_length=1000)
    started: int | None = Field(default=None, ge=0)
    embeddings: dict[str, dict[str, list[Sum]]] = Field(default_factory=dict)
    places: dict[str, list[list[Sum]]] = Field(default_factory=dict)


def _ordered(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] > interval[1]:
        raise ValueError("its ends are the wrong way round")
    return interval


Within: TypeAlias = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]


class Figure(BaseModel):
    """Something that was measured.

    Attributes:
        value: It.
        interval: Ends of what it is in with 95% confidence, were the rows drawn anew; None where that is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: Sum
    interval: Annotated[tuple[Sum, Sum], AfterValidator(_ordered)] | None = None


class Scores(BaseModel):
    """Quality on held-out rows.

    Attributes:
        n: Predictions: rows, or answer tokens of a causal LM.
        accuracy: Fraction right (of rows, or of tokens); None where nothing is right or wrong.
        macro_f1: Unweighted mean F1 over classes; None where there are none.
        loss: Mean negative log-likelihood in nats.
        figures: What else the task measures, by name.
        accuracy_interval: Ends of what the accuracy is in with 95% confidence, were the rows drawn anew; here and below
            None of versions that did not tell.
        macro_f1_interval: The same of the macro-F1; None for causal LM.
        loss_interval: The same of the loss; None of a single row, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(ge=0)
    accuracy: Fraction | None = None
    macro_f1: Fraction | None = None
    loss: Loss
    figures: dict[str, Figure] = Field(default_factory=dict)
    accuracy_interval: Within | None = None
    macro_f1_interval: Within | None = None
    loss_interval: Annotated[tuple[Loss, Loss], AfterValidator(_ordered)] | None = None


class Answers(BaseModel):
    """How alike the answers that a model writes are to the right ones: sums over rows, each in [0, 1].

    Attributes:
        n: Rows that were answered.
        exact_match: Answers that are the right one.
        normalised_match: Answers that are so without regard to case, punctuation and articles.
        rouge_l: Sum of ROUGE-L (F1 of the longest common subsequence of words).
        rouge_l_squares: Sum of its squares.
        chrf: Sum of chrF2 (F2 of character n-grams).
        chrf_squares: Sum of its squares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(ge=1)
    exact_match: int = Field(ge=0)
    normalised_match: int = Field(ge=0)
    rouge_l: Amount
    rouge_l_squares: Amount
    chrf: Amount
    chrf_squares: Amount

    @model_validator(mode="after")
    def _possible(self) -> Self:
        more = self.n * (1 + 1e-9)  # sums are rounded
        if max(self.exact_match, self.normalised_match, self.rouge_l, self.chrf) > more:
            raise ValueError("a sum is of more than one for each row")
        for name in ("rouge_l", "chrf"):
            total, squares = getattr(self, name), getattr(self, f"{name}_squares")
            if not total**2 / more <= squares + 1e-9 or squares > total + 1e-9:
                raise ValueError(f"{name} and the sum of its squares are not of numbers between 0 and 1")
        return self


class EvaluationReply(BaseModel):
    """What a client answers to an evaluate or a baseline message.

    Attributes:
        client: Id of the client.
        n_train: Training rows that take part in the rounds.
        n_test: Held-out rows.
        stages: Scores by stage: ``base``, ``local``, ``global``, ``personalised``.
        gains: How much better the personalised model is than ``local`` on the same held-out rows, by measure: above 0
            where it is better. Of an evaluate message, where there was a baseline message before.
        answers: How alike the answers to ``evaluate.generate`` held-out rows are to the right ones, by stage; empty
            where none were asked for, or no row has a whole answer.
        tokens: Tokens of the held-out rows by expert id, summed over sites; from the personalised model. Empty under
            secure aggregation.
        probes: What ``evaluate.probes`` added up over the held-out rows with the personalised model, by name and site;
            empty under ``privacy``.
        seconds: Wall time of the local work.
        started: As in `ClientReply`; None where no personal state was used.
        remembered: Whether the baselines were trained by an earlier run.
        aside: As in `Hello`.
        chosen: Name of the candidate of ``personal.candidates`` that the personalised model is; empty where there is no
            choice, and under ``privacy``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    client: str
    n_train: int = Field(ge=0)
    n_test: int = Field(ge=0)
    stages: dict[str, Scores]
    gains: dict[str, Figure] = Field(default_factory=dict)
    answers: dict[str, Answers] = Field(default_factory=dict)
    tokens: dict[str, Amount] = Field(default_factory=dict)
    probes: dict[str, dict[str, list[Sum]]] = Field(default_factory=dict)
    seconds: Amount
    started: int | None = Field(default=None, ge=0)
    remembered: bool = False
    aside: int = Field(default=0, ge=0)
    chosen: str = Field(default="", max_length=64)
