"""Training of clients that share a workbench in the same passes; one client alone is a company of one.

The frozen products then run over the rows of all, which is faster than one after another, and only the small low-rank
products are apart. Nobody's numbers meet anybody else's: every client has its own batches, parameters, losses,
gradient norm and optimiser state.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from molehill.config import Config, Personal
from molehill.molora.model import MoLoRAModel
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Scope
from molehill.tasks.lengths import Examples
from molehill.wire.keys import Key
from molehill_client.participant import Participant
from molehill_client.trainer import Result, Settings, UntrainableError, train

Reply = TypeVar("Reply", ClientReply, EvaluationReply)

_log = logging.getLogger(__name__)


def train_together(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> list[ClientReply]:
    """Train one round of clients that share a workbench, in the same passes; see `may_share`.

    Args:
        clients: The clients.
        plans: The plan of each.

    Returns:
        Their replies; of each client's own numbers only rounding depends on the company. A client alone answers that
        the model it was sent cannot be trained, where that is so.

    Raises:
        MessageError: A plan or its blobs do not fit its client.
        TrainingError: A loss is not finite.
    """
    started = time.monotonic()
    try:
        return _train_together(clients, plans, started)
    except UntrainableError as error:
        if len(clients) > 1:  # one by one it shows whom it concerns
            raise
        return [
            clients[0].unusable(
                plans[0], f"{error.what}: it learnt nothing from what it was sent", time.monotonic() - started
            )
        ]


def _train_together(clients: Sequence[Participant], plans: Sequence[ClientPlan], started: float) -> list[ClientReply]:
    bench, plan = clients[0].bench, plans[0]
    model, rounds = bench.model, bench.config.run.rounds
    span = ((plan.round - 1) / rounds, plan.round / rounds)
    where = f"client {', '.join(client.name for client in clients)}, round {plan.round}"
    with stacked(model, len(clients)):
        sessions = []
        for number, (client, own) in enumerate(zip(clients, plans, strict=True)):
            model.select(number)
            sessions.append(client.begin(own))
        model.use_personal(gate=False, head=False)
        results = fit(
            clients,
            [client.round_rows for client in clients],
            [own.seed for own in plans],
            _in_rounds(plan),
            plan.steps,
            span,
            where,
        )
        seconds = (time.monotonic() - started) / len(clients)
        replies = []
        for number, client in enumerate(clients):
            model.select(number)
            replies.append(client.finish(sessions[number], results[number], seconds))
    return replies


def share(
    work: Callable[[Sequence[Participant], Sequence[ClientPlan]], list[Reply]],
    clients: Sequence[Participant],
    plans: Sequence[ClientPlan],
) -> list[Reply | Exception]:
    """Work for clients in as few passes as possible: together where they may, else one after another.

    Args:
        work: `train_together`, `baseline_together` or `evaluate_together`.
        clients: The clients.
        plans: The plan of each.

    Returns:
        For every client, in order, its reply or what stopped it.
    """
    companies: dict[tuple[tuple[int, int], int | None], list[int]] = {}
    for number, (client, plan) in enumerate(zip(clients, plans, strict=True)):
        companies.setdefault((client.batch_sizes, plan.k), []).append(number)
    outcomes: dict[int, Reply | Exception] = {}
    for company in companies.values():
        some, own = [clients[i] for i in company], [plans[i] for i in company]
        if len(company) > 1 and may_share(some, own):
            try:
                outcomes.update(zip(company, work(some, own), strict=True))
                continue
            except Exception:  # noqa: BLE001 - whatever it was (memory ran out, say) must not stop the others
                _log.debug("clients fail together, now one by one", exc_info=True)  # so it meets who caused it
        for i in company:
            try:
                outcomes[i] = work([clients[i]], [plans[i]])[0]
            except Exception as error:  # noqa: BLE001 - a client alone would answer with it, whatever it is
                outcomes[i] = error
    return [outcomes[i] for i in range(len(clients))]


def may_share(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> bool:
    """Whether clients can train in the same passes: one workbench, what can be stacked, and equal work."""
    bench, plan = clients[0].bench, plans[0]
    same = (plan.round, plan.scopes, plan.steps, plan.k)
    return (
        bench.model.stackable
        and not bench.objective().alone
        and all(client.bench is bench and client.batch_sizes == clients[0].batch_sizes for client in clients)
        and all((own.round, own.scopes, own.steps, own.k) == same for own in plans)
        and not any(group.startswith("patch") for own in plans for group in own.blobs)
    )


@contextmanager
def stacked(model: MoLoRAModel, clients: int) -> Iterator[None]:
    """Hold the tensors of so many clients in the model."""
    model.stack(clients)
    try:
        yield
    finally:
        model.stack(1)


def fit(
    clients: Sequence[Participant],
    rows: Sequence[Examples],
    seeds: Sequence[int],
    scope: Callable[[Key], Scope],
    steps: int,
    span: tuple[float, float],
    where: str,
    *,
    settings: Settings | None = None,
    routed: bool = True,
    personal: bool = False,
) -> list[Result]:
    """Train the clients that are in the model; what is random follows from their seeds.

    Args:
        clients: The clients, in the model's order.
        rows: What each of them trains on.
        seeds: One for each.
        scope: What happens to every tensor.
        steps: Optimiser steps.
        span: Part of the whole run that these steps cover, from 0 to 1.
        where: Clients and round, for error messages.
        settings: How; as in the rounds when omitted.
        routed: Whether the routing losses count, and not the objective alone.
        personal: Whether what learns is what they fit for themselves after the rounds.

    Raises:
        TrainingError: A loss is not finite.
    """

    def observe(step: int, steps: int) -> None:
        for client in clients:
            if client.observe is not None:
                client.observe(step, steps)

    bench = clients[0].bench
    with torch.random.fork_rng():
        torch.manual_seed(seeds[0])
        return train(
            bench.model,
            [client.batches(some, seed) for client, some, seed in zip(clients, rows, seeds, strict=True)],
            [bench.goal(some, personal=personal) for some in rows],
            bench.losses() if routed else (),
            settings or bench.settings(),
            scope,
            steps=steps,
            progress=span,
            observe=observe,
            where=where,
        )


def _in_rounds(plan: ClientPlan) -> Callable[[Key], Scope]:
    """What learns in the rounds: all but residuals, so that what is sent does not depend on them."""
    return lambda key: "frozen" if key.residual else plan.scope(key)


def learns_alone(config: Config) -> Callable[[Key], Scope]:
    """What learns where an owner trains a whole adapter by itself: all but residuals and what the start values fix."""
    fixed = config.molora.init.build("init").frozen
    return lambda key: "frozen" if key.residual or key.kind in fixed else "shared"


def residuals(plan: ClientPlan, personal: Personal) -> Callable[[Key], Scope]:
    """What learns in steps when a client fits its residuals; a head's may be computed instead."""
    computed = "head" if personal.head_residual == "computed" else None
    return lambda key: plan.scope(key) if key.residual and key.kind != computed else "frozen"


def personal_steps(client: Participant, plan: ClientPlan) -> int:
    """Steps in which residuals are fitted; none when the client has none that learn in steps."""
    config, layout = client.bench.config, client.bench.model.layout
    learns = residuals(plan, config.personal)
    return config.personal.steps if any(learns(key) == "personal" for key in layout) else 0


def computes_head(client: Participant, plan: ClientPlan) -> bool:
    """Whether the client has a residual of its head that is computed; see `molehill_client.convex`."""
    config, layout = client.bench.config, client.bench.model.layout
    kept = any(key.residual and key.kind == "head" and plan.scope(key) == "personal" for key in layout)
    return kept and config.personal.head_residual == "computed"
