"""What the clients of one process share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from molehill.config import Config
from molehill.errors import ConfigError
from molehill.molora.interfaces import RoutingLoss
from molehill.molora.model import MoLoRAModel
from molehill.tasks.lengths import Examples
from molehill.tasks.task import ByObjective, Classes, Tally, Task
from molehill.wire.exchange import Exchange
from molehill.wire.tree import Tree
from molehill_client.goals import Goal, balanced
from molehill_client.interfaces import Objective
from molehill_client.trainer import Rates, Settings


@dataclass(frozen=True)
class Workbench:
    """What several clients of one process share: the base in memory once, adapters swapped in place.

    Attributes:
        config: The run.
        model: The model; its adapter belongs to whoever used it last.
        task: Encodes and collates rows.
        base_digest: Digest of the base weights.
        initial: The adapter every client starts from.
        exchange: Where blobs come from and deltas go.
        remembered: Folder for the scores of baselines, which later runs on this machine then need not train; or None.
    """

    config: Config
    model: MoLoRAModel
    task: Task
    base_digest: str
    initial: Tree
    exchange: Exchange
    remembered: Path | None = None

    def objective(self) -> Objective:
        """The run's objective."""
        return self.config.train.objective.build("objective")  # type: ignore[no-any-return]  # any method's type

    def tally(self) -> Tally:
        """What is measured of a model, with nothing counted yet."""
        found = self.task.tally()
        if isinstance(found, ByObjective):
            found.by(self.objective())
        return found

    def goal(self, rows: Examples, *, personal: bool = False) -> Goal:
        """What a client minimises on its training rows.

        Args:
            rows: These.
            personal: Whether it is for what the client fits for itself after the rounds.

        Raises:
            ConfigError: The configuration asks for classes, and the task has none.
        """
        objective = self.objective().personal() if personal else self.objective()
        weighted = self.config.task.class_weights == "balanced"
        if not objective.by_class and not weighted:
            return Goal(objective)
        if not isinstance(self.task, Classes):
            raise ConfigError(
                "the task has no classes to count",
                where="task.class_weights" if weighted else "train.objective",
                mend="Take another objective, and leave task.class_weights out.",
            )
        counts = torch.tensor(self.task.counts(rows), dtype=torch.float32, device=self.model.flat.device)
        objective.begin(counts)
        return Goal(objective, balanced(counts) if weighted else None)

    def losses(self) -> list[tuple[str, float, RoutingLoss]]:
        """The run's routing losses: name, coefficient, function."""
        return [(ref.name, ref.coef, ref.build("routing_loss")) for ref in self.config.molora.losses]

    def settings(self) -> Settings:
        """How the rounds train."""
        part = self.config.train
        return Settings(
            rates=Rates(part.lr, part.router_lr or part.lr, part.head_lr or part.lr),
            schedule=part.schedule,
            decay=part.weight_decay,
            clip=part.clip,
            rules=tuple(ref.build("regulariser") for ref in part.all_rules),
            accumulation=part.accumulation,
        )

    def residual_settings(self) -> Settings:
        """How residuals are fitted to a model that stands still."""
        part, train = self.config.personal, self.config.train
        return Settings(
            rates=Rates(train.lr, part.gate_lr, part.head_lr),
            schedule="linear",
            decay=part.decay,
            clip=train.clip,
            accumulation=train.accumulation,
            keys="personal.gate_lr and personal.head_lr",
        )
