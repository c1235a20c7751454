"""The interface of experts, and of the mixers that weigh them: a bank holds all experts of one kind at one site.

Model, adapter folder, exporter and device know experts by what a bank says of its tensors, and by no kind.

Shapes: B batch, T tokens, E experts of the bank (always-on ones first), R sum of ranks, P rows of patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molehill.molora.block import expand
from molehill.molora.interfaces import InitStrategy, Site, Wish

Peft = Literal["LORA", "IA3", "LOHA", "LOKR"]


class Part(NamedTuple):
    """One tensor of a bank as it travels.

    For devices (`molehill_export.stacks`) a parameter holds one role, and the rows of the experts one after another, as
    many for every expert or as many for every rank; an export of anything else is refused.

    Attributes:
        parameter: Name of the bank's parameter that holds it.
        role: Role on the wire: ``A`` and ``B`` of a low-rank pair, else ``dense.<name>``.
        expert: Index of the expert that it belongs to; None for what is of all experts of the bank, which is a whole
            parameter.
        rows: Its rows in the parameter.
        transposed: Whether the wire holds the transpose.
        scale: Factor from memory to wire.
    """

    parameter: str
    role: str
    expert: int | None
    rows: slice
    transposed: bool = False
    scale: float = 1.0


class Bank(nn.Module, ABC):
    """All experts of one kind at one site.

    Attributes:
        kind: ``pairs``: low-rank pairs, see `PairBank`; ``other``: anything else.
        needs_output: The delta depends on the frozen output.
        modulates: It is `Modulates`.
        peft: The peft method that an expert is, which other libraries load; None where peft has none. The roles of its
            parts are then those of `molehill.molora.peft_folder`.
        transposes: peft has it for linears that store their weight transposed (GPT-2), too.
        noun: What an expert is called, in the singular.
        size: What its rank is called; empty where it has none.
        site: The adapted module.
        ranks: Size of every expert.
    """

    kind: ClassVar[Literal["pairs", "other"]] = "other"
    peft: ClassVar[Peft | None] = None
    transposes: ClassVar[bool] = True
    noun: ClassVar[str] = "expert"
    size: ClassVar[str] = "size"
    needs_output: bool = False
    modulates: ClassVar[bool] = False

    def __init__(self, *, site: Site, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.site, self.ranks = site, ranks

    @property
    def n_experts(self) -> int:
        """Number of experts, always-on ones included."""
        return len(self.ranks)

    def rows(self, expert: int) -> slice:
        """The part of the rank axis that belongs to an expert."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    @property
    def common(self) -> bool:
        """Whether some of its tensors are of all experts."""
        return any(part.expert is None for part in self.parts())

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """Every tensor; those of one parameter follow each other and cover it."""

    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """Give an expert its start values, with which its delta is zero; they are zeros unless this says otherwise."""

    @abstractmethod
    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return ``sum_e w_e delta_e(x, y0)``.

        Args:
            x: Input ``[B, T, d_in]``.
            y0: Frozen output ``[B, T, d_out]``.
            weights: Weights of all experts, always-on ones first, ``[B|1, T|1, E]``.

        Returns:
            The delta ``[B, T, d_out]``.
        """

    @abstractmethod
    def like(self, site: Site, ranks: tuple[int, ...]) -> Bank:
        """A new bank of this kind for other experts, whose scales are 1: they lie in its tensors."""

    def outputs(self, x: Tensor, y0: Tensor) -> Tensor:
        """What every expert adds at weight 1, ``[B, T, E, d_out]``; arguments as of `delta`."""
        one = torch.eye(self.n_experts, device=x.device)
        return torch.stack([self.delta(x, y0, row.view(1, 1, -1)) for row in one], 2)

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None] | None:
        """The change of the frozen weight ``[d_out, d_in]`` and bias ``[d_out]`` that an expert is; None where none."""
        del expert
        return None

    def as_one(self, weights: Tensor) -> dict[str, Tensor] | None:
        """The tensors by role, as they travel, of one expert that is all at fixed weights; None where none is.

        Args:
            weights: Of all experts, ``[E]``.
        """
        if sorted(weights.tolist())[:-1] != [0.0] * (self.n_experts - 1) or float(weights.max()) != 1.0:
            return None
        found = {}
        for part in self.parts():
            if part.expert == int(weights.argmax()):
                rows = self.get_parameter(part.parameter)[part.rows] * part.scale
                found[part.role] = rows.t() if part.transposed else rows
        return found

    def folded(self, weights: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """A linear that computes what the frozen one does with the experts at fixed weights.

        Args:
            weights: Of all experts, ``[E]``.
            weight: Frozen weight ``[d_out, d_in]``.
            bias: Frozen bias ``[d_out]``, if there is one.

        Returns:
            Its weight and bias; None where no linear is that.
        """
        for expert in weights.nonzero().flatten().tolist():
            change = self.weight(expert)
            if change is None:
                return None
            weight = weight + weights[expert] * change[0]
            if change[1] is not None:
                moved = weights[expert] * change[1]
                bias = moved if bias is None else bias + moved
        return weight, bias


@runtime_checkable
class Modulates(Protocol):
    """Experts that each have a vector by which the input of others may be multiplied."""

    def modulation(self, weights: Tensor) -> Tensor:
        """The weighted mean of their vectors, 1 without any weight: ``[B|1, T|1, d_in]`` for ``[B|1, T|1, E]``."""
        ...

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`."""
        ...


