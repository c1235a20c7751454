"""The local step loop on the model's flat vector, for one client or for several in the same passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from molehill.errors import TrainingError
from molehill.molora.interfaces import RoutingLoss
from molehill.molora.model import MoLoRAModel
from molehill.molora.passes import start_of
from molehill.plan import Scope
from molehill.tasks.batches import IGNORE, Batch, alike, join
from molehill.wire.keys import Key
from molehill.wire.tree import Array
from molehill_client.goals import Goal
from molehill_client.interfaces import Regulariser

_ABSURD = 64.0  # nats; to guess among all tokens of a large vocabulary costs 12


class UntrainableError(TrainingError):
    """The values that training starts from give no finite loss or gradient, or one that no model in use has.

    So no step of its own can be at fault.
    """


class Observer(Protocol):
    """Called after every step, for progress bars."""

    def __call__(self, step: int, steps: int) -> None:
        """``step`` of ``steps`` is done."""


class Rates(NamedTuple):
    """Peak learning rates.

    Attributes:
        experts: Of A, B and vectors.
        router: Of gates.
        head: Of the head.
    """

    experts: float
    router: float
    head: float


@dataclass(frozen=True)
class Settings:
    """How to train, without configuration objects.

    Attributes:
        rates: Peak learning rates.
        schedule: Shape over the whole run.
        decay: Decoupled weight decay.
        clip: Largest gradient norm, or None.
        rules: Each adds its gradient, given gradients, values and received values of what learns.
        accumulation: Micro-batches per step.
        keys: Where the rates are in the configuration, for error messages.
    """

    rates: Rates
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay: float = 0.0
    clip: float | None = 1.0
    rules: Sequence[Regulariser] = ()
    accumulation: int = 1
    keys: str = "train.lr"


@dataclass(frozen=True)
class Result:
    """What a training run reports.

    Attributes:
        loss: Mean objective over the steps, routing losses excluded.
        routing: Mean of every routing loss, unweighted, by name.
        tokens: Gate mass by (site, expert).
        embeddings: Mean embeddings of the tokens and of all routed experts by router, ``[1 + E, r]``; see `Embeds`.
    """

    loss: float
    routing: dict[str, float]
    tokens: dict[tuple[str, str], float]
    embeddings: Mapping[str, Array] = field(default_factory=dict)


class _Range(NamedTuple):
    start: int
    stop: int
    rate: float


def schedule_factor(kind: str, progress: float) -> float:
    """Learning rate factor at ``progress`` (0 to 1) of the run; linear and cosine fall to a tenth."""
    if kind == "linear":
        return 1.0 - 0.9 * progress
    if kind == "cosine":
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    return 1.0


def train(
    model: MoLoRAModel,
    streams: Sequence[Iterator[Batch]],
    goals: Sequence[Goal],
    losses: Sequence[tuple[str, float, RoutingLoss]],
    settings: Settings,
    scope: Callable[[Key], Scope],
    *,
    steps: int,
    progress: tuple[float, float] = (0.0, 1.0),
    observe: Observer | None = None,
    where: str = "",
) -> list[Result]:
    """Train in place.

    Args:
        model: The model, holding as many clients as there are streams; tensors whose scope is ``frozen`` keep their
            values bit for bit.
        streams: Endless batches of every client, on the model's device; all batches have the same number of rows.
        goals: What each of them minimises.
        losses: Routing losses: name, coefficient, function.
        settings: Rates and bounds.
        scope: What happens to every tensor.
        steps: Optimiser steps.
        progress: Part of the whole run that these steps cover.
        observe: Called after every step.
        where: Client and round, for error messages.

    Returns:
        Mean losses and the gate mass of every expert over all steps, for every client. A step without a prediction
        counts for no mean and gives no gradient.

    Raises:
        TrainingError: A loss or a gradient is not finite, nothing is trained, or a client has nothing to predict.
        UntrainableError: That is so before the first step was taken, or the first loss was absurd already.
    """
    ranges = _trained(model, settings, scope)
    if not ranges:
        raise TrainingError("the plan trains no tensor", where=where, mend="Check federation.policy and personal.")
    received = model.values.clone() if settings.rules else model.values
    optimiser = _optimiser(model, ranges, settings.decay)
    total, learnt = torch.zeros(1 + len(losses), len(streams)), torch.zeros(len(streams))
    sound = False  # whether the first step was taken from a loss that a model in use may have
    with _training(model, records=bool(losses)):
        for step in range(steps):
            at = progress[0] + (progress[1] - progress[0]) * step / steps
            model.state.progress = at
            factor = schedule_factor(settings.schedule, at)
            for group, part in zip(optimiser.param_groups, ranges, strict=True):
                group["lr"] = part.rate * factor
            model.grads.zero_()
            found, weight = _accumulate(model, streams, goals, losses, settings.accumulation)
            _require_finite(found[0].tolist(), settings, where, step, sound=sound)
            for rule, part in product(settings.rules, ranges):
                span = (slice(None), slice(part.start, part.stop))
                rule(model.grads[span], model.values[span], received[span])
            for grad in model.grads:
                _clip(grad, ranges, settings, where, step, sound=sound)
            optimiser.step()
            model.adapt()
            sound = sound or (step == 0 and float(found[0].max()) < _ABSURD)
            total += found
            learnt += weight > 0
            if observe is not None:
                observe(step + 1, steps)
    if not learnt.all():
        mend = "Raise task.max_length, or see that every row has an answer."
        raise TrainingError(f"no batch of {steps} steps holds anything to predict", where=where, mend=mend)
    results = []
    for client, (loss, *extra) in enumerate((total / learnt).t().tolist()):
        model.select(client)
        routing = {loss[0]: value for loss, value in zip(losses, extra, strict=True)}
        results.append(Result(loss, routing, model.tokens(), model.embeddings()))
    return results


@contextmanager
def _training(model: MoLoRAModel, *, records: bool) -> Iterator[None]:
    """The model's switches during training; dropout of the frozen base stays off."""
    model.train()
    model.base.eval()
    for site in model.sites.values():
        site.dropout.train()
    model.state.collect = records
    model.count_tokens(on=True)
    try:
        yield
    finally:
        model.eval()
        model.state.collect = False
        model.state.count = False


