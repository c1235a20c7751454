"""The sections of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from molehill.config.methods import Axis, LossRef, MethodRef, distinct_names, ref

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Split: TypeAlias = Literal["test", "validation"]

_MASKED_BOUND = 1e3  # with room for it, sums of many clients keep enough binary places


class Section(BaseModel):
    """A part of the configuration: immutable; unknown keys, and numbers that are not finite, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Run(Section):
    """The run as a whole.

    Attributes:
        name: Names the default run folder and every message of the run.
        seed: Start values, batches, partition and client selection follow from it.
        rounds: Rounds of train, send and merge.
    """

    name: str = Field(default="molehill", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    seed: int = Field(default=0, ge=0)
    rounds: int = Field(default=6, ge=1)


class Base(Section):
    """The frozen base model.

    Attributes:
        model: Hugging Face id, local folder, or ``sample:minilm``.
        revision: Commit or tag of a hub model; pin it for real runs.
        precision: ``auto`` is bf16 where this machine's CPU or GPU is faster at it, as measured, else fp32.
        device: ``auto`` is cuda when there is one.
    """

    model: str = "sample:minilm"
    revision: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"


class Task(Section):
    """What is learnt.

    Attributes:
        kind: What a row holds and what is learnt from it (axis ``task``).
        labels: Class names in the order of the logits, for tasks with classes; those of the rows when none are listed.
        range: Least and greatest number of a regression; those of the rows when it is not given. Numbers are learnt as
            parts of it, so that learning rates mean the same whatever the unit.
        max_length: Longest input in tokens; longer ones are cut.
        pooling: How token states become one vector; ``auto`` is mean for encoders, last token for decoders.
        class_weights: ``balanced``: a training row counts by rows / (classes * rows of its class), so that rare classes
            count as much as common ones, and so does a word by its tag; ``none``: all count alike. Every client goes by
            its own training rows, and sends no counts. Held-out rows are scored unweighted. Classification only.
    """

    kind: Annotated[str, Axis("task")] = "classification"
    labels: tuple[str, ...] = ()
    range: tuple[float, float] | None = None
    max_length: int = Field(default=128, ge=8)
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    class_weights: Literal["none", "balanced"] = "none"

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"label {twice[0]!r} is there twice")
        return labels

    @field_validator("range")
    @classmethod
    def _wide(cls, ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is not None and not ends[0] < ends[1]:
            raise ValueError("the first number must be less than the second")
        return ends


class Data(Section):
    """The rows and how they are dealt to clients.

    Attributes:
        source: ``sample:reviews``, a JSONL, JSON, CSV or TSV file (also with ``.gz``), a Parquet file, a folder saved
            by ``datasets`` or with such files by split (``train.jsonl``, ``train-00000-of-00002.parquet``, also under
            ``data/``), or a hub id.
        split: Split to read of a folder or hub id.
        columns: Names of your columns by the names Molehill uses, for example ``{text = "review", label = "stars"}``.
            Three more are read only when they are named here: ``group``, for rows that must stay together (of one
            author, say), ``task``, a name or number per row for methods that route by task, and ``domain`` for those
            that route by domain.
        domains: What the column named as ``domain`` may hold: names, such as ``["en", "de"]``; or the edges between
            bins of a number, such as ``[2000, 2010]`` for three, an edge itself being of the lower. A row with anything
            else is of no domain. Everybody gives the same.
        clients: Number of clients.
        partition: How rows are dealt to clients.
        rows: At most this many training rows per client.
        test_rows: At most this many held-out rows per client, of either split.
        test_fraction: Part of every client's rows that is held out.
        validation_fraction: Part of all rows that is set aside before, to choose settings on
            (``evaluate.split = "validation"``): whatever seed and partition, no run trains on them or has them among
            its test rows. Rows of one group, and twins, are set aside together.
    """

    source: str = "sample:reviews"
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    domains: tuple[str, ...] | tuple[FiniteFloat, ...] = ()
    clients: int = Field(default=8, ge=1)
    partition: Annotated[MethodRef, Axis("partitioner")] = ref("by_column", column="domain")
    rows: int | None = Field(default=None, ge=1)
    test_rows: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.25, gt=0, lt=1)
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("domains")
    @classmethod
    def _in_order(cls, domains: tuple[str, ...] | tuple[float, ...]) -> tuple[str, ...] | tuple[float, ...]:
        if len(set(domains)) < len(domains):
            raise ValueError("every domain must be there once")
        if domains and not isinstance(domains[0], str) and list(domains) != sorted(domains):
            raise ValueError("edges must go upwards")
        return domains

    @model_validator(mode="after")
    def _of_a_column(self) -> Data:
        if bool(self.domains) is not ("domain" in self.columns):
            raise ValueError("domains and columns.domain need each other")
        return self


