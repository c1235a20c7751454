"""The interfaces of a routed site.

Each interface is a class with the defaults that most methods have; a method states only what differs. Shared code asks
these attributes, never a method's name. What only some methods have is a protocol of its own. Experts and mixers have
their interfaces in `molehill.molora.banks`.

A site pipes ``Scorer -> LogitTransform* -> Selector`` into a bank of experts. Where to put a new method:
*changes z?* Scorer or LogitTransform; *z -> w?* Selector; *what is computed?* Expert; *how outputs meet weights?*
Mixer; *in what order?* Topology; *how many and where?* Allocation; *start values?* InitStrategy; *extra gradient?*
RoutingLoss; *decode time only?* a strategy of `molehill.decoding`; *only looks?* Diagnostic.

Shapes: B batch, T tokens, d features, E routed experts, H heads of a multi-head route, r rank, R sum of ranks.
Router arithmetic is float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from molehill.molora.distributions import softmax


class Site(NamedTuple):
    """One adapted module.

    Attributes:
        layer: Index of its transformer layer.
        name: Path in the base model.
        n_layers: Number of transformer layers.
        d_in: Input features.
        d_out: Output features.
    """

    layer: int
    name: str
    n_layers: int
    d_in: int
    d_out: int


class Told(NamedTuple):
    """What is told of rows beside their tokens.

    Attributes:
        task_ids: Task of every row, ``[B]`` int64, or None.
        domain_ids: Domain of every token, ``[B, T]`` int64, -1 where it has none; or None.
    """

    task_ids: Tensor | None = None
    domain_ids: Tensor | None = None


NOTHING = Told()


@dataclass
class Overrides:
    """What a caller may change in a trained router without touching its weights.

    Attributes:
        bias: Added to the logits, ``[E]``, or ``[B, 1, E]`` for every row.
        expert_mask: True for the experts that may be chosen, ``[E]`` or ``[B, 1, E]`` bool.
        ranks: Places of the experts that a token chooses, in place of the selector's choice: those from the first
            number to before the second, the best at 0. They share the weight by the softmax of their logits.
        weights: Those of the experts, ``[E]``, for all tokens, in place of the selector's.
    """

    bias: Tensor | None = None
    expert_mask: Tensor | None = None
    ranks: tuple[int, int] | None = None
    weights: Tensor | None = None


@dataclass
class RouteContext:
    """All that a router may look at.

    Attributes:
        x: Router input, ``[B, T, d]``.
        site: Where the router sits.
        mask: True for real tokens, ``[B, T]`` bool; None when nothing is padded.
        task_ids: Task (or client) of every row, ``[B]`` int64.
        progress: Fraction of training done, 0 to 1, for schedules.
        training: Whether stochastic parts are on.
        overrides: Run-time changes.
        token_ids: Id of every token, ``[B, T]`` int64; None where the base was given no ids, or x is of no tokens.
        domain_ids: Domain of every token, ``[B, T]`` int64, -1 where it has none (``data.domains``); None where nobody
            has said, or x is of no tokens.
        experts: First factors of the routed experts of the site, ``[E, r, d]``, where the scorer reads them.
        base: Of every row the mean state of its prompt after the last layer of the base alone, ``[B, w]`` float32,
            where a scorer of the model reads it. A row's prompt ends where its first answer begins; without answers, or
            where the row begins with one, it is the whole row.
        prompt: Of every row the frozen embeddings of its tokens, ``[B, P, w + 1]`` float32, where a scorer of the model
            reads them. The last feature is 1 for those of the prompt, as of ``base``, and 0 for all others.
        base_route: Where the base is a mixture itself, and the site lies beside one of its blocks: the weights that the
            base's own router gives its own experts there, ``[B, T, E]``.
    """

    x: Tensor
    site: Site
    mask: Tensor | None = None
    task_ids: Tensor | None = None
    token_ids: Tensor | None = None
    domain_ids: Tensor | None = None
    progress: float = 0.0
    training: bool = False
    overrides: Overrides = field(default_factory=Overrides)
    experts: Tensor | None = None
    base: Tensor | None = None
    prompt: Tensor | None = None
    base_route: Tensor | None = None


@dataclass
class Route:
    """What a selector returns; size-1 dimensions broadcast (T=1: per sequence, B=1: static).

    Attributes:
        logits: Scores after all transforms, ``[B|1, T|1, (H,) E]`` float32.
        weights: Final weights, 0 for unselected experts, same shape.
        distribution: The selector's full distribution, same shape; None when it is the softmax of the logits and the
            selector had no need of it.
        aux: Further tensors a loss may ask for: ``selected`` (bool, same shape) where the choice of experts differs
            from ``weights > 0``, ``entropy`` ``[B, T]``.
        blend: What the weights of always-on experts and those of routed ones are multiplied by, ``[B|1, T|1, 1]``; None
            where both stay.
    """

    logits: Tensor
    weights: Tensor
    distribution: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    blend: tuple[Tensor, Tensor] | None = None

    @cached_property
    def probs(self) -> Tensor:
        """The selector's full distribution; computed when first asked for, since only losses need it."""
        return softmax(self.logits) if self.distribution is None else self.distribution

    @property
    def selected(self) -> Tensor:
        """True for the experts chosen, same shape as the weights."""
        return self.aux.get("selected", self.weights > 0)

    def times(self, share: Tensor) -> Route:
        """The route with weights of which every token has a share, ``[B, T, 1]``, and no experts where it is 0."""
        chosen = {"selected": self.aux["selected"] & (share > 0)} if "selected" in self.aux else {}
        return replace(self, weights=self.weights * share, aux=self.aux | chosen)


