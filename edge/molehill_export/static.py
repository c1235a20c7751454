"""A gate as fixed weights: what its routers say on the mean, and how far that is from what they say token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from molehill.errors import BundleError
from molehill.molora.interfaces import Route, RouteContext, Scorer, Selector
from molehill.molora.model import MoLoRAModel
from molehill.molora.router import Router
from molehill.molora.trial import keeps_logits
from molehill.outputs import Reading, reading_of
from molehill.tasks.kind import kind_of
from molehill_export.parity import FLOORS, Difference, calibration, decode, passes
from molehill_export.rows import labelled
from molehill_simulation.source import Source

_ROWS = 128  # of a client's, to take the mean over
_FLOOR = FLOORS["int4"]  # what a fixed mixture may change at most, as for bundles
_SAME = 1e-5  # weights that differ by no more are one


@dataclass(frozen=True)
class Fixed:
    """Fixed weights.

    Attributes:
        weights: Of the routed experts by the name of the route's first site, ``[E]`` or, with heads, ``[H, E]``.
        varies: By how much a weight differs from its mean at most, over all tokens and routes.
        texts: How many texts were read.
        error: Mean squared difference of the logits from those of the routed model, over their variance.
        agreement: How often the likeliest token, or class, is the same.
    """

    weights: dict[str, Tensor]
    varies: float
    texts: int
    error: float
    agreement: float

    @property
    def exact(self) -> bool:
        """Whether the routers always say the same."""
        return self.varies <= _SAME

    def require(self, gate: str, mend: str) -> None:
        """Refuse weights that make another model.

        Args:
            gate: Whose gate it is.
            mend: What to do instead.

        Raises:
            BundleError: They change more than a bundle may, of the fewest bits.
        """
        error, agreement = _FLOOR
        if self.exact or (self.error <= error and self.agreement >= agreement):
            return
        raise BundleError(
            f"a fixed mixture would not be this model: with the mean weights of gate {gate} the relative logit error "
            f"is {self.error:.2g} (at most {error:g}), the likeliest token or class the same in {self.agreement:.1%} "
            f"(at least {agreement:.0%}), since its routers choose token by token",
            mend=mend,
        )


def fix_gate(source: Source, gate: str, rows: Path | None = None) -> Fixed:
    """Weigh the experts by somebody's gate, over the rows of a run or public texts.

    Args:
        source: A run or an adapter.
        gate: Whose gate, as for `Source.client`.
        rows: Labelled rows to take the mean over; None for those of a simulation, or the public texts.

    Raises:
        ConfigError: There is no such gate.
        DataError: The rows cannot be read.
    """
    with source.gate(gate) as model:
        texts = [example.input_ids for example in labelled(source, gate, rows, _ROWS)]
        return fix(
            model, texts or calibration(source.tokenizer, source.task.max_length),
            reading_of(kind_of(source.task).bundle),
        )  # fmt: skip


@torch.no_grad()
def fix(model: MoLoRAModel, texts: Sequence[Sequence[int]], reading: Reading) -> Fixed:
    """Weigh the experts as the routers do on the mean over the tokens of some texts, and measure what that changes.

    Args:
        model: With the gate in use.
        texts: Token ids of at least one text.
        reading: How its logits are read.
    """
    runs = passes(model, [len(ids) for ids in texts])
    seen: dict[str, list[Tensor]] = {}
    last = {"logits_to_keep": 1} if model.head is None and keeps_logits(model.base) else {}  # nobody reads them yet
    for run in runs:
        for record in decode(model, [texts[text] for text in run], **last)[1]:
            assert record.mask is not None
            of_tokens = record.route.weights.expand(*record.mask.shape, *record.route.weights.shape[2:])
            seen.setdefault(record.site.name, []).append(of_tokens[record.mask])
    weights = {name: torch.cat(parts).mean(0) for name, parts in seen.items()}
    varies = max(
        (float((part - weights[name]).abs().max()) for name, parts in seen.items() for part in parts), default=0.0
    )
    if varies <= _SAME:
        return Fixed(weights, varies, len(texts), error=0.0, agreement=1.0)
    total = Difference(reading)
    for run in runs:  # once more, since the logits of all texts may be more than memory holds
        some = [texts[text] for text in run]
        routed, _ = decode(model, some)
        with _fixed(model, weights):
            fixed, _ = decode(model, some)
        for ids, one, other in zip(some, routed.numpy(), fixed.numpy(), strict=True):
            total.add(one[: len(ids)], other[: len(ids)])
    return Fixed(weights, varies, total.texts, total.error, total.same / total.predictions)


@contextmanager
def _fixed(model: MoLoRAModel, weights: dict[str, Tensor]) -> Iterator[None]:
    """Let every route have these weights."""
    before = {name: group.router for name, group in model.routers.items()}
    try:
        for group in model.routers.values():
            group.router = Router(_Given(weights[group.site.name]), (), _AsTheyAre(), anchored=False)
        yield
    finally:
        for name, router in before.items():
            model.routers[name].router = router


class _Given(Scorer):
    """Logits that are weights already.

    Args:
        weights: ``[E]`` or ``[H, E]``.
    """

    level = "static"

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.n_experts = weights.shape[-1]
        self.heads = len(weights) if weights.dim() == 2 else 1

    def axes(self) -> dict[str, int]:
        """It has no parameters."""
        return {}

    def forward(self, ctx: RouteContext) -> Tensor:
        """The weights ``[1, 1, (H,) E]``, whatever the input."""
        del ctx
        return self.weights.view(1, 1, *self.weights.shape)


class _AsTheyAre(Selector):
    """Takes logits for weights."""

    def __call__(self, z: Tensor, ctx: RouteContext) -> Route:
        """Return the route for ``[1, 1, (H,) E]``."""
        del ctx
        return Route(z, z, z)
