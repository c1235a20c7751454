"""What rules against poisoned updates share.

Every expert at every site is judged on its own: among the clients that routed tokens to it by the rules that know f,
the number of liars, which want so many users that f of them are outvoted; among all clients by the others, see
`ballots`. Router and head are judged together, among all. Clients count alike, whatever numbers of examples they claim.
Products are compared as products: ``(B G, G^-1 A)`` is the same update for every G, so distances between factors say
nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from molehill.wire.keys import NO_EXPERT, Key
from molehill.wire.tree import Tree
from molehill_server.aggregation.interfaces import Weight
from molehill_server.aggregation.lowrank import gram
from molehill_server.aggregation.shares import shares
from molehill_server.aggregation.sums import factors, require_fit
from molehill_server.records import Global, Pair, Update, pairs

Matrix: TypeAlias = NDArray[np.float64]
Choose: TypeAlias = Callable[[Matrix], Matrix]  # inner products [K, K] -> weights [K], at least one of them above 0


def equal_weights(updates: Sequence[Update]) -> list[Weight]:
    """Weight 1 for whoever takes part: clients that routed tokens to the expert."""
    return [Weight(1.0, {pair: float(share > 0) for pair, share in shares(update).items()}) for update in updates]


def ballots(updates: Sequence[Update], glob: Global) -> list[Update]:
    """The updates of a round as votes of all clients on every expert.

    Without it, liars that are few in the round could be the majority of an expert's users: they only have to claim that
    they used it. So a client that did not use an expert votes for its old value, whatever it sent. An expert that no
    more than half of the clients used is left out of all updates and so keeps its value bit for bit: most clients vote
    for that. Fewer than half of the round are then fewer than half at every expert, whatever they claim.

    Args:
        updates: All updates of a round.
        glob: The model they started from.

    Returns:
        The updates, in the same order; every expert that one of them holds counts as used.

    Raises:
        MessageError: An update holds a tensor the model does not have, or a larger one.
    """
    _require_fit(updates, glob)
    used = [{pair for pair, share in shares(update).items() if share > 0} for update in updates]
    counts = Counter(pair for mine in used for pair in mine)
    judged = {pair for pair, count in counts.items() if 2 * count > len(updates)}
    return [_ballot(update, glob, mine, judged) for update, mine in zip(updates, used, strict=True)]


def _ballot(update: Update, glob: Global, used: Collection[Pair], judged: Collection[Pair]) -> Update:
    values = {}
    for key in update.tree:
        if key.expert == NO_EXPERT:
            values[key] = update.tree[key]
        elif key[:2] in judged:
            values[key] = update.tree[key] if key[:2] in used else glob.tree[key]
    return Update(update.client, Tree.of(values), update.examples)  # without tokens, all experts it holds count as used


def chosen_weights(updates: Sequence[Update], glob: Global, least: int, choose: Choose) -> list[Weight]:
    """Have ``choose`` weigh the clients of every expert, and those of router and head.

    Args:
        updates: All updates of a round, in any order.
        glob: The model they started from.
        least: An expert with fewer clients gets no weight, and so keeps its value.
        choose: Weighs K points by their inner products. It meets clients in the order of their ids, so ties are
            broken alike whoever answers first.

    Returns:
        The weight of each update.

    Raises:
        MessageError: An update holds a tensor the model does not have, or a larger one.
    """
    _require_fit(updates, glob)
    order = sorted(range(len(updates)), key=lambda number: updates[number].client)
    experts: list[dict[Pair, float]] = [dict.fromkeys(shares(update), 0.0) for update in updates]
    voters: dict[Pair, list[int]] = {}
    for number in order:
        for pair, share in shares(updates[number]).items():
            if share > 0:
                voters.setdefault(pair, []).append(number)
    for pair, numbers in voters.items():
        if len(numbers) >= least:
            weights = choose(_of_expert([updates[number] for number in numbers], glob, pair))
            for number, weight in zip(numbers, weights, strict=True):
                experts[number][pair] = float(weight)
    rest = np.empty(len(updates))
    rest[order] = choose(_of_rest([updates[number] for number in order], glob))
    return [Weight(float(weight), mine) for weight, mine in zip(rest, experts, strict=True)]


def _require_fit(updates: Sequence[Update], glob: Global) -> None:
    for update in updates:
        for key, shape in update.tree.layout.items():
            require_fit(key, shape, glob.tree.layout, update.client)


def _of_expert(updates: Sequence[Update], glob: Global, pair: Pair) -> Matrix:
    """Inner products of what clients made of one expert."""
    keys = {key for update in updates for key in update.tree if key[:2] == pair}
    inner = _of_tensors(updates, glob, (key for key in keys if key.role not in ("A", "B")))
    if pairs(keys):
        inner += gram([factors(update.tree, glob.tree, pair) for update in updates])
    return inner


def _of_rest(updates: Sequence[Update], glob: Global) -> Matrix:
    """Inner products of what clients made of router and head."""
    return _of_tensors(updates, glob, {key for update in updates for key in update.tree if key.expert == NO_EXPERT})


def _of_tensors(updates: Sequence[Update], glob: Global, keys: Iterable[Key]) -> Matrix:
    """Inner products of changes; a tensor that a client did not send did not change."""
    inner = np.zeros((len(updates), len(updates)))
    for key in sorted(keys):
        old = glob.tree[key].ravel()
        changes = [update.tree[key].ravel() - old if key in update.tree else np.zeros_like(old) for update in updates]
        stack = np.stack(changes).astype(np.float64)
        inner += stack @ stack.T
    return inner