class MoLoRA(Section):
    """The adapter: experts, router and where they sit.

    Attributes:
        preset: A published recipe (axis ``preset``); keys given beside it win.
        targets: Names (last part of the module path, or a regular expression over the whole path) of the linear
            modules to adapt; ``all-linear`` for every linear of the transformer layers. With a topology of blocks
            those of feed-forward blocks, or of their first or last linears; ``all-linear`` for every block.
        layers: Indices of the transformer layers to adapt; all when omitted.
        experts: Routed experts per site.
        shared: Always-on experts per site.
        rank: Rank of every expert.
        alpha: LoRA alpha; an expert's scale is alpha / its rank.
        dropout: Dropout on the adapter's input.
        scope: Which sites share one route.
        expert: Kind of expert.
        scorer: Produces the logits.
        transforms: Edit the logits, in order.
        selector: Turns logits into weights.
        blend: How always-on and routed experts share the weight of a token.
        mixer: How weights meet expert outputs.
        topology: How branches are wired.
        allocation: How experts and ranks vary over sites.
        init: Start values.
        losses: Routing losses with their coefficients.
    """

    preset: str | None = None
    targets: tuple[str, ...] | Literal["all-linear"] = Field(default="all-linear", min_length=1)
    layers: tuple[int, ...] | None = None
    experts: int = Field(default=4, ge=1)
    shared: int = Field(default=0, ge=0)
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    scope: Literal["site", "block", "layer", "model"] = "site"
    expert: Annotated[MethodRef, Axis("expert")] = ref("lora")
    scorer: Annotated[MethodRef, Axis("scorer")] = ref("linear")
    transforms: tuple[Annotated[MethodRef, Axis("transform")], ...] = ()
    selector: Annotated[MethodRef, Axis("selector")] = ref("top_k", k=2)
    blend: Annotated[MethodRef, Axis("blend")] = ref("full")
    mixer: Annotated[MethodRef, Axis("mixer")] = ref("output")
    topology: Annotated[MethodRef, Axis("topology")] = ref("parallel")
    allocation: Annotated[MethodRef, Axis("allocation")] = ref("uniform")
    init: Annotated[MethodRef, Axis("init")] = ref("lora")
    losses: tuple[Annotated[LossRef, Axis("routing_loss")], ...] = ()


_HEAD_RESIDUALS: dict[str, Literal["fitted", "computed"]] = {"anchored": "fitted", "convex": "computed"}


