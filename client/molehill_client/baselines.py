"""What an owner could do without the others: the frozen base with a head, and the same adapter trained alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molehill.molora.forward import Forward
from molehill.plan import ClientPlan, EvaluationReply, Scope
from molehill.tasks.batches import IGNORE
from molehill.tasks.task import Example, Tally
from molehill.wire.keys import Key
from molehill_client.participant import Participant
from molehill_client.remembered import Baseline, keep, key_of, recall
from molehill_client.scoring import batches_of, by_row, score
from molehill_client.state import RowScores
from molehill_client.together import fit, personal_steps, stacked
from molehill_client.workbench import Workbench


def baseline_together(clients: Sequence[Participant], plans: Sequence[ClientPlan]) -> list[EvaluationReply]:
    """Train and score the baselines of clients that share a workbench, in the same passes; see `may_share`.

    Everything learns that the adapter itself allows to: only a factor that the start values freeze stays. Where the
    workbench has a folder for it, what was trained on this machine before is taken from there.

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
    stages = [{"base": _told(client, _base(client))} for client in clients]
    clients[0].start_over()
    where = f"client {', '.join(client.name for client in clients)}, local baseline"
    fixed = config.molora.init.build("init").frozen

    def scope(key: Key) -> Scope:
        return "frozen" if key.residual or key.kind in fixed else "shared"

    with stacked(model, len(clients)):
        fit(clients, [plan.seed for plan in plans], scope, steps, (0.0, 1.0), where)
        trained = model.values.clone()
    for client, values, stage in zip(clients, trained, stages, strict=True):
        model.flat.copy_(values)
        stage["local"] = _told(client, score(client.bench, client.test_rows))
    return stages


def _told(client: Participant, total: Tally) -> Baseline:
    return Baseline(total.scores(), by_row(client, total))


def _base(client: Participant) -> Tally:
    """Score the frozen base with only a head."""
    client.start_over()
    model = client.bench.model
    model.state.enabled = False
    try:
        return _head_only(client) if model.head is not None else score(client.bench, client.test_rows)
    finally:
        model.state.enabled = True


def _head_only(client: Participant) -> Tally:
    """Train only the head on cached features of the frozen base; until the loss stops falling."""
    model, head = client.bench.model, client.bench.model.head
    assert head is not None
    model.eval()
    x, y, rows = _features(client.bench, client.train_rows)
    x_test, y_test, rows_test = _features(client.bench, client.test_rows)
    weight = torch.zeros_like(head.weight, requires_grad=True)
    bias = torch.zeros_like(head.bias, requires_grad=True)
    scale = x.std().clamp_min(1e-6)
    goal = client.goal()
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        scores = F.linear(x / scale, weight, bias)
        said = Forward(scores, y, rows, [], scores.detach, model.likelihood)
        loss = goal.of_scores(said) + 1e-3 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped torch
        return float(loss.detach())

    optimiser.step(closure)  # type: ignore[no-untyped-call]  # untyped torch
    with torch.no_grad():
        found, scores = client.bench.tally(), F.linear(x_test / scale, weight, bias)
        found.add(Forward(scores, y_test, rows_test, [], lambda: scores, model.likelihood))
    return found


@torch.no_grad()
def _features(bench: Workbench, rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[M, d]`` of rows or tokens, their labels, and which row each is of ``[M]``."""
    model = bench.model
    assert model.head is not None
    features, labels, places, before = [], [], [], 0
    for batch in batches_of(bench, rows):
        mask = batch.attention_mask.bool()
        found, wanted = model.head.pool(model.hidden(batch.input_ids, mask), mask), batch.labels
        place = torch.arange(before, before + len(batch), device=wanted.device)
        before += len(batch)
        if not model.head.pools:
            keep = wanted != IGNORE
            found, wanted, place = found[keep], wanted[keep], place.unsqueeze(1).expand_as(keep)[keep]
        features.append(found)
        labels.append(wanted)
        places.append(place)
    return torch.cat(features), torch.cat(labels), torch.cat(places)
