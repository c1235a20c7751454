"""Self-contrast of a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge, Gt, Le

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Passes, Scores, Setting, Strategy


@dataclass(frozen=True)
class SelfContrastParams:
    """Parameters of `SelfContrast`.

    Attributes:
        beta: How strongly the weak pass is subtracted; 0 is the model itself.
        alpha: Tokens less likely than this part of the likeliest are left out.
        first: Place of the first expert of the weak pass among those of a token; 0 is the best.
        count: How many experts it has.
    """

    beta: Annotated[float, Ge(0)] = 0.5
    alpha: Annotated[float, Gt(0), Le(1)] = 0.1
    first: Annotated[int, Ge(0)] = 2
    count: Annotated[int, Ge(1)] = 1


@register(
    "decoding",
    "self_contrast",
    params=SelfContrastParams,
    paper="Shi et al. 2024, Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast",
    url="https://arxiv.org/abs/2405.14507",
    seeds=("S146",),
)
class SelfContrast(Strategy):
    """Logits of the model's own route against those of experts it did not choose, two passes a token.

    ``(1 + beta) z - beta z_weak`` where ``z >= log(alpha) + max z``, else -inf. The weak pass has a cache of its own;
    its default is the third best expert of a token, as in the authors' example.
    """

    routed = True
    neutral: ClassVar[Mapping[str, Any]] = {"beta": 0.0}

    def __init__(self, params: SelfContrastParams) -> None:
        self._params = params

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:  # noqa: ARG002  (of the interface)
        """See `Strategy.begin`.

        Raises:
            AnswerError: A router has fewer experts than the weak pass asks for.
        """
        said = self._params
        if said.beta == 0:
            return passes.logits
        weak = Setting(ranks=(said.first, said.first + said.count))

        def scores(ids: Sequence[int]) -> Array:
            strong = passes.logits(ids).astype(np.float64)
            contrast = (1 + said.beta) * strong - said.beta * passes.logits(ids, weak, "weak")
            return np.where(strong >= np.log(said.alpha) + strong.max(), contrast, -np.inf)

        return scores
