"""What the federated model is worth to an owner: scores of the global and of the personalised model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from molehill import evidence
from molehill.molora import probes
from molehill.molora.interfaces import Diagnostic
from molehill.molora.model import seed_for
from molehill.molora.passes import start_of
from molehill.plan import Answers, ClientPlan, EvaluationReply, Figure, Scores
from molehill.tasks.batches import Batch, eval_batches, eval_order
from molehill.tasks.kind import kind_of
from molehill.tasks.outcomes import Outcomes, gains
from molehill.tasks.task import Example, Tally
from molehill_client.answering import answer
from molehill_client.convex import Line, best_head
from molehill_client.participant import Participant
from molehill_client.state import Findings, RowScores, Sample
from molehill_client.together import computes_head, fit, personal_steps, residuals, stacked
from molehill_client.workbench import Workbench


def evaluate_together(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """Fit the residuals of clients that share a workbench in the same passes, and score every client; see `may_share`.

    Raises:
        MessageError: A plan or its blobs do not fit its client.
        TrainingError: A loss is not finite.
    """
    started = time.monotonic()
    plan, model = plans[0], clients[0].bench.model
    answers: list[dict[str, Answers]] = [{} for _ in clients]
    stages = []
    for client, own, said in zip(clients, plans, answers, strict=True):
        stages.append({"global": _globally(client, own)})
        _answer(client, own, "global", said)
    where = f"client {', '.join(client.name for client in clients)}, after round {plan.round}"
    states = []
    with stacked(model, len(clients)):
        for number, (client, own) in enumerate(zip(clients, plans, strict=True)):
            model.select(number)
            states.append(client.begin(own, after=True).state)
        steps = personal_steps(clients[0], plan)
        if steps:
            seeds = [seed_for(own.seed, "personal") for own in plans]
            learns = residuals(plan, clients[0].bench.config.personal)
            fit(
                clients,
                [client.train_rows for client in clients],
                seeds,
                learns,
                steps,
                (0.0, 1.0),
                where,
                personal=True,
            )
        trained = model.values.clone()
    replies = []
    for client, own, values, state, stage, said in zip(clients, plans, trained, states, stages, answers, strict=True):
        model.flat.copy_(values)
        computed = computes_head(client, own)
        if computed:
            _compute_head(client, own)
        if steps or computed:
            client.keep(own, state)
        looked = probes.build(client.bench.config.evaluate.probes if evidence.probed(client.bench.config) else ())
        stage["personalised"], tokens = _personally(client, looked)
        found = {name: total.found for name, total in stage.items() if total.found}
        client.store.save_findings(Findings(_answer(client, own, "personalised", said), _confusions(stage), found))
        gained = _gains(client, stage)
        seconds = (time.monotonic() - started) / len(clients)
        told = probes.told(looked)
        reply = client.evaluation(_scores(stage), tokens, seconds, state.round, told, answers=said, gains=gained)
        replies.append(reply)
    return replies


def _compute_head(client: Participant, plan: ClientPlan) -> None:
    """Set the head's residual to what the best head for the client's rows has more than the shared one.

    The model has seen these rows in the rounds, so even those left out of a fit look better after it than others
    would: a stronger penalty that is not clearly worse is therefore preferred.
    """
    head = client.bench.model.head
    assert head is not None
    shared = Line(head.weight.detach().clone(), head.bias.detach().clone())
    where = f"client {client.name}, after round {plan.round}"
    found = best_head(
        client.bench, client.train_rows, shared, careful=True, seed=seed_for(plan.seed, "personal"), where=where
    )
    with torch.no_grad():
        head.residual["weight"].copy_(found.weight - shared.weight)
        head.residual["bias"].copy_(found.bias - shared.bias)


def _gains(client: Participant, stages: Mapping[str, Tally]) -> dict[str, Figure]:
    """How much better the personalised model is than the baseline, row by row; all that was scored is kept."""
    config, units = client.bench.config, client.test_rows.units
    known = client.store.load_row_scores().stages if config.evaluate.baselines else {}
    kept = {**known, **{name: by_row(client, total) for name, total in stages.items()}}
    client.store.save_row_scores(RowScores(units, kept))
    alone, ours = kept.get("local"), kept["personalised"]
    if alone is None or alone.n != ours.n:  # nothing was trained alone, or on other rows
        return {}
    return gains(alone, ours, kind_of(config.task).measures, units)


def by_row(client: Participant, total: Tally) -> Outcomes:
    """What each of a client's held-out rows was scored, in their order.

    Args:
        client: The client.
        total: Of the batches of `batches_of`.
    """
    lengths = [len(row.input_ids) for row in client.test_rows]
    batches = eval_order(lengths, client.bench.config.evaluate.batch_size, start_of(client.bench.model))
    return total.outcomes().placed([row for batch in batches for row in batch])


def _scores(stages: Mapping[str, Tally]) -> dict[str, Scores]:
    return {stage: total.scores() for stage, total in stages.items()}


def _confusions(stages: Mapping[str, Tally]) -> dict[str, list[list[int]]]:
    found = {stage: total.confusion for stage, total in stages.items()}
    return {stage: counts for stage, counts in found.items() if counts is not None}


def _answer(client: Participant, plan: ClientPlan, stage: str, answers: dict[str, Answers]) -> list[Sample]:
    """Add what a model's answers come to, where the run asks for any, and return them."""
    if not client.bench.config.evaluate.generate:
        return []
    sums, samples = answer(client.bench, client.test_rows, plan.seed)
    if sums is not None:
        answers[stage] = sums
    return samples