class Personal(Section):
    """What every client keeps for itself.

    Attributes:
        gate: ``anchored``: the router is averaged but for what the scorer calls its own (``lean`` of ``scorer =
            "leaning"``), and every client fits a residual of its own to the final model;
            ``personal``: the
            whole router stays (the global model mixes uniformly); ``global``: nothing of the router stays;
            ``split``: what the scorer calls its own stays (the main router of ``scorer = "mixture"``), all else is
            averaged; ``mixture`` is an older name of it.
        head: The same choice for the head of a task that has one (all but ``split``); or ``convex``: averaged as with
            ``anchored``, and when the client's gate is fitted the residual is computed, as the best for what the model
            then reads of the client's rows. How far the head may move is chosen on folds of these rows. It costs no
            steps, and one more reading of the rows.
        decay: L2 pull of the residuals towards zero, per step and unit of learning rate.
        steps: Steps in which a client fits its residuals, after the rounds and on its own rows. No step moves a
            residual and what is sent: the deltas are the same whether a client has residuals or not.
        gate_lr: Peak learning rate of a gate's residual; it falls linearly.
        head_lr: The same for the head's, where it is fitted in steps (``anchored``).
        holdout: How much of its training rows every client sets aside: no round trains on them, and their number
            gives it no weight. They are whole units, such as groups, of every class as many as fit. A client with
            fewer than ten units, or with a class that only these would have, sets nothing aside. What is fitted
            after the rounds is fitted to all training rows.
        candidates: What every client tries to make of the final model, in the order of preference, such as
            ``["fitted_model", "frozen_base", "own_adapter", "trained_alone"]``. Each is made with the rows of the
            rounds and judged on those that ``holdout`` set aside by its loss, a head's logits over the temperature from
            0.5 to 2 that fits them best; the first that is no worse than the best by more than one standard error wins,
            and is made once more with all training rows. A client that set nothing aside takes the first. Without
            any, residuals are fitted as ``gate`` and ``head`` say.
    """

    gate: Literal["anchored", "personal", "global", "split"] = "anchored"
    head: Literal["anchored", "convex", "personal", "global"] = "anchored"
    decay: float = Field(default=0.1, ge=0)
    steps: int = Field(default=16, ge=0)
    gate_lr: float = Field(default=3e-3, gt=0)
    head_lr: float = Field(default=1e-3, gt=0)
    holdout: float = Field(default=0.0, ge=0, le=0.5)
    candidates: tuple[Annotated[MethodRef, Axis("candidate")], ...] = ()

    @property
    def head_residual(self) -> Literal["fitted", "computed"] | None:
        """How a residual of the head is found: in `steps`, or as the best there is; None where the head has none."""
        return _HEAD_RESIDUALS.get(self.head)

    @model_validator(mode="after")
    def _once_each(self) -> Personal:
        distinct_names(self.candidates, "what is chosen is told by its name")
        return self

    @field_validator("gate", mode="before")
    @classmethod
    def _renamed(cls, value: Any) -> Any:
        return "split" if value == "mixture" else value


