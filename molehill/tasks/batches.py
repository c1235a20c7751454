"""Examples, batches and the order they come in.

Padding is work for nothing. Batches are therefore cut from windows of rows sorted by length ("length-bucketed"):
padded over real tokens falls from about 1.4 to 1.1 on short texts, and the order stays random between batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from molehill.molora.interfaces import Told

Of: TypeAlias = Literal["next", "token", "pair"]

IGNORE = -100  # a label that no loss and no score counts
_WINDOW = 16  # batches per window; larger pads less, and orders more by length


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: Token ids, without padding.
        labels: Of the row its class, its number, or 1 and 0 for every class that is there or not; or one label per
            token (`IGNORE` where nothing is to be learnt).
        task: Id of the row's task, for methods that route by task.
        domain: Number of the row's domain, -1 where it has none of those that are known, for methods that route by it.
    """

    input_ids: list[int]
    labels: int | float | tuple[float, ...] | list[int]
    task: int | None = None
    domain: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded to one length.

    Attributes:
        input_ids: ``[B, T]`` int64; right-padded.
        attention_mask: ``[B, T]`` bool; False on padding.
        labels: One of every row: ``[B]`` int64 classes, ``[B]`` numbers or ``[B, C]`` numbers of what is there; or one
            of every token, ``[B, T]`` int64 with `IGNORE`.
        task_ids: ``[B]`` int64, or None when the rows have no task.
        of: What labels of tokens are: the ``next`` token, the class of the ``token`` itself, or the next token of one
            of two answers, in rows 2i and 2i + 1 (``pair``).
        domain_ids: Domain of every token, ``[B, T]`` int64, -1 for none and on padding; None when rows have no domain.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    task_ids: Tensor | None = None
    of: Of = "next"
    domain_ids: Tensor | None = None

    @property
    def told(self) -> Told:
        """What is told of the rows beside their tokens."""
        return Told(self.task_ids, self.domain_ids)

    @property
    def predictions(self) -> int:
        """How many there are to be made: one of every row, token or pair that has a label."""
        if self.of == "pair":
            return len(self) // 2
        if not of_tokens(self.labels):
            return len(self)
        return int(((self.labels if self.of == "token" else self.labels[:, 1:]) != IGNORE).sum())

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            task_ids=None if self.task_ids is None else self.task_ids.to(device),
            domain_ids=None if self.domain_ids is None else self.domain_ids.to(device),
        )


def of_tokens(labels: Tensor) -> bool:
    """Whether labels are of tokens; else of rows."""
    return labels.dim() == 2 and not labels.is_floating_point()


def alike(lengths: Sequence[int], start: float, most: int) -> list[list[int]]:
    """Cut runs of like length, so that padding and the starts of passes together cost least.

    Args:
        lengths: Of inputs, in tokens.
        start: What a pass costs before its first token, in tokens.
        most: Inputs of a pass at most.

    Returns:
        Indices of the inputs of every pass: each once, longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best, ends = [0.0], [0]  # of the n shortest: the cost, and how many go before the last pass
    for n, longest in enumerate((lengths[i] for i in reversed(order)), 1):
        cost, before = min((best[k] + start + (n - k) * longest, k) for k in range(max(0, n - most), n))
        best.append(cost)
        ends.append(before)
    passes, n = [], len(order)
    while n:
        passes.append(order[len(order) - n : len(order) - ends[n]])
        n = ends[n]
    return passes


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all rows, in order, padded to the longest.

    Args:
        batches: At least one, of one kind.
    """
    length = max(batch.input_ids.shape[1] for batch in batches)

    def longer(tensors: Sequence[Tensor], fill: float) -> Tensor:
        return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=fill) for tensor in tensors])

    labels = [batch.labels for batch in batches]
    tasks = [batch.task_ids for batch in batches if batch.task_ids is not None]
    domains = [batch.domain_ids for batch in batches if batch.domain_ids is not None]
    return Batch(
        longer([batch.input_ids for batch in batches], 0),  # any token: it is masked
        longer([batch.attention_mask for batch in batches], 0),
        longer(labels, IGNORE) if of_tokens(labels[0]) else torch.cat(labels),
        torch.cat(tasks) if len(tasks) == len(batches) else None,
        batches[0].of,
        longer(domains, -1) if len(domains) == len(batches) else None,
    )


