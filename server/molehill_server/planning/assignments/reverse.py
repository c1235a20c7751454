"""FedAMoLE: experts choose their clients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse
from scipy.optimize import linprog
from scipy.special import softmax

from molehill.registry import register
from molehill.wire.tree import Tree
from molehill_server.planning.assigning import Assignment, Leaning, Seen

_SHUT = -100.0  # added to a logit, leaves nothing of the expert


@dataclass(frozen=True)
class ReverseParams:
    """Parameters of `Reverse`.

    Attributes:
        choices: Clients that every expert chooses.
        least: Fewest experts of a client.
        most: Most experts of a client.
    """

    choices: Annotated[int, Field(ge=1)] = 2
    least: Annotated[int, Field(ge=1)] = 2
    most: Annotated[int, Field(ge=1)] = 8

    def __post_init__(self) -> None:
        """Check that there is a number between the two.

        Raises:
            ValueError: There is none.
        """
        if self.most < self.least:
            raise ValueError(f"most = {self.most} is less than least = {self.least}")


@register(
    "assignment",
    "reverse",
    params=ReverseParams,
    paper="Zhang et al. 2024, Personalized Federated Fine-Tuning for LLMs via Data-Driven Heterogeneous Model "
    "Architectures (FedAMoLE)",
    url="https://arxiv.org/abs/2411.19128",
)
class Reverse(Assignment):
    """Before every round each expert chooses the clients whose tokens it fits best; before the first, by lot.

    Client k tells the mean t of its tokens' embeddings and the mean of what each of its experts makes of them. An
    expert's e is the unweighted mean over the clients that had it; one that nobody had keeps its last. Chosen is x in
    {0, 1} with the largest ``sum_ek softmax_k(e . t / sqrt(r)) x_ek``, so that every expert has `choices` clients and
    every client from `least` to `most` experts. That is a flow, so the linear program has whole numbers for a solution.
    A client trains and asks its own experts alone.

    Differs from the paper: an expert is the same client's at all sites, by the mean of the softmax over them, where the
    paper chooses site by site; embeddings are means over the round's own batches, not over rows apart after it; clients
    that took no part in a round count by what they told last. Where the bounds cannot all hold, those on clients give
    way. A client that comes later has all experts until it has told something, and nobody fetches less: the blobs of
    all experts are there for all.
    """

    asks = True
    leans = True

    def __init__(self, params: ReverseParams) -> None:
        self.params = params

    def assign(self, seen: Seen) -> Mapping[str, Leaning]:
        """Whose the experts are in the next round."""
        clients = sorted(seen.changes) if seen.round else sorted(seen.rows)
        if not clients or not seen.experts or seen.round == seen.rounds:
            return seen.known
        if seen.round:
            fit = fits([seen.changes[client] for client in clients])
        else:
            fit = softmax(np.random.default_rng(seen.seed).random((len(seen.experts), len(clients))), axis=1)
        chosen = choose(fit, self.params)
        return {client: _own(seen.experts, chosen[:, number]) for number, client in enumerate(clients)}


def _own(experts: Sequence[str], mine: NDArray[np.bool_]) -> Leaning:
    """What is a client's whose experts are ``mine [E]``; all are named, or those of the last round would stay shut."""
    pairs = list(zip(experts, mine.tolist(), strict=True))
    return Leaning({e: 0.0 if own else _SHUT for e, own in pairs}, frozenset(e for e, own in pairs if own))


def fits(told: Sequence[Tree]) -> NDArray[np.float64]:
    """How well experts fit clients, ``[E, K]``; rows sum to 1.

    Args:
        told: Embeddings of every client, ``[1 + E, r]`` by site, with zeros for an expert that it did not have.
    """
    found = []
    for site in told[0]:
        values = np.stack([each[site] for each in told]).astype(np.float64)  # [K, 1 + E, r]
        tokens, experts = values[:, 0], values[:, 1:]
        had = np.any(experts != 0, axis=2, keepdims=True).sum(0)
        mean = experts.sum(0) / np.maximum(had, 1)
        found.append(softmax(mean @ tokens.T / math.sqrt(values.shape[2]), axis=1))
    mean_fit: NDArray[np.float64] = np.mean(found, axis=0)
    return mean_fit


def choose(fit: NDArray[np.float64], params: ReverseParams) -> NDArray[np.bool_]:
    """Which clients each expert chooses, ``[E, K]``, by how well they fit."""
    experts, clients = fit.shape
    choices = min(params.choices, clients)
    places = experts * choices
    least, most = min(params.least, places // clients), max(params.most, -(-places // clients))
    of_expert = sparse.kron(sparse.identity(experts), np.ones((1, clients)))
    of_client = sparse.kron(np.ones((1, experts)), sparse.identity(clients))
    found = linprog(
        -fit.ravel(),
        A_ub=sparse.vstack([of_client, -of_client]),
        b_ub=np.repeat([float(most), float(-least)], clients),
        A_eq=of_expert,
        b_eq=np.full(experts, choices),
        bounds=(0, 1),
        method="highs-ds",
    )
    return np.asarray(found.x).reshape(fit.shape) > 0.5
