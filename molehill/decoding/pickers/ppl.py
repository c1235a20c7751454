"""The expert to whom a prompt is least surprising."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from molehill.catalogue import register
from molehill.decoding.interfaces import Array, Passes, Picker
from molehill.decoding.judging import alone
from molehill.errors import AnswerError


@register(
    "picker",
    "ppl",
    paper="Zhou et al. 2025, MergeME: Model Merging Techniques for Homogeneous and Heterogeneous MoEs",
    url="https://arxiv.org/abs/2502.00997",
    seeds=("S94",),
)
class Ppl(Picker):
    """One over the perplexity of the prompt under every expert alone; several share by the softmax of that.

    One pass over the prompt for each expert, and nothing is trained: the paper's routing without a router. The first
    token, which nothing comes before, does not count. What the paper merges by ties and DARE is not in this.
    """

    fitted = False
    weigh = "softmax"

    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """See `Picker.scores`.

        Raises:
            AnswerError: The prompt is a single token, or the model classifies.
        """
        if len(prompt) < 2:
            raise AnswerError("a single token has no perplexity", mend="Give a longer text.")
        losses = [float(passes.losses(prompt, setting).mean(dtype=np.float64)) for setting in alone(passes)]
        found: Array = np.exp(-np.array(losses))
        return found
