"""Rerouting while a text is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Gt

from molehill.catalogue import register
from molehill.decoding.interfaces import OWN, Array, Gradients, Passes, Scores, Setting, Strategy
from molehill.errors import AnswerError

_GAIN = 1e-5  # of the loss; less is rounding, by which a host and a device would part


@dataclass(frozen=True)
class RerouteParams:
    """Parameters of `Reroute`.

    Attributes:
        every: Biases move before the answer, and again after this many tokens of it.
        steps: How often they try to move each time; 0 is the model itself.
        size: How far a first step moves a bias, in logits.
        by: Where a step goes: ``spsa`` asks forward passes alone, ``gradient`` a backward pass, which hosts have.
        seed: Of the directions of ``spsa``.
    """

    every: Annotated[int, Ge(1)] = 128
    steps: Annotated[int, Ge(0)] = 4
    size: Annotated[float, Gt(0)] = 0.5
    by: Literal["spsa", "gradient"] = "spsa"
    seed: Annotated[int, Ge(0)] = 0


@register(
    "decoding",
    "reroute",
    params=RerouteParams,
    paper="Su et al. 2025, Rewiring Experts on the Fly: Continuous Rerouting for Better Online Adaptation in "
    "Mixture-of-Expert models",
    url="https://arxiv.org/abs/2510.14853",
    seeds=("S115",),
)
class Reroute(Strategy):
    """Router biases that move while a text is written, so that what is there of it becomes likelier.

    The biases of an answer lower the cross-entropy of prompt and answer so far, begin at 0 and are gone after it. A
    step that does not lower it is not taken, and the next is half as long; where the own routers are better on the
    text as it has become, the biases begin there again. After a move the text is read anew. Differs: every router
    moves, where the paper's are those that are least certain; ``spsa`` takes the better side of a random direction
    (Spall 1992), ``gradient`` the steepest, scaled to the largest bias.
    """

    routed = True
    writes = True
    neutral: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __init__(self, params: RerouteParams) -> None:
        self._params = params

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:
        """See `Strategy.begin`.

        Raises:
            AnswerError: There is no backward pass.
        """
        said = self._params
        if not said.steps:
            return passes.logits
        if said.by == "gradient" and not isinstance(passes, Gradients):
            raise AnswerError("only a host has gradients", where="by", mend="--set by=spsa")
        random = np.random.default_rng(said.seed)
        setting, due = OWN, len(prompt)

        def scores(ids: Sequence[int]) -> Array:
            nonlocal setting, due
            if len(ids) >= due:
                setting, due = self.moved(passes, ids, setting, random), len(ids) + said.every
            return passes.logits(ids, setting, "" if setting is OWN else "moved")

        return scores

    def moved(self, passes: Passes, ids: Sequence[int], setting: Setting, random: np.random.Generator) -> Setting:
        """The setting after all steps on a text.

        Args:
            passes: Of the model.
            ids: The text so far.
            setting: Whose bias the steps begin with.
            random: Draws the directions of ``spsa``.

        Returns:
            One under which the text is at least as likely as under the given one, and under the own routers.
        """
        if len(ids) < 2:
            return setting
        best = _loss(passes, ids, setting)
        if setting is not OWN and (own := _loss(passes, ids, OWN)) < best - _GAIN:
            best, setting = own, OWN
        size = self._params.size
        for _ in range(self._params.steps):
            before = best
            bias = np.zeros(passes.size) if setting.bias is None else np.array(setting.bias)
            for step in self._ways(passes, ids, setting, random):
                tried = Setting(bias=tuple((bias + size * step).tolist()))
                if (loss := _loss(passes, ids, tried)) < best - _GAIN:
                    best, setting = loss, tried
            if best == before:
                size /= 2
        return setting

    def _ways(
        self, passes: Passes, ids: Sequence[int], setting: Setting, random: np.random.Generator
    ) -> Sequence[Array]:
        """Directions to try, ``[S]`` each, of which the largest number is 1."""
        if self._params.by == "spsa":
            way = random.choice((-1.0, 1.0), passes.size)
            return way, -way
        assert isinstance(passes, Gradients)
        slope = passes.slope(ids, setting).astype(np.float64)
        largest = np.abs(slope).max()
        return (-slope / largest,) if largest > 0 else ()


def _loss(passes: Passes, ids: Sequence[int], setting: Setting) -> float:
    return float(passes.losses(ids, setting).astype(np.float64).mean())