class Train(Section):
    """Local training.

    Attributes:
        steps: Optimiser steps per round.
        batch_size: Rows per micro-batch.
        accumulation: Micro-batches per optimiser step.
        lr: Peak learning rate of AdamW for the experts.
        router_lr: Learning rate of routers; the experts' when omitted.
        head_lr: Learning rate of the head; the experts' when omitted.
        schedule: Learning rate over the whole run.
        weight_decay: AdamW's decoupled decay of shared tensors.
        clip: Largest gradient norm; None for no limit.
        objective: Loss on the rows.
        rules: What else acts on the gradients in every step of a round, in this order.
        prox: Short for ``rules = [{ name = "fedprox", mu = prox }]``: a pull to the received weights, mu / 2 * ||w -
            w_received||^2.
    """

    steps: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    router_lr: float | None = Field(default=None, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    objective: Annotated[MethodRef, Axis("objective")] = ref("sft")
    rules: tuple[Annotated[MethodRef, Axis("regulariser")], ...] = ()
    prox: float = Field(default=0.0, ge=0)

    @property
    def all_rules(self) -> tuple[MethodRef, ...]:
        """`rules`, and the one that `prox` stands for."""
        return (*self.rules, *([ref("fedprox", mu=self.prox)] if self.prox else ()))

    @model_validator(mode="after")
    def _once_each(self) -> Train:
        distinct_names(self.all_rules, "a pull counts once: in train.rules, or as train.prox")
        return self


class Federation(Section):
    """How the server plans and merges.

    Attributes:
        preset: A published method (axis ``federation``); keys given beside it win, but for another ``assign`` than one
            that it brings, which is refused. Where it has an adapter of its own, a preset of the same name, that is
            ``molora.preset`` unless another is named.
        policy: Who shares, keeps and freezes what.
        select: Which clients take part in a round.
        space: What is combined.
        rule: How it is combined.
        assign: Which experts a client leans on, owns and trains, from what its changes say. ``clusters`` gains most
            where clients have no head of their own, and half a point to one beside ``personal.head = "convex"``.
        lower: How the result comes back to factors.
        server_opt: Optimiser applied to the combined change.
    """

    preset: str | None = None
    policy: Annotated[MethodRef, Axis("policy")] = ref("fedit")
    select: Annotated[MethodRef, Axis("client_selector")] = ref("all")
    space: Annotated[MethodRef, Axis("space")] = ref("factor")
    rule: Annotated[MethodRef, Axis("rule")] = ref("mean")
    assign: Annotated[MethodRef, Axis("assignment")] = ref("none")
    lower: Annotated[MethodRef, Axis("lower")] = ref("none")
    server_opt: Annotated[MethodRef, Axis("server_opt")] = ref("none")


class Rounds(Section):
    """When a round ends and what an update may look like.

    Attributes:
        deadline: Seconds after which a round closes.
        quorum: Part of the selected clients that must answer.
        min_clients: So many must be connected for a round to begin, and so many must answer, whatever the quorum says.
        grace: Seconds to wait for the rest once the quorum is there.
        retries: How often a round below quorum is tried again before the run stops.
        norm_bound: Largest L2 norm of a client's delta; one above it is quarantined. ``auto`` is three times a median
            of norms: the running one of the last rounds, or that of the round itself where it is larger; of one or two
            first deltas none is refused. ``off`` accepts any finite one. Under differential privacy ``auto`` leaves it
            to ``privacy.clip``. Under secure aggregation nobody sees a norm: every client keeps its own to this number,
            or to 1000 under ``auto``.
        max_rows: Most training rows that a client counts for, however many it says it has. ``auto`` is three times the
            median of what all clients of the run say; under differential privacy, and where it is given,
            it is left to ``privacy.max_examples``. ``off`` believes every client. What a client said when it first
            joined a run is never exceeded, unless ``privacy.max_examples`` or ``privacy.clip`` goes with secure
            aggregation: then every client keeps to the numbers of the configuration, and the server names it no other.
    """

    deadline: float = Field(default=3600.0, gt=0)
    quorum: float = Field(default=0.5, gt=0, le=1)
    min_clients: int = Field(default=1, ge=1)
    grace: float = Field(default=30.0, ge=0)
    retries: int = Field(default=1, ge=0)
    norm_bound: Positive | Literal["auto", "off"] = "auto"
    max_rows: Annotated[int, Field(ge=1)] | Literal["auto", "off"] = "auto"

    @field_validator("norm_bound", mode="before")
    @classmethod
    def _unbounded(cls, value: Any) -> Any:
        return "off" if value is None else value  # TOML has no null, so it would be the default when it is read again

    @property
    def fixed_bound(self) -> float | None:
        """`norm_bound` where it is a number."""
        return None if isinstance(self.norm_bound, str) else self.norm_bound

    @property
    def masked_bound(self) -> float | None:
        """What a client under secure aggregation keeps the norm of its change to; None for any finite one."""
        return _MASKED_BOUND if self.norm_bound == "auto" else self.fixed_bound


class Wire(Section):
    """What is sent and how large it may be.

    Attributes:
        up: Codec of the clients' deltas.
        down: Codec of the server's blobs.
        max_bytes: Largest message accepted.
    """

    up: Annotated[MethodRef, Axis("codec")] = ref("int4")
    down: Annotated[MethodRef, Axis("codec")] = ref("fp16")
    max_bytes: int = Field(default=256 * 2**20, ge=1024)


class Privacy(Section):
    """What nobody learns of a single client, neither from the model nor at the server.

    Differential privacy is off unless `clip`, `noise`, `epsilon` and `delta` are all given.

    Attributes:
        clip: Largest L2 norm of a client's change over all tensors it shares; the client scales a larger one down.
        noise: Standard deviation of the noise on the sum of changes, in units of `clip`.
        epsilon: Budget of the run; a round that would exceed it is not begun.
        delta: Probability with which the bound on epsilon may fail; far below one over the number of clients.
        max_examples: Examples from which on a client counts fully; one with fewer counts in proportion. None: all
            clients count alike, or with secure aggregation alone by all of their examples.
        secure_aggregation: The server gets the sum of what clients send, and nothing of a single client.
        threshold: Part of the clients that must stay until the sum is unmasked, of those that `data.clients` and
            `federation.select` have take part in a round, or of those that come if they are more; two thirds or more.
            It is always more than two thirds of them, and three or more. No client helps with a sum of fewer, and as
            many of them together could undo the masks of another one.
    """

    clip: float | None = Field(default=None, gt=0)
    noise: float | None = Field(default=None, gt=0)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float | None = Field(default=None, gt=0, lt=1)
    max_examples: int | None = Field(default=None, ge=1)
    secure_aggregation: bool = False
    threshold: float = Field(default=0.67, le=1)

    @property
    def fixed_examples(self) -> int | None:
        """Examples from which on a client counts fully, where the configuration says so; None where it does not."""
        return self.max_examples or (None if self.clip is None else 1)  # under clipping all count alike

    @field_validator("threshold")
    @classmethod
    def _more_than_two_thirds(cls, value: float, info: ValidationInfo) -> float:
        # Without secure aggregation it counts for nothing, and runs of the first version say 0.66.
        if info.data.get("secure_aggregation") and value < 2 / 3:
            raise ValueError(
                "it must be two thirds (0.67) or more: below that a server that tells clients different stories could "
                "learn sums of few of them"
            )
        return value

    @model_validator(mode="after")
    def _whole(self) -> Privacy:
        parts = ("clip", "noise", "epsilon", "delta")
        missing = [name for name in parts if getattr(self, name) is None]
        alone = self.max_examples is not None and not self.secure_aggregation
        if missing and (alone or len(missing) < len(parts)):
            raise ValueError(f"privacy needs {', '.join(missing)} as well, or nothing is protected")
        return self


class Scenario(Section):
    """What goes wrong in a simulation.

    Attributes:
        availability: Probability that a client is reachable in a round.
        dropout: Probability that a client vanishes in the middle of a round.
        stragglers: Probability that a client is slow in a round.
        delay: Seconds a straggler is late.
        garbage: Ids of clients that send garbage, and which: ``nan``, ``shape``, ``huge``, ``keys`` or ``bytes``.
        poison: Ids of clients that send what they learnt times a number: ``-1`` flips its sign, ``-5`` pulls five
            times as hard the other way. Such a delta is well-formed, and below ``round.norm_bound`` it is accepted.
    """

    availability: float = Field(default=1.0, gt=0, le=1)
    dropout: Fraction = 0.0
    stragglers: Fraction = 0.0
    delay: float = Field(default=5.0, ge=0)
    garbage: dict[str, Literal["nan", "shape", "huge", "keys", "bytes"]] = Field(default_factory=dict)
    poison: dict[str, FiniteFloat] = Field(default_factory=dict)


class Evaluate(Section):
    """What is measured, and on which rows.

    Attributes:
        split: Which held-out rows all figures of a run are about: ``test``, or ``validation`` for those that
            ``data.validation_fraction`` sets aside.
        baselines: Train the ``base`` (head only) and ``local`` (alone) models on every client as well. A simulation
            takes the scores of those that were trained on this machine before from its cache folder: they do not
            depend on the federation; ``anew`` trains them all the same.
        probes: What is looked at while the personalised models read the held-out rows, added up over the clients; in
            ``summary.json`` and the report. Each client's sums are told to the server, so there are none under
            ``privacy``.
        generate: Held-out rows of every client that the final models of a causal LM answer, to tell how alike the
            answers are to the right ones; 0 for none. Only sums are told, never a text.
        batch_size: Rows per evaluation batch.
    """

    split: Split = "test"
    baselines: bool | Literal["anew"] = True
    probes: tuple[Annotated[MethodRef, Axis("diagnostic")], ...] = ()
    generate: int = Field(default=0, ge=0)
    batch_size: int = Field(default=64, ge=1)

    @field_validator("probes")
    @classmethod
    def _once_each(cls, probes: tuple[MethodRef, ...]) -> tuple[MethodRef, ...]:
        distinct_names(probes, "one of each is enough")
        return probes


class Engine(Section):
    """How a simulation uses this machine; it changes how long a run takes, and the rounding of its numbers.

    Attributes:
        workers: Processes that share the clients' work; ``auto`` is one for a base of fewer than five million
            parameters, else one per core.
        together: Most clients that train in the same passes, where the model allows it; ``auto`` is one for such a
            base, four on a GPU, else up to eight, as measured, while every worker has a group of its own.
    """

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    together: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
