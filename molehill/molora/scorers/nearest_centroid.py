"""FedRouter's router: a row goes to the expert of the centroid that is nearest to what the base makes of its prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from molehill.kmeans import kmeans
from molehill.molora.interfaces import RouteContext, Scorer
from molehill.registry import register


@register(
    "scorer",
    "nearest_centroid",
    paper="Talasso et al. 2026, Task-Centric Personalized Federated Fine-Tuning of Language Models (FedRouter)",
    url="https://arxiv.org/abs/2604.00050",
)
class NearestCentroid(Scorer):
    """``z_e = -||h - c_e||^2``, h being the mean state of a row's prompt after the last layer of the base alone.

    An owner clusters the h of its rows by k-means, with as many clusters as it has experts of its own
    (``federation.assign`` says which are). In training a row goes by its cluster: to the expert of that place before
    there are centroids c, and to the own expert whose c is nearest to the cluster's centre after. Otherwise a row goes
    by itself, to the nearest c of the experts that are open to its owner. The selector is to be ``top_k`` of 1, and
    ``molora.scope`` to be ``model``: a row has one expert in the whole network. Nothing of it is learnt, and the base
    runs once more for every pass. Without centroids and clusters, as in an adapter trained alone, all rows go to one
    expert.

    Differs from the paper: h is of the prompt as the model reads it, in the format of training, where the paper's code
    has the bare instruction; k-means keeps the best of eight starts.

    Args:
        d_in: Input features, which it does not look at.
        n_experts: Routed experts, E.
        width: Features of h, w.

    Attributes:
        places: c ``[E, w]`` float32, zeros where an expert has none.
        mine: Centres of the owner's clusters, ``[E, w]``, in the places of the experts that were its own when they were
            found; zeros elsewhere.
        lean: ``[E]``: 2 for the owner's experts, 1 for others that are open to it, 0 for the closed; with 0 for all,
            as in the shared model, all are open.
    """

    level = "row"
    reads = frozenset({"base"})
    own = frozenset({"mine", "lean"})
    fixed = frozenset({"places", "mine", "lean"})
    settles = True
    leans = "lean"
    lean_means = "place"
    weighs = "best"

    def __init__(self, *, d_in: int, n_experts: int, width: int = 0) -> None:
        super().__init__()
        self.n_experts = n_experts
        width = width or d_in
        self.places = nn.Parameter(torch.zeros(n_experts, width))
        self.mine = nn.Parameter(torch.zeros(n_experts, width))
        self.lean = nn.Parameter(torch.zeros(n_experts))

    def axes(self) -> Mapping[str, int]:
        """Rows, and the numbers of ``lean``."""
        return {"places": 0, "mine": 0, "lean": 0}

    @torch.no_grad()
    def forward(self, ctx: RouteContext) -> Tensor:
        """Return logits ``[B, 1, E]``; the least number there is for experts that are closed."""
        assert ctx.base is not None
        h, lean = ctx.base.float(), self.lean
        own, there, found = lean > 1.5, self.places.any(-1), self.mine.any(-1)
        among = (lean > 0.5) | ~(lean > 0.5).any()
        if ctx.training and own.any() and found.any():
            z = _near(h, self.mine, found)
            if (own & there).any():  # a cluster's expert is that of its centre, whatever is nearer to the row
                z = _near(self.mine[z.argmax(-1)], self.places, own & there)
            return z.unsqueeze(1)
        if (among & there).any():
            return _near(h, self.places, among & there).unsqueeze(1)
        if found.any():  # the owner's own experts, before anybody else's are known
            return _near(h, self.mine, found).unsqueeze(1)
        return _near(h, torch.zeros_like(self.places), among).unsqueeze(1)

    @property
    def unsettled(self) -> bool:
        """See `molehill.molora.interfaces.Settles`."""
        return bool((self.lean > 1.5).any()) and not bool(self.mine.any())

    @torch.no_grad()
    def settle(self, states: Tensor, seed: int) -> None:
        """See `molehill.molora.interfaces.Settles`."""
        places = (self.lean > 1.5).nonzero().squeeze(1)
        self.mine.zero_()
        if len(places):
            centres = kmeans(states.cpu().double().numpy(), len(places), seed).astype(np.float32)
            self.mine[places[: len(centres)]] = torch.from_numpy(centres).to(self.mine.device)

    def settled(self) -> Tensor:
        """See `molehill.molora.interfaces.Settles`."""
        return self.mine.detach()[self.lean > 1.5]


def _near(h: Tensor, centres: Tensor, there: Tensor) -> Tensor:
    """Minus the squared distances of rows ``[B, w]`` to the centres ``[E, w]`` that are there, ``[B, E]``."""
    apart = torch.stack([(h - centre).square().sum(-1) for centre in centres], -1)
    most = torch.finfo(apart.dtype).max
    return (-apart.clamp_max(most / 2)).masked_fill(~there, -most)  # what is closed is farther than anything
