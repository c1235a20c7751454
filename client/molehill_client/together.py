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
from typing import TYPE_CHECKING, TypeVar

import torch

from molehill import registry
from molehill.molora.model import MoLoRAModel, seed_for
from molehill.plan import ClientPlan, ClientReply, EvaluationReply, Scope
from molehill.wire.keys import Key
from molehill_client.trainer import Result, UntrainableError, train

if TYPE_CHECKING:
    from molehill_client.client import Client

Reply = TypeVar("Reply", ClientReply, EvaluationReply)

_log = logging.getLogger(__name__)


def train_together(clients: Sequence[Client], plans: Sequence[ClientPlan]) -> list[ClientReply]:
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


def _train_together(clients: Sequence[Client], plans: Sequence[ClientPlan], started: float) -> list[ClientReply]:
    bench, plan = clients[0].bench, plans[0]
    model, rounds = bench.model, bench.config.run.rounds
    span = ((plan.round - 1) / rounds, plan.round / rounds)
    where = f"client {', '.join(client.name for client in clients)}, round {plan.round}"
    with _stacked(model, len(clients)):
        sessions = []
        for number, (client, own) in enumerate(zip(clients, plans, strict=True)):
            model.select(number)
            sessions.append(client.begin(own))
        model.use_personal(gate=False, head=False)
        results = _fit(clients, [own.seed for own in plans], _in_rounds(plan), plan.steps, span, where)
        seconds = (time.monotonic() - started) / len(clients)
        replies = []
        for number, client in enumerate(clients):
            model.select(number)
            replies.append(client.finish(sessions[number], results[number], seconds))
    return replies


def evaluate_together(clients: Sequence[Client], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """`Client.evaluate` of clients that share a workbench; they fit residuals in the same passes, see `may_share`.

    Raises:
        MessageError: A plan or its blobs do not fit its client.
        TrainingError: A loss is not finite.
    """
    started = time.monotonic()
    plan, model = plans[0], clients[0].bench.model
    stages = [client.globally(own) for client, own in zip(clients, plans, strict=True)]
    where = f"client {', '.join(client.name for client in clients)}, after round {plan.round}"
    states = []
    with _stacked(model, len(clients)):
        for number, (client, own) in enumerate(zip(clients, plans, strict=True)):
            model.select(number)
            states.append(client.begin(own, after=True).state)
        steps = _personal_steps(clients[0], plan)
        if steps:
            seeds = [seed_for(own.seed, "personal") for own in plans]
            _fit(clients, seeds, _residuals(plan), steps, (0.0, 1.0), where, residuals=True)
        trained = model.values.clone()
    replies = []
    for client, own, values, state, stage in zip(clients, plans, trained, states, stages, strict=True):
        model.flat.copy_(values)
        if steps:
            client.keep(own, state)
        tokens = client.personally(stage)
        seconds = (time.monotonic() - started) / len(clients)
        replies.append(client.evaluation(stage, tokens, seconds, state.round))
    return replies


def baseline_together(clients: Sequence[Client], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """`Client.baseline` of clients that share a workbench, in the same passes; see `may_share`.

    Everything learns that the adapter itself allows to: only a factor that the start values freeze stays.

    Raises:
        MessageError: A plan does not fit its client.
        TrainingError: A loss is not finite.
    """
    started = time.monotonic()
    config, model = clients[0].bench.config, clients[0].bench.model
    stages = [client.base(plan) for client, plan in zip(clients, plans, strict=True)]
    clients[0].start_over()
    steps = config.run.rounds * config.train.steps + _personal_steps(clients[0], plans[0])
    where = f"client {', '.join(client.name for client in clients)}, local baseline"
    fixed = registry.build("init", config.molora.init.name, config.molora.init.params).frozen

    def scope(key: Key) -> Scope:
        return "frozen" if key.residual or key.kind in fixed else "shared"

    with _stacked(model, len(clients)):
        _fit(clients, [plan.seed for plan in plans], scope, steps, (0.0, 1.0), where)
        trained = model.values.clone()
    replies = []
    for client, values, stage in zip(clients, trained, stages, strict=True):
        model.flat.copy_(values)
        stage["local"] = client.score()
        replies.append(client.evaluation(stage, {}, (time.monotonic() - started) / len(clients)))
    return replies


def share(
    work: Callable[[Sequence[Client], Sequence[ClientPlan]], list[Reply]],
    clients: Sequence[Client],
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
    companies: dict[int, list[int]] = {}
    for number, client in enumerate(clients):
        companies.setdefault(client.batch_size, []).append(number)
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


def may_share(clients: Sequence[Client], plans: Sequence[ClientPlan]) -> bool:
    """Whether clients can train in the same passes: one workbench, one model that can be stacked, equal work."""
    bench, plan = clients[0].bench, plans[0]
    same = (plan.round, plan.scopes, plan.steps)
    return (
        bench.model.stackable
        and all(client.bench is bench and client.batch_size == clients[0].batch_size for client in clients)
        and all((own.round, own.scopes, own.steps) == same for own in plans)
        and not any(group.startswith("patch") for own in plans for group in own.blobs)
    )


@contextmanager
def _stacked(model: MoLoRAModel, clients: int) -> Iterator[None]:
    model.stack(clients)
    try:
        yield
    finally:
        model.stack(1)


def _fit(
    clients: Sequence[Client],
    seeds: Sequence[int],
    scope: Callable[[Key], Scope],
    steps: int,
    span: tuple[float, float],
    where: str,
    *,
    residuals: bool = False,
) -> list[Result]:
    """Train the clients that are in the model; what is random follows from their seeds.

    Residuals are fitted to the objective alone, without the routing losses.
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
            [client.batches(seed) for client, seed in zip(clients, seeds, strict=True)],
            bench.objective(),
            () if residuals else bench.losses(),
            bench.residual_settings() if residuals else bench.settings(),
            scope,
            steps=steps,
            progress=span,
            observe=observe,
            where=where,
        )


def _in_rounds(plan: ClientPlan) -> Callable[[Key], Scope]:
    """What learns in the rounds: all but residuals, so that what is sent does not depend on them."""
    return lambda key: "frozen" if key.residual else plan.scope(key)


def _residuals(plan: ClientPlan) -> Callable[[Key], Scope]:
    """What learns when a client fits its residuals."""
    return lambda key: plan.scope(key) if key.residual else "frozen"


def _personal_steps(client: Client, plan: ClientPlan) -> int:
    """Steps in which residuals are fitted; none when the client has none."""
    config, layout = client.bench.config, client.bench.model.layout
    return config.personal.steps if any(_residuals(plan)(key) == "personal" for key in layout) else 0
