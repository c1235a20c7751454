"""The local step loop on the model's flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from molehill.errors import TrainingError
from molehill.molora.interfaces import RoutingLoss
from molehill.molora.model import Forward, MoLoRAModel
from molehill.plan import Scope
from molehill.tasks.batches import Batch
from molehill.wire.keys import Key

Objective = Callable[[Forward], Tensor]


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
        decay: Decoupled weight decay of shared tensors.
        personal_decay: The same for residuals.
        clip: Largest gradient norm, or None.
        prox: FedProx coefficient mu.
        accumulation: Micro-batches per step.
    """

    rates: Rates
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay: float = 0.0
    personal_decay: float = 0.0
    clip: float | None = 1.0
    prox: float = 0.0
    accumulation: int = 1


@dataclass(frozen=True)
class Result:
    """What a training run reports.

    Attributes:
        loss: Mean objective over the steps, routing losses excluded.
        routing: Mean of every routing loss, unweighted, by name.
        tokens: Gate mass by (site, expert).
    """

    loss: float
    routing: dict[str, float]
    tokens: dict[tuple[str, str], float]


class _Range(NamedTuple):
    start: int
    stop: int
    rate: float
    decay: float


def schedule_factor(kind: str, progress: float) -> float:
    """Learning rate factor at ``progress`` (0 to 1) of the run; linear and cosine fall to a tenth."""
    if kind == "linear":
        return 1.0 - 0.9 * progress
    if kind == "cosine":
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    return 1.0


def train(
    model: MoLoRAModel,
    batches: Iterator[Batch],
    objective: Objective,
    losses: Sequence[tuple[str, float, RoutingLoss]],
    settings: Settings,
    scope: Callable[[Key], Scope],
    *,
    steps: int,
    progress: tuple[float, float] = (0.0, 1.0),
    observe: Observer | None = None,
    where: str = "",
) -> Result:
    """Train in place.

    Args:
        model: The model; tensors whose scope is ``frozen`` keep their values bit for bit.
        batches: Endless batches on the model's device.
        objective: Loss of a pass.
        losses: Routing losses: name, coefficient, function.
        settings: Rates and bounds.
        scope: What happens to every tensor.
        steps: Optimiser steps.
        progress: Part of the whole run that these steps cover.
        observe: Called after every step.
        where: Client and round, for error messages.

    Returns:
        Mean losses and the gate mass of every expert over all steps.

    Raises:
        TrainingError: A loss or a gradient is not finite, or nothing is trained.
    """
    ranges = _trained(model, settings, scope)
    if not ranges:
        raise TrainingError("the plan trains no tensor", where=where, mend="Check federation.policy and personal.")
    anchor = model.flat.detach().clone() if settings.prox else None
    optimiser = _optimiser(model, ranges)
    model.train()
    model.base.eval()  # dropout of the frozen base stays off
    for site in model.sites.values():
        site.dropout.train()
    model.state.collect = bool(losses)
    model.count_tokens(on=True)
    total, sums = 0.0, {name: 0.0 for name, _, _ in losses}
    try:
        for step in range(steps):
            at = progress[0] + (progress[1] - progress[0]) * step / steps
            model.state.progress = at
            factor = schedule_factor(settings.schedule, at)
            for group, part in zip(optimiser.param_groups, ranges, strict=True):
                group["lr"] = part.rate * factor
            model.grad.zero_()
            loss, extra = _accumulate(model, batches, objective, losses, settings.accumulation)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss is {loss} at step {step + 1}",
                    where=where,
                    mend="Lower train.lr, or set base.precision to fp32.",
                )
            if anchor is not None:
                for part in ranges:
                    span = slice(part.start, part.stop)
                    model.grad[span].add_(model.flat.detach()[span] - anchor[span], alpha=settings.prox)
            _clip(model.grad, ranges, settings.clip, where, step)
            optimiser.step()
            total += loss
            for name in sums:
                sums[name] += extra[name]
            if observe is not None:
                observe(step + 1, steps)
    finally:
        model.eval()
        model.state.collect = False
        model.state.count = False
    return Result(total / steps, {name: value / steps for name, value in sums.items()}, model.tokens())


def _accumulate(
    model: MoLoRAModel,
    batches: Iterator[Batch],
    objective: Objective,
    losses: Sequence[tuple[str, float, RoutingLoss]],
    accumulation: int,
) -> tuple[float, Mapping[str, float]]:
    """Gradients of one optimiser step; micro-batches count by their number of predictions."""
    micro = [next(batches) for _ in range(accumulation)]
    sizes = [_predictions(batch.labels) for batch in micro]
    total, extra = 0.0, {name: 0.0 for name, _, _ in losses}
    for batch, size in zip(micro, sizes, strict=True):
        share = size / sum(sizes)
        forward = model(batch.input_ids, batch.attention_mask, batch.labels, batch.task_ids)
        loss = objective(forward)
        total += share * float(loss.detach())
        for name, coef, function in losses:
            value = function(forward.records)
            extra[name] += share * float(value.detach())
            loss = loss + coef * value
        (loss * share if accumulation > 1 else loss).backward()
    return total, extra


def _predictions(labels: Tensor) -> int:
    return len(labels) if labels.dim() == 1 else int((labels[:, 1:] != -100).sum())


def _trained(model: MoLoRAModel, settings: Settings, scope: Callable[[Key], Scope]) -> list[_Range]:
    """Contiguous parts of the flat vector that learn, and which parameters need gradients at all."""
    ranges: list[_Range] = []
    rates = settings.rates
    by_kind = {"gate": rates.router, "head": rates.head}
    learns = torch.zeros(model.flat.numel(), dtype=torch.bool)
    for key, slot in sorted(model.slots.items(), key=lambda item: item[1].start):
        what = scope(key)
        if what == "frozen":
            continue
        learns[slot.start : slot.stop] = True
        residual = key.role.partition(".")[2].startswith("residual")
        decay = settings.personal_decay if residual else settings.decay
        part = _Range(slot.start, slot.stop, by_kind.get(key.kind, rates.experts), decay)
        last = ranges[-1] if ranges else None
        if last and last.stop == part.start and last[2:] == part[2:]:
            ranges[-1] = last._replace(stop=part.stop)
        else:
            ranges.append(part)
    for parameter in model.parameters():
        if parameter.grad is None:  # the frozen base
            continue
        start = (parameter.data_ptr() - model.flat.data_ptr()) // model.flat.element_size()
        parameter.requires_grad_(bool(learns[start : start + parameter.numel()].any()))
    return ranges


def _optimiser(model: MoLoRAModel, ranges: Sequence[_Range]) -> torch.optim.AdamW:
    groups = []
    for part in ranges:
        view = torch.nn.Parameter(model.flat.detach()[part.start : part.stop])
        view.grad = model.grad[part.start : part.stop]
        groups.append({"params": [view], "lr": part.rate, "weight_decay": part.decay})
    return torch.optim.AdamW(groups, fused=True)


def _clip(grad: Tensor, ranges: Sequence[_Range], limit: float | None, where: str, step: int) -> None:
    views = [grad[part.start : part.stop] for part in ranges]
    norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(view) for view in views])))
    if not math.isfinite(norm):
        raise TrainingError(
            f"the gradient is not finite at step {step + 1}", where=where, mend="Lower train.lr, or use fp32."
        )
    if limit is not None and norm > limit:
        for view in views:
            view.mul_(limit / (norm + 1e-6))