def _accumulate(
    model: MoLoRAModel,
    streams: Sequence[Iterator[Batch]],
    goals: Sequence[Goal],
    losses: Sequence[tuple[str, float, RoutingLoss]],
    accumulation: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of one optimiser step; micro-batches count by what their predictions weigh, without any they count 0.

    Returns:
        By client, the objective and then every routing loss, ``[1 + losses, C]``; and what the predictions weigh,
        ``[C]``.
    """
    micro = [[next(stream) for stream in streams] for _ in range(accumulation)]
    sizes = torch.tensor(
        [[_weight(batch, goal) for batch, goal in zip(batches, goals, strict=True)] for batches in micro],
        dtype=torch.float32,
    )
    found = torch.zeros(1 + len(losses), len(streams))
    weight = sizes.sum(0)
    start = start_of(model)
    for batches, shares in zip(micro, sizes / weight.where(weight > 0, 1.0), strict=True):
        tokens = [batch.input_ids.numel() for batch in batches]
        for some in map(sorted, alike(tokens, start, len(batches))):
            with model.only(some):
                found[:, some] += _pass(
                    model, [batches[i] for i in some], [goals[i] for i in some], losses, shares[some]
                )
    return found, weight


def _pass(
    model: MoLoRAModel,
    batches: Sequence[Batch],
    goals: Sequence[Goal],
    losses: Sequence[tuple[str, float, RoutingLoss]],
    shares: Tensor,
) -> Tensor:
    """Add the gradients of one pass over a batch of every client; the losses by their share, ``[1 + losses, C]``."""
    batch = join(batches) if len(batches) > 1 else batches[0]
    forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.told)
    parts = forward.by_client(len(batches), len(batches[0]))
    # The mean over no predictions is not a number, and neither is anything of its gradient.
    mine = [goal(part) if len(part.labels) else part.scores.sum() for goal, part in zip(goals, parts, strict=True)]
    values = [torch.stack(mine)]
    values += [torch.stack([function(part.records) for part in parts]) for _, _, function in losses]
    del forward, parts  # the logits are the largest tensor of a pass, and the backward needs them no more
    loss = values[0] + sum(coef * value for (_, coef, _), value in zip(losses, values[1:], strict=True))
    with warnings.catch_warnings():
        # The gradients of stacked clients are not contiguous, which autograd mentions once.
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        (loss * shares.to(model.flat.device)).sum().backward()  # type: ignore[no-untyped-call]  # untyped torch
    return torch.stack(values).detach().cpu() * shares


def _weight(batch: Batch, goal: Goal) -> float:
    """What the predictions of a batch weigh together."""
    return (
        batch.predictions if goal.weights is None else float(goal.weights[batch.labels[batch.labels != IGNORE]].sum())
    )


def _trained(model: MoLoRAModel, settings: Settings, scope: Callable[[Key], Scope]) -> list[_Range]:
    """Contiguous parts of the flat vector that learn, and which parameters need gradients at all."""
    ranges: list[_Range] = []
    rates = settings.rates
    by_kind = {"gate": rates.router, "head": rates.head}
    learns = torch.zeros(model.flat.numel(), dtype=torch.bool)
    for key, slot in sorted(model.slots.items(), key=lambda item: item[1].start):
        if scope(key) == "frozen" or key in model.fixed:
            continue
        learns[slot.start : slot.stop] = True
        part = _Range(slot.start, slot.stop, by_kind.get(key.kind, rates.experts))
        last = ranges[-1] if ranges else None
        if last and last.stop == part.start and last.rate == part.rate:
            ranges[-1] = last._replace(stop=part.stop)
        else:
            ranges.append(part)
    for parameter, start, stop in model.places:
        parameter.requires_grad_(bool(learns[start:stop].any()))
    return ranges


def _optimiser(model: MoLoRAModel, ranges: Sequence[_Range], decay: float) -> torch.optim.AdamW:
    groups = []
    for part in ranges:
        views = []
        for values, grads in zip(model.values, model.grads, strict=True):
            view = torch.nn.Parameter(values[part.start : part.stop])
            view.grad = grads[part.start : part.stop]
            views.append(view)
        groups.append({"params": views, "lr": part.rate})
    return torch.optim.AdamW(groups, weight_decay=decay, fused=True)


def _require_finite(losses: Sequence[float], settings: Settings, where: str, step: int, *, sound: bool) -> None:
    for loss in losses:
        if not math.isfinite(loss):
            raise _diverged(f"the loss is {loss}", settings, where, step, sound=sound)


def _diverged(what: str, settings: Settings, where: str, step: int, *, sound: bool) -> TrainingError:
    kind = TrainingError if sound else UntrainableError
    mend = f"Lower {settings.keys}, or set base.precision to fp32."
    return kind(f"{what} at step {step + 1}", where=where, mend=mend)


def _clip(grad: Tensor, ranges: Sequence[_Range], settings: Settings, where: str, step: int, *, sound: bool) -> None:
    views = [grad[part.start : part.stop] for part in ranges]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(view) for view in views])))
    if not math.isfinite(norm):
        raise _diverged("the gradient is not finite", settings, where, step, sound=sound)
    if settings.clip is not None and norm > settings.clip:
        for view in views:
            view.mul_(settings.clip / (norm + 1e-6))
