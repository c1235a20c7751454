"""What the federated model is worth to an owner: scores of the global and of the personalised model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from molehill import evidence
from molehill.molora import probes
from molehill.molora.interfaces import Diagnostic
from molehill.plan import Answers, ClientPlan, EvaluationReply, Figure, Scores
from molehill.tasks.kind import kind_of
from molehill.tasks.outcomes import gains
from molehill.tasks.task import Tally
from molehill_client.answering import answer
from molehill_client.choosing import choose, fit_as_told
from molehill_client.making import Company
from molehill_client.participant import Participant
from molehill_client.scores import by_row, score
from molehill_client.state import Findings, RowScores, Sample
from molehill_client.together import computes_head, personal_steps, stacked


def evaluate_together(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """Make what clients that share a workbench make of the model, in the same passes, and score all; see `may_share`.

    That is what they choose among ``personal.candidates``; without these the residuals are fitted.

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
    states, received = [], []
    with stacked(model, len(clients)):
        for number, (client, own) in enumerate(zip(clients, plans, strict=True)):
            model.select(number)
            state = client.begin(own, after=True).state
            state.tree = model.tree(client.kept(own))
            states.append(state)
            received.append(model.flat.detach().clone())
    company = Company(clients, plans, [client.train_rows for client in clients], torch.stack(received), where)
    choosing = bool(clients[0].bench.config.personal.candidates)
    choices = choose(company) if choosing else fit_as_told(company)
    keeps = choosing or personal_steps(clients[0], plan) or computes_head(clients[0], plan)
    replies = []
    for client, own, choice, state, stage, said in zip(clients, plans, choices, states, stages, answers, strict=True):
        model.flat.copy_(choice.values)
        if keeps:
            client.keep(own, state, choice.name, replaced=choice.replaces)
        looked = probes.build(client.bench.config.evaluate.probes if evidence.probed(client.bench.config) else ())
        stage["personalised"], tokens = _personally(client, looked)
        found = {name: total.found for name, total in stage.items() if total.found}
        client.store.save_findings(Findings(_answer(client, own, "personalised", said), _confusions(stage), found))
        gained = _gains(client, stage)
        seconds = (time.monotonic() - started) / len(clients)
        told = probes.told(looked)
        reply = client.evaluation(
            _scores(stage),
            tokens,
            seconds,
            state.round,
            told,
            answers=said,
            gains=gained,
            chosen=choice.name if evidence.chosen(client.bench.config) else "",
        )
        replies.append(reply)
    return replies


def _gains(client: Participant, stages: Mapping[str, Tally]) -> dict[str, Figure]:
    """How much better the personalised model is than the baseline, row by row; all that was scored is kept."""
    config, units = client.bench.config, client.test_rows.units
    known = client.store.load_row_scores().stages if config.evaluate.baselines else {}
    kept = {**known, **{name: by_row(client.bench, client.test_rows, total) for name, total in stages.items()}}
    client.store.save_row_scores(RowScores(units, kept))
    alone, ours = kept.get("local"), kept["personalised"]
    if alone is None or alone.n != ours.n:  # nothing was trained alone, or on other rows
        return {}
    return gains(alone, ours, kind_of(config.task).measures, units)


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