@dataclass
class RouteRecord:
    """One route as it happened in a forward pass.

    Attributes:
        site: First site that used the route.
        route: The route.
        mask: True for real tokens, ``[B, T]`` bool, or None.
        costs: Relative size of every routed expert (its rank over the mean rank), ``[E]``.
        types: Task type of every row, ``[B]`` int64, or None.
    """

    site: Site
    route: Route
    mask: Tensor | None
    costs: Tensor
    types: Tensor | None = None


class Seen(list[RouteRecord]):
    """The routes of a pass, and what else of it losses may ask for.

    Attributes:
        scores: Of every site with a gate its score ``[1]``, and the least with which it is adapted.
        progress: Fraction of training done.
    """

    def __init__(self, records: Iterable[RouteRecord] = (), progress: float = 0.0) -> None:
        super().__init__(records)
        self.scores: list[tuple[Tensor, float]] = []
        self.progress = progress


Read = Literal[
    "task_ids", "token_ids", "domain_ids", "experts", "base", "prompt", "base_route"
]  # what a route may depend on beside x
# what a part needs of the others at its site
Wish = Literal["pairs", "equal_ranks", "row_route", "no_shared", "vectors"]


class Scorer(nn.Module, ABC):
    """Produces logits; start values come from torch's global generator.

    Parameters named ``of.<expert>.`` go with an expert: a client that does not train it does not train them either.

    Attributes:
        n_experts: Routed experts, E.
        heads: Heads of a route; more than one have weights each for their own block of features.
        fusable: The logits are ``x @ weight.T``, plus `offset`, and nothing else, so that the product can be computed
            together with the experts' first factors.
        level: How often the logits may change: with every token, with every row, or never.
        reads: What they depend on beside the input; a scorer that reads ``experts`` is told their ``rank``, one that
            reads ``base`` or ``prompt`` the ``width`` of its states or embeddings. One that reads ``base_route``
            has as many experts as the base has in the block.
        wants: What it needs of the experts: low-rank ``pairs``, of ``equal_ranks``.
        ordered: Experts are told apart by their place, so that they cannot change it, or leave or join alone.
        own: Parameters that stay with their client under ``personal.gate = "split"`` and ``"anchored"``.
        fixed: Parameters that no training moves: the server sets them, or what is found on the owner's rows. Those that
            are not ``own`` are never sent.
        embeds: It is `Embeds`.
        settles: It is `Settles`.
        adapts: It is `Adapts`.
        leans: The one of them, ``[E]``, that ``federation.assign`` may set; None where there is none.
        lean_means: What its numbers are: ``bias``, added to the logits; or ``place``: 2 for the expert that is the
            client's own, 1 for others that it may use, 0 for those that are closed to it.
        weighs: What the selector is to make of its logits: ``any`` weights; their ``softmax``, of which the scorer made
            the logits; all for the ``best`` expert; or the ``logits`` themselves.
    """

    n_experts: int
    heads: int = 1
    fusable: bool = False
    level: Literal["token", "row", "static"] = "token"
    reads: frozenset[Read] = frozenset()
    wants: frozenset[Wish] = frozenset()
    ordered: bool = False
    own: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()
    embeds: bool = False
    settles: bool = False
    adapts: bool = False
    leans: str | None = None
    lean_means: Literal["bias", "place"] = "bias"
    weighs: Literal["any", "softmax", "best", "logits"] = "any"

    def offset(self) -> Tensor | None:
        """What is added to the product of a fusable scorer: ``[E]``, with clients in the model ``[C, E]``."""
        return None

    @abstractmethod
    def axes(self) -> Mapping[str, int]:
        """The axis of the experts in every parameter, -1 for none."""

    @abstractmethod
    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B|1, T|1, (H,) E]``."""


@runtime_checkable
class Embeds(Protocol):
    """A scorer that places tokens and experts in one space."""

    def embeddings(self, ctx: RouteContext) -> Tensor:
        """Those of tokens and of experts ``[B, T, 1 + E, r]``, the token's first."""
        ...