class Collator(Protocol):
    """Turns examples into a batch; every `molehill.tasks.task.Task` is one."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad ``examples`` to one length."""
        ...


def pad(examples: Sequence[Example], pad_id: int, of: Of = "next") -> Batch:
    """Pad on the right to the longest example.

    Args:
        examples: At least one, of one kind.
        pad_id: Token id of padding.
        of: What labels of tokens are.

    Returns:
        The batch; labels per token are padded with `IGNORE`.
    """
    length = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), length), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(examples), length, dtype=torch.bool)
    per_token = torch.full_like(ids, IGNORE)
    per_row: list[int | float | tuple[float, ...]] = []
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        ids[row, :n] = torch.tensor(example.input_ids)
        mask[row, :n] = True
        if isinstance(example.labels, list):
            per_token[row, :n] = torch.tensor(example.labels)
        else:
            per_row.append(example.labels)
    tasks = [example.task for example in examples if example.task is not None]
    task_ids = torch.tensor(tasks) if len(tasks) == len(examples) else None
    domains = [example.domain for example in examples if example.domain is not None]
    domain_ids = None
    if len(domains) == len(examples):
        domain_ids = torch.where(mask, torch.tensor(domains).unsqueeze(1), -1)
    return Batch(ids, mask, torch.tensor(per_row) if per_row else per_token, task_ids, of, domain_ids)


@dataclass(frozen=True)
class Batches:
    """Endless length-bucketed training batches; equal arguments give equal batches.

    Every batch has ``batch_size`` rows (fewer only when there are fewer examples). Within one pass no row comes
    twice; the rows that do not fill a batch differ from pass to pass. Nothing needs saving to resume: give every
    round a seed of its own.

    Args:
        examples: At least one.
        batch_size: Rows per batch.
        seed: Of the order.
        task: Collates.
    """

    examples: Sequence[Example]
    batch_size: int
    seed: int
    task: Collator

    def __iter__(self) -> Iterator[Batch]:
        for indices in self.order():
            yield self.task.collate([self.examples[i] for i in indices])

    def order(self) -> Iterator[list[int]]:
        """Yield the row indices of every batch, without end."""
        lengths = np.array([len(example.input_ids) for example in self.examples])
        size = min(self.batch_size, len(lengths))
        rng = np.random.default_rng(self.seed)
        while True:
            rows = rng.permutation(len(lengths))[: len(lengths) // size * size]
            windows = [rows[i : i + _WINDOW * size] for i in range(0, len(rows), _WINDOW * size)]
            ordered = np.concatenate([window[np.argsort(lengths[window], kind="stable")] for window in windows])
            batches = ordered.reshape(-1, size)
            for batch in rng.permutation(len(batches)):
                yield batches[batch].tolist()


def eval_batches(examples: Sequence[Example], batch_size: int, task: Collator, start: float) -> Iterator[Batch]:
    """Yield every example once, in batches of like length.

    The largest come first, so that a batch too large for memory fails at once.

    Args:
        examples: The examples.
        batch_size: Most rows of a batch.
        task: Collates.
        start: What a pass costs before its first token, in tokens.
    """
    for indices in eval_order([len(example.input_ids) for example in examples], batch_size, start):
        yield task.collate([examples[i] for i in indices])


def eval_order(lengths: Sequence[int], batch_size: int, start: float) -> list[list[int]]:
    """Which examples are in each batch of `eval_batches`, in their order.

    Args:
        lengths: Of the examples, in tokens.
        batch_size: Most rows of a batch.
        start: What a pass costs before its first token, in tokens.
    """
    return sorted(alike(lengths, start, batch_size), key=lambda some: -len(some) * lengths[some[0]])
