"""How tensors of experts that are no low-rank pairs lie in a bundle: those of one role on each other, rows first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np

from molehill.errors import ModelError
from molehill.molora.banks import Bank, PairBank, Part
from molehill.molora.model import MoLoRAModel
from molehill_export.insertion import Array

_PROBE = (1, 2, 3)  # ranks of experts that tell how rows go with them


class Stack(NamedTuple):
    """One parameter of a bank, which holds one role of all experts.

    Attributes:
        parameter: Its name in the bank.
        role: Role on the wire.
        by_rank: An expert has as many units as its rank; else one.
        unit: Rows of the parameter that belong together; they are stored as one row of the bundle.
        row: Shape of a row of the parameter.
        transposed: Whether the wire holds the transpose.
    """

    parameter: str
    role: str
    by_rank: bool
    unit: int
    row: tuple[int, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row of the bundle."""
        return self.row if self.unit == 1 else (self.unit, *self.row)

    def stored(self, value: Array) -> Array:
        """An expert's tensor in wire form as a bundle has it: rows first, ``[units, *shape]``."""
        rows = value.T if self.transposed else value
        return np.ascontiguousarray(rows.reshape(-1, *self.shape))

    def empty(self, rank: int) -> Array:
        """The tensor of an expert that is not there."""
        return np.zeros((rank if self.by_rank else 1, *self.shape), np.float32)


def stacks(bank: Bank) -> list[Stack]:
    """How a bank's tensors lie in a bundle.

    Raises:
        ModelError: They cannot; see `molehill.molora.banks.Part` for what they must be.
    """
    probe = bank.like(bank.site, _PROBE)
    found = []
    for parameter, group in groupby(probe.parts(), lambda part: part.parameter):
        parts = list(group)
        if parts[0].expert is None:
            continue
        if why := _unfit(parts, probe):
            raise ModelError(
                f"{bank.noun} experts cannot go into a bundle: parameter {parameter!r} of {type(bank).__name__} {why}",
                mend="See Part in molehill.molora.banks for what bundles can hold.",
            )
        first, row = parts[0], tuple(probe.get_parameter(parameter).shape[1:])
        found.append(Stack(parameter, first.role, _by_rank(parts, probe), _rows(first), row, first.transposed))
    return found


def common(bank: Bank) -> list[Part]:
    """The tensors that are of all experts of a bank, each a whole parameter, which no slot has rows of."""
    return [part for part in bank.parts() if part.expert is None]


def expert_tensors(model: MoLoRAModel, expert: str) -> Mapping[str, Array]:
    """The tensors of an expert as its file for devices has them, by ``<site>/<role>``.

    Raises:
        ModelError: As `stacks`.
    """
    tree = model.tree(lambda key: key.expert == expert)
    values = {f"{key.site}/{key.role}": np.ascontiguousarray(value) for key, value in tree.items()}
    for name, (bank, index) in model.banks_of(expert).items():
        if isinstance(bank, PairBank):
            A, B = (each.numpy() for each in bank.patches(index))
            values[f"{name}/A"] = np.concatenate([values[f"{name}/A"], A])
            values[f"{name}/B"] = np.concatenate([values[f"{name}/B"], B], 1)
            continue
        for stack in stacks(bank):
            place = f"{name}/{stack.role}"
            values[place] = stack.stored(values[place])
    return values


def _rows(part: Part) -> int:
    return int(part.rows.stop - part.rows.start)


def _by_rank(parts: list[Part], bank: Bank) -> bool:
    return all(_rows(part) == _rows(parts[0]) * rank for part, rank in zip(parts, bank.ranks, strict=True))


def _unfit(parts: list[Part], bank: Bank) -> str:
    """Why a bundle cannot hold what lies in a parameter; empty when it can."""
    if len({(part.role, part.transposed) for part in parts}) > 1:
        return "holds tensors of several roles"
    if [part.expert for part in parts] != list(range(bank.n_experts)):
        return "does not hold one tensor of every expert, in their order"
    ends = [0, *(part.rows.stop for part in parts)]
    if [part.rows.start for part in parts] != ends[:-1]:
        return "does not hold the experts' rows one after another"
    counts = {_rows(part) for part in parts}
    if 0 in counts or not (len(counts) == 1 or _by_rank(parts, bank)):
        return "has neither equally many rows for every expert nor for every rank"
    return ""