@runtime_checkable
class Settles(Protocol):
    """A scorer that goes by where rows lie among the states of the base (`RouteContext.base`).

    Its parameters ``places [E, w]`` are those of the experts, which ``federation.assign`` sets, and ``mine [E, w]``
    those of the owner's rows (`molehill.wire.keys.PLACES` and `OWN_PLACES`). A row of zeros is none.
    """

    @property
    def unsettled(self) -> bool:
        """Whether the owner has experts of its own, and no places of its rows were found yet."""
        ...

    def settle(self, states: Tensor, seed: int) -> None:
        """Find places of the owner's rows, as many as it has experts of its own, among their states ``[N, w]``."""
        ...

    def settled(self) -> Tensor:
        """The places of these experts, ``[n, w]``, as they were found; zeros where there are fewer."""
        ...


@runtime_checkable
class Adapts(Protocol):
    """A scorer with numbers that follow, by a rule, from how much its experts had to do; they are `Scorer.fixed`."""

    def adapt(self, mass: Tensor) -> None:
        """Take in the gate mass of every expert over the real tokens of a round so far, ``[E]``."""
        ...


class Blend(nn.Module, ABC):
    """How always-on and routed experts share the weight of a token.

    Its parameters travel as ``gate.blend.<name>``; with several clients in the model they have a leading client axis.

    Args:
        d_in: Input features, d.

    Attributes:
        plain: Both keep the weights that they have.
    """

    plain: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the weights of always-on experts are multiplied by, and those of routed ones, ``[B|1, T|1, 1]``.

        Args:
            x: Router input ``[B, T, d]``.
        """


class LogitTransform(ABC):
    """Edits logits, for example temperature or expert dropout; one object may serve several routers.

    Attributes:
        reads: What it depends on beside the logits.
        random: It draws numbers in training, so clients never share its batches.
        by_logits: What it does to a row follows from the row's logits and mask and from the course of training. Rows of
            several sites may then come in one call, with the input and the site of the first.
    """

    reads: frozenset[Read] = frozenset()
    random: bool = False
    by_logits: bool = False

    @abstractmethod
    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits of the same shape."""


