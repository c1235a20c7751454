"""The experts that suit a prompt answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from molehill.catalogue import register
from molehill.decoding import options
from molehill.decoding.interfaces import (
    Array,
    Example,
    Passes,
    Picker,
    Scores,
    Setting,
    Strategy,
    Through,
    all_of,
    log_softmax,
)
from molehill.errors import AnswerError

_LANE = "picked"


@dataclass(frozen=True)
class PickParams:
    """Parameters of `Pick`.

    Attributes:
        by: The picker.
        k: How many experts answer together; 0 for all.
        weigh: How several share a text: as the router chooses among them, by the softmax of their scores, or by their
            mean, for all tokens alike; empty for what the picker has.
        rows: A file of rows from which the picker learns.
        others: Keys of the picker.
    """

    by: str = "ppl"
    k: Annotated[int, Ge(0)] = 1
    weigh: Literal["", "router", "softmax", "mean"] = ""
    rows: str = ""
    others: Annotated[Mapping[str, Any], options.Rest()] = field(default_factory=dict)


@register("decoding", "pick", params=PickParams, paper="house: the best experts of a picker answer")
class Pick(Strategy):
    """A picker scores every expert for a prompt, and the best k answer it: one by itself, several by weights.

    Keys that are none of its own are the picker's; ``molehill methods picker`` lists pickers. Of equals the first in
    the order of ids is picked. Weights for all tokens make one merged expert of several, for this text.
    """

    routed = True
    neutral: ClassVar[Mapping[str, Any]] = {"k": 0, "weigh": "router"}

    def __init__(self, params: PickParams) -> None:
        self._params = params
        self._picker: Picker = options.build("picker", params.by, params.others)
        self._learnt = not self._picker.fitted
        self.on_device = self._picker.on_device
        if self._picker.fitted and not params.rows:
            raise AnswerError(f"picker {params.by} learns from rows", where="--strategy", mend="Add --set rows=FILE.")
        if params.rows and not self._picker.fitted:
            raise AnswerError(f"picker {params.by} learns from no rows", where="--set rows", mend="Leave them out.")

    @property
    def rows(self) -> str:
        """See `Learns.rows`."""
        return self._params.rows

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`."""
        self._picker.learn(passes, examples, through)
        self._learnt = True

    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:
        """See `Strategy.begin`.

        Raises:
            AnswerError: There are not as many experts to pick, or the picker cannot score this text.
        """
        setting = self.setting(passes, prompt)
        if setting is None:
            return passes.logits
        return lambda ids: passes.logits(ids, setting, _LANE)

    def setting(self, passes: Passes, prompt: Sequence[int]) -> Setting | None:
        """How routers choose for a prompt; None for as they do.

        Raises:
            AnswerError: As of `begin`.
        """
        if not self._learnt:
            raise AnswerError("the picker has learnt from no rows yet", where="--strategy", mend="Give it rows.")
        names, weigh = passes.experts, self._params.weigh or self._picker.weigh
        k = self._params.k or len(names)
        if k > len(names):
            raise AnswerError(f"there are {len(names)} experts, not {k}", where="--set k", mend="Pick fewer.")
        if k == len(names) and weigh == "router":
            return None
        scores = np.asarray(self._picker.scores(passes, prompt), np.float64)
        if (able := int(np.isfinite(scores).sum())) < k:
            raise AnswerError(f"{k} experts are to be picked, and {able} can be", where="--set k", mend="Pick fewer.")
        chosen = self._picker.group(scores, k)
        if k == 1 or weigh == "router":
            return passes.only([names[place] for place in chosen])
        share = np.exp(log_softmax(scores[chosen])) if weigh == "softmax" else np.full(k, 1 / k)
        return Setting(weights=tuple(_spread(passes, [names[place] for place in chosen], share).tolist()))


def _spread(passes: Passes, names: Sequence[str], share: Array) -> Array:
    """Shares of experts as weights of all routers, ``[S]``."""
    found = np.zeros(passes.size)
    for name, part in zip(names, share, strict=True):
        mask = passes.only([name]).mask
        assert mask is not None
        found += np.where(mask, part, 0.0)
    return found