class Mixer(ABC):
    """How weights meet experts.

    Attributes:
        fused: It is the weighted sum of outputs, which banks of pairs compute with the frozen product.
        mixes: What it adds up, weighted: the experts' outputs or their parameters; ``other``: neither alone.
        fits: It is a `FittedMixer`.
        wants: Experts that are low-rank ``pairs``, of ``equal_ranks``, or have ``vectors`` (`Modulates`); none that are
            always on (``no_shared``); routes that are one per row (``row_route``).
    """

    fused: bool = False
    mixes: Literal["outputs", "parameters", "other"] = "outputs"
    fits: ClassVar[bool] = False
    wants: frozenset[Wish] = frozenset()

    @abstractmethod
    def __call__(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]``."""

    def keeps(self) -> bool:
        """Whether one expert at weight 1, and nothing else, is what it is by itself."""
        return True


class FittedMixer(nn.Module, Mixer):
    """A mixer with parameters, which every owner fits after the rounds on its own rows and never sends.

    They are residuals: zeros in the shared model, which has the weighted sum of outputs. They travel nowhere, and lie
    with the owner as ``gate.residual.mix.<name>``. One is made for every site, with ``site`` as an argument.

    Attributes:
        personal: Whether they count.
    """

    mixes = "other"
    fits = True

    def __init__(self) -> None:
        super().__init__()
        self.personal = True

    @abstractmethod
    def fitted(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]``; with parameters of 0 it is the weighted sum of outputs."""

    def forward(self, bank: Bank, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]``."""
        return self.fitted(bank, x, y0, weights) if self.personal else bank.delta(x, y0, weights)

    def keeps(self) -> bool:
        """See `Mixer.keeps`."""
        return not self.personal or not any(bool(each.any()) for each in self.parameters())


class PairBank(Bank):
    """Experts that are low-rank pairs ``delta_e(x) = s_e B_e A_e x``, concatenated along one rank axis.

    They take the fused path, may have patches, and several clients' may be stacked. Rows of `A` and `Bt` that belong
    to one expert are contiguous, always-on experts first.

    Args:
        site: The adapted module.
        ranks: Rank of every expert.
        scales: s of every expert.

    Attributes:
        A: ``[R, d_in]`` float32.
        Bt: ``[R, d_out]`` float32, the transposes of all B.
        patch_A: Frozen rows ``[P, d_in]`` that belong to experts (from exact aggregation); empty at first.
        patch_Bt: Frozen rows ``[P, d_out]``, scale absorbed.
        spread: Which ranks belong to which expert, with its scale: ``[E, R+P]`` float32; see `molehill.molora.fused`.
    """

    kind = "pairs"
    patch_A: Tensor  # noqa: N815  (A and B are the field's names)
    patch_Bt: Tensor  # noqa: N815  (A and B are the field's names)
    patch_expert: Tensor
    spread: Tensor

    def __init__(self, *, site: Site, ranks: tuple[int, ...], scales: tuple[float, ...]) -> None:
        super().__init__(site=site, ranks=ranks)
        self.scales = scales
        total = sum(ranks)
        self.A = nn.Parameter(torch.zeros(total, site.d_in))
        self.Bt = nn.Parameter(torch.zeros(total, site.d_out))
        self.register_buffer("patch_A", torch.zeros(0, site.d_in), persistent=False)
        self.register_buffer("patch_Bt", torch.zeros(0, site.d_out), persistent=False)
        self.register_buffer("patch_expert", torch.zeros(0, dtype=torch.long), persistent=False)
        self.register_buffer("spread", self._spread(), persistent=False)

    def parts(self) -> Iterator[Part]:
        """``A [r, d_in]`` and ``B [d_out, r]`` of every expert, the scale absorbed in B."""
        for e in range(self.n_experts):
            yield Part("A", "A", e, self.rows(e))
        for e, scale in enumerate(self.scales):
            yield Part("Bt", "B", e, self.rows(e), transposed=True, scale=scale)

    @torch.no_grad()
    def start(self, expert: int, init: InitStrategy, generator: torch.Generator) -> None:
        """As the strategy says."""
        rows, rank = self.rows(expert), self.ranks[expert]
        A, B = torch.zeros(rank, self.site.d_in), torch.zeros(self.site.d_out, rank)
        init(A, B, generator)
        self.A[rows].copy_(A)
        self.Bt[rows].copy_(B.t())

    def set_patches(self, patches: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Replace the frozen additions.

        Args:
            patches: ``(A [p, d_in], B [d_out, p])`` by expert index, scale absorbed in B.
        """
        experts = sorted(patches)
        device = self.A.device
        self.patch_A = torch.cat([self.patch_A[:0], *(patches[e][0].to(device) for e in experts)])
        self.patch_Bt = torch.cat([self.patch_Bt[:0], *(patches[e][1].t().to(device) for e in experts)])
        index = [e for e in experts for _ in range(patches[e][0].shape[0])]
        self.patch_expert = torch.tensor(index, dtype=torch.long, device=device)
        self.spread = self._spread().to(device)

    def patches(self, expert: int) -> tuple[Tensor, Tensor]:
        """The frozen additions to an expert, on the CPU: ``A [p, d_in]`` and ``B [d_out, p]``, scale absorbed in B."""
        mine = self.patch_expert == expert
        return self.patch_A[mine].cpu(), self.patch_Bt[mine].t().cpu()

    def _spread(self) -> Tensor:
        """``[E, R+P]``: an expert's scale on its ranks, 1 on its patches (theirs is absorbed), 0 elsewhere."""
        experts = [e for e, rank in enumerate(self.ranks) for _ in range(rank)] + self.patch_expert.tolist()
        values = [scale for scale, rank in zip(self.scales, self.ranks, strict=True) for _ in range(rank)]
        values += [1.0] * len(self.patch_expert)
        return F.one_hot(torch.tensor(experts), self.n_experts).t() * torch.tensor(values)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A [R+P, d_in]`` and ``Bt [R+P, d_out]``, patches included."""
        if not len(self.patch_expert):
            return self.A, self.Bt
        return torch.cat([self.A, self.patch_A]), torch.cat([self.Bt, self.patch_Bt])

    def delta(self, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """See `Bank.delta`; the frozen output is not used."""
        A, Bt = self.factors()
        return (F.linear(x, A.to(x.dtype)) * (weights @ self.spread).to(x.dtype)) @ Bt.to(x.dtype)

    def outputs(self, x: Tensor, y0: Tensor) -> Tensor:
        """See `Bank.outputs`; experts of one rank and scale are computed at once."""
        if len({*zip(self.ranks, self.scales, strict=True)}) > 1:
            return super().outputs(x, y0)
        made = expand(x, self.A.to(x.dtype), (self.Bt * self.scales[0]).to(x.dtype), self.n_experts)
        if not len(self.patch_expert):
            return made
        owner = F.one_hot(self.patch_expert, self.n_experts).to(x.dtype)
        frozen = F.linear(x, self.patch_A.to(x.dtype))
        return made + torch.einsum("btp,pe,po->bteo", frozen, owner, self.patch_Bt.to(x.dtype))

    def like(self, site: Site, ranks: tuple[int, ...]) -> PairBank:
        """See `Bank.like`."""
        return PairBank(site=site, ranks=ranks, scales=(1.0,) * len(ranks))

    def weight(self, expert: int) -> tuple[Tensor, Tensor | None]:
        """``s B A``, patches included."""
        A, Bt = self.factors()
        return (Bt * self.spread[expert].unsqueeze(-1)).t() @ A, None