class Selector(ABC):
    """Turns logits into weights (activation included); one object may serve several routers.

    Attributes:
        causal: At inference a token's weights depend neither on later tokens nor on other rows; selectors of which
            this is not true are refused for generation.
        per_row: In training rows do not see each other; where they do, clients never share its batches.
        random: It draws numbers in training; as ``per_row``.
        by_logits: As of `LogitTransform`; its routes have a row for every row of the logits.
        takes_k: See `OfK`.
        may_close: At inference a token may have no routed expert.
        ordered: Experts are told apart by their place, so that they cannot change it, or leave or join alone.
        masked: At inference weights depend on which tokens are real.
        bound: No weight is larger.
    """

    causal: bool = True
    per_row: bool = True
    random: bool = False
    by_logits: bool = False
    takes_k: bool = False
    may_close: bool = False
    ordered: bool = False
    masked: bool = False
    bound: float = 1.0

    def eval_form(self) -> Selector:
        """The selector as it acts at inference: its deterministic twin, which is exported."""
        return self

    @abstractmethod
    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for logits ``[B|1, T|1, (H,) E]``."""


class OfK(Selector):
    """A selector whose parameters have a ``k``, which an allocation may set, and a client may have its own."""

    takes_k = True

    @abstractmethod
    def with_k(self, k: int) -> Selector:
        """One like this with another ``k``."""


class Topology:
    """Wires the adapted linears of a layer; those of whole blocks are `molehill.molora.steps.BlockTopology`.

    Attributes:
        scope: The route scope that it forces; None leaves the choice to the configuration. A forced scope means that
            it mixes outputs itself, over the whole block.
        wants: As of `molehill.molora.banks.Mixer`, of the sites that are not plain; ``no_shared``: no experts that are
            always on.
    """

    scope: Literal["block"] | None = None
    wants: frozenset[Wish] = frozenset()

    def roles(self, site_names: Sequence[str]) -> Mapping[str, Literal["plain", "expand", "contract"]]:
        """Say which part each of a layer's sites plays.

        ``plain`` sites add their experts' mixed delta to their own output. In a block, ``expand`` sites keep one
        output per expert and the ``contract`` site mixes them back into one.
        """
        return dict.fromkeys(site_names, "plain")


class Gated(NamedTuple):
    """A gate of a site, see `molehill.molora.gain.Gain`.

    Attributes:
        threshold: The least score with which it is adapted.
        start: Its score at the start.
    """

    threshold: float
    start: float


@dataclass(frozen=True)
class SitePlan:
    """What one site gets.

    Attributes:
        ranks: Rank of every routed expert; its length is E.
        shared_ranks: Rank of every always-on expert.
        top_k: Overrides the selector's k at this site; None keeps it.
        gated: Its gate; None for a site that is always adapted.
    """

    ranks: tuple[int, ...]
    shared_ranks: tuple[int, ...] = ()
    top_k: int | None = None
    gated: Gated | None = None

    @property
    def costs(self) -> Tensor:
        """Relative size of every routed expert, its rank over the mean rank, ``[E]``."""
        ranks = torch.tensor(self.ranks, dtype=torch.float32)
        return ranks / ranks.mean()


class Allocation(ABC):
    """How many experts of which rank every site gets."""

    @abstractmethod
    def plan(self, sites: Sequence[Site], experts: int, shared: int, rank: int) -> Mapping[str, SitePlan]:
        """Return the plan of every site by its name."""


class InitStrategy(ABC):
    """Start values of low-rank experts; the delta must be zero at the start.

    Attributes:
        frozen: Factors that keep their start values.
        alike: All routed experts of a site start with the same values.
    """

    frozen: frozenset[Literal["A", "B"]] = frozenset()
    alike: bool = False

    @abstractmethod
    def __call__(self, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
        """Fill ``A [r, d_in]`` and ``B [d_out, r]`` of one expert in place."""


class RoutingLoss(ABC):
    """An extra loss on routes; padding never counts. The coefficient lives in the configuration.

    Attributes:
        ordered: It is another one when experts change places.
        of_sites: It is about the scores of sites and not about routes (`Seen.scores`).
    """

    ordered: bool = False
    of_sites: bool = False

    @abstractmethod
    def __call__(self, records: Sequence[RouteRecord]) -> Tensor:
        """Return an unweighted scalar, the mean over records."""


class Diagnostic(ABC):
    """Looks at routes and adds up, so that what several clients have seen is the sum of what each has.

    Attributes:
        state: Sums by site, float64 on the CPU; of one site always of one `shape`.
    """

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def shape(self, experts: int) -> tuple[int, ...]:
        """Shape of the sums of a site with so many routed experts."""

    @abstractmethod
    def update(self, records: Sequence[RouteRecord]) -> None:
        """Take in the records of one forward pass."""

    @abstractmethod
    def report(self) -> dict[str, float]:
        """Return figures by ``site/figure``."""

    def add(self, site: str, sums: Tensor) -> None:
        """Add sums of a site, float64 on the CPU."""
        known = self.state.get(site)
        self.state[site] = sums.clone() if known is None else known + sums