@torch.no_grad()
def score(bench: Workbench, rows: Sequence[Example], looked: Mapping[str, Diagnostic] | None = None) -> Tally:
    """Score the model as it is on some rows, which diagnostics may look at."""
    looked = looked or {}
    model = bench.model
    model.eval()
    total = bench.tally()
    with probes.looking(model, looked):
        for batch in batches_of(bench, rows):
            forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.task_ids)
            total.add(forward)
            for probe in looked.values():
                probe.update(forward.records)
    total.scores()  # or an error
    return total


def batches_of(bench: Workbench, rows: Sequence[Example]) -> Iterator[Batch]:
    """All rows once, on the model's device."""
    model, most = bench.model, bench.config.evaluate.batch_size
    return (batch.to(model.flat.device) for batch in eval_batches(rows, most, bench.task, start_of(model)))


def _globally(client: Participant, plan: ClientPlan) -> Tally:
    """Score what every client gets: no personal tensors.

    A head that nobody shares is the exception, since without one there is nothing to score; of a gate that nobody
    shares, all experts weigh alike, or what the parts that stay choose from.
    """
    client.check(plan)
    bench = client.bench
    model = bench.model
    state = client.store.before(plan.round + 1)
    client.receive(plan, state)
    keeps = {key.kind for key in bench.initial if plan.scope(key) == "personal"}
    model.load({key: value for key, value in state.tree.items() if key.kind == "head" and "head" in keeps})
    model.use_personal(gate=False, head=False)
    kept = [key for key in bench.initial if key.kind == "gate" and plan.scope(key) == "personal"]
    model.use_uniform_gate(not all(key.own for key in kept))
    model.load({key: np.zeros_like(bench.initial[key]) for key in kept if key.own})
    return score(bench, client.test_rows)


def _personally(client: Participant, looked: Mapping[str, Diagnostic]) -> tuple[Tally, dict[str, float]]:
    """Score the model with the personal tensors that are in it; also returns the tokens that every expert got."""
    model = client.bench.model
    model.use_uniform_gate(uniform=False)
    model.use_personal(gate=True, head=True)
    model.count_tokens(on=True)
    found = score(client.bench, client.test_rows, looked)
    model.count_tokens(on=False)
    tokens: dict[str, float] = {}
    for (_, expert), mass in model.tokens().items():
        tokens[expert] = tokens.get(expert, 0.0) + mass
    return found, tokens
