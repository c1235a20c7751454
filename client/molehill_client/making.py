"""What owners that share a workbench make of the final model, each for itself and in the same passes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from molehill.config import Config
from molehill.molora.model import seed_for
from molehill.plan import ClientPlan, Scope
from molehill.tasks.lengths import Examples
from molehill.wire.keys import Key
from molehill_client.convex import Line, best_head
from molehill_client.participant import Participant
from molehill_client.together import computes_head, fit, learns_alone, residuals, stacked
from molehill_client.trainer import Settings
from molehill_client.workbench import Workbench


@dataclass(frozen=True)
class Company:
    """Owners, and the rows that something is made for.

    Attributes:
        clients: The owners.
        plans: The plan of each.
        rows: What each of them fits to.
        received: What each of them got, with what it kept in the rounds and no residuals: all numbers of the model,
            ``[C, P]``.
        where: Owners and occasion, for error messages.
    """

    clients: Sequence[Participant]
    plans: Sequence[ClientPlan]
    rows: Sequence[Examples]
    received: Tensor
    where: str

    @property
    def bench(self) -> Workbench:
        """What they share."""
        return self.clients[0].bench

    def part(self, members: Sequence[int]) -> Company:
        """Some of them, at least one."""
        return replace(
            self,
            clients=[self.clients[i] for i in members],
            plans=[self.plans[i] for i in members],
            rows=[self.rows[i] for i in members],
            received=self.received[list(members)],
        )

    def started(self) -> Tensor:
        """The values that all adapters start from, ``[C, P]``."""
        self.clients[0].start_over(self.plans[0].k)
        return self.bench.model.flat.detach().repeat(len(self.clients), 1)

    def trained(self, values: Tensor, settings: Settings, steps: int, what: str, *, routed: bool = False) -> Tensor:
        """Train whole adapters: all that the start values let learn, and no residual.

        Args:
            values: Where each starts, ``[C, P]``.
            settings: How.
            steps: Optimiser steps.
            what: Names the occasion in the seeds.
            routed: Whether the routing losses count.

        Returns:
            ``[C, P]``.

        Raises:
            TrainingError: A loss is not finite.
        """
        return self._fit(values, learns_alone(self.bench.config), settings, steps, what, routed=routed)

    def personal(self, values: Tensor, kinds: Collection[str] = ("gate", "head"), *, seen: bool = True) -> Tensor:
        """Add the residuals that the configuration says: fitted in steps, then a head that is computed.

        Args:
            values: What they are added to, ``[C, P]``, without residuals.
            kinds: Of which kinds.
            seen: Whether what they are added to was trained on these rows.

        Returns:
            ``[C, P]``.

        Raises:
            TrainingError: A loss is not finite.
        """
        bench, plan = self.bench, self.plans[0]
        may_learn = residuals(plan, bench.config.personal)

        def scope(key: Key) -> Scope:
            return may_learn(key) if key.kind in kinds else "frozen"

        steps = bench.config.personal.steps
        if steps and any(scope(key) == "personal" for key in bench.model.layout):
            values = self._fit(values, scope, bench.residual_settings(), steps, "personal", routed=False, own=True)
        if not computes_head(self.clients[0], plan):
            return values
        return torch.stack([self._headed(number, own, seen=seen) for number, own in enumerate(values)])

    def _fit(
        self,
        values: Tensor,
        scope: Callable[[Key], Scope],
        settings: Settings,
        steps: int,
        what: str,
        *,
        routed: bool,
        own: bool = False,
    ) -> Tensor:
        model = self.bench.model
        seeds = [seed_for(plan.seed, what) for plan in self.plans]
        model.flat.copy_(values[0])
        with stacked(model, len(self.clients)):
            model.values.copy_(values)
            fit(
                self.clients, self.rows, seeds, scope, steps, (0.0, 1.0), self.where,
                settings=settings, routed=routed, personal=own,
            )  # fmt: skip
            return model.values.clone()

    def _headed(self, number: int, values: Tensor, *, seen: bool) -> Tensor:
        """The head's residual is what the best head for the owner's rows has more than the one that is there.

        Where the model has seen these rows, even those left out of a fit look better after it than others would: a
        stronger penalty that is not clearly worse is therefore preferred.
        """
        model, head = self.bench.model, self.bench.model.head
        assert head is not None
        model.flat.copy_(values)
        shared = Line(head.weight.detach().clone(), head.bias.detach().clone())
        seed = seed_for(self.plans[number].seed, "personal")
        found = best_head(self.bench, self.rows[number], shared, careful=seen, seed=seed, where=self.where)
        with torch.no_grad():
            head.residual["weight"].copy_(found.weight - shared.weight)
            head.residual["bias"].copy_(found.bias - shared.bias)
        return model.flat.detach().clone()


def head_steps(config: Config) -> int:
    """Steps of an owner's own head, where it is fitted in steps."""
    return config.personal.steps if config.personal.head_residual == "fitted" else 0


class Candidate(ABC):
    """Something that an owner could make of the final model with rows of its own.

    Attributes:
        replaces: Whether tensors of the shared model are replaced, and not added to alone.
        starts_over: Whether it starts from what the run started with, and not from the final model.
        heads: Whether it has nothing but a head of the owner's own, where the task has one: not without
            ``personal.head``.
        usual: Its place among what is tried where nobody says what, the preferred first; None for what is not.
    """

    replaces: ClassVar[bool] = False
    starts_over: ClassVar[bool] = False
    usual: ClassVar[int | None] = None
    heads: ClassVar[bool] = False

    def steps(self, config: Config, /) -> int:
        """Optimiser steps that it takes at most; none where it trains nothing."""
        del config
        return 0

    @abstractmethod
    def make(self, company: Company, /) -> Sequence[Tensor]:
        """Make it for every owner of a company.

        Returns:
            All numbers of the model, ``[C, P]``, once for each way to be tried, in the order of preference. The same
            company makes the same again.

        Raises:
            TrainingError: A loss is not finite.
        """
