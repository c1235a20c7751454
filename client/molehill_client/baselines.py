"""What an owner could do without the others: the frozen base with a head, and the same adapter trained alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from molehill.molora.model import seed_for
from molehill.plan import ClientPlan, EvaluationReply
from molehill.tasks.task import Tally
from molehill_client.convex import Line, best_head
from molehill_client.participant import Participant
from molehill_client.remembered import Baseline, keep, key_of, recall
from molehill_client.scores import by_row, score
from molehill_client.state import RowScores
from molehill_client.together import computes_head, fit, learns_alone, personal_steps, residuals, stacked


def baseline_together(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """Train and score the baselines of clients that share a workbench, in the same passes; see `may_share`.

    Everything learns that the adapter itself allows to: only a factor that the start values freeze stays. Where the
    objective is another for what owners fit after the rounds, residuals are fitted by it after as many steps as the
    rounds have. Where the workbench has a folder for it, what was trained on this machine before is taken from there.

    Raises:
        MessageError: A plan does not fit its client.
        TrainingError: A loss is not finite.
    """
    started = time.monotonic()
    config, folder = clients[0].bench.config, clients[0].bench.remembered
    steps = config.run.rounds * config.train.steps + personal_steps(clients[0], plans[0])
    for client, plan in zip(clients, plans, strict=True):
        client.check(plan)
    keys = [key_of(client, plan, steps) for client, plan in zip(clients, plans, strict=True)] if folder else []
    found: dict[int, dict[str, Baseline]] = {}
    if folder is not None and config.evaluate.baselines != "anew":
        found = {n: stages for n, key in enumerate(keys) if (stages := recall(folder, key)) is not None}
    remembered = frozenset(found)
    left = [n for n in range(len(clients)) if n not in remembered]
    trained = _trained([clients[n] for n in left], [plans[n] for n in left], steps) if left else []
    for n, stages in zip(left, trained, strict=True):
        found[n] = stages
        if folder is not None:
            keep(folder, keys[n], stages)
    seconds = (time.monotonic() - started) / len(clients)
    replies = []
    for n, client in enumerate(clients):
        rows = {stage: each.rows for stage, each in found[n].items()}
        client.store.save_row_scores(RowScores(client.test_rows.units, rows))
        scores = {stage: each.scores for stage, each in found[n].items()}
        replies.append(client.evaluation(scores, {}, seconds, remembered=n in remembered))
    return replies


def _trained(clients: Sequence[Participant], plans: Sequence[ClientPlan], steps: int) -> list[dict[str, Baseline]]:
    """The baselines of every client by stage."""
    config, model = clients[0].bench.config, clients[0].bench.model
    stages = [{"base": _told(client, base_of(client, plan))} for client, plan in zip(clients, plans, strict=True)]
    clients[0].start_over(plans[0].k)
    where = f"client {', '.join(client.name for client in clients)}, local baseline"
    rows, objective = [client.train_rows for client in clients], clients[0].bench.objective()
    # Or the personalised model would be ahead by its objective alone.
    after = 0 if objective.personal() is objective else personal_steps(clients[0], plans[0])
    with stacked(model, len(clients)):
        fit(clients, rows, [plan.seed for plan in plans], learns_alone(config), steps - after, (0.0, 1.0), where)
        if after:
            seeds = [seed_for(plan.seed, "personal") for plan in plans]
            fit(
                clients, rows, seeds, residuals(plans[0], config.personal), after, (0.0, 1.0), where,
                settings=clients[0].bench.residual_settings(), routed=False, personal=True,
            )  # fmt: skip
        trained = model.values.clone()
    for client, plan, values, stage in zip(clients, plans, trained, stages, strict=True):
        model.flat.copy_(values)
        if computes_head(client, plan):  # or the personalised model would be ahead by that alone
            _find_head(client, plan, "alone", careful=True)
        stage["local"] = _told(client, score(client.bench, client.test_rows))
    return stages


def _told(client: Participant, total: Tally) -> Baseline:
    return Baseline(total.scores(), by_row(client.bench, client.test_rows, total))


def base_of(client: Participant, plan: ClientPlan) -> Tally:
    """Score the frozen base, with the best head for the training rows where it needs one.

    Args:
        client: Its model is left with these values.
        plan: Its seed decides the folds.
    """
    client.start_over(plan.k)
    model, head = client.bench.model, client.bench.model.head
    model.state.enabled = False
    try:
        if head is not None:
            with torch.no_grad():
                head.weight.zero_()
                head.bias.zero_()
            _find_head(client, plan, "base", careful=False)
        return score(client.bench, client.test_rows)
    finally:
        model.state.enabled = True


def _find_head(client: Participant, plan: ClientPlan, what: str, *, careful: bool) -> None:
    """Put the best head for a client's training rows, sought from the one that is there, in its place."""
    head = client.bench.model.head
    assert head is not None
    start = Line(head.weight.detach().clone(), head.bias.detach().clone())
    seed, where = seed_for(plan.seed, what), f"client {client.name}, {what}"
    found = best_head(client.bench, client.train_rows, start, careful=careful, seed=seed, where=where)
    with torch.no_grad():
        head.weight.copy_(found.weight)
        head.bias.copy_(found.bias)
