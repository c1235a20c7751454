"""What turns the rows of a task into tensors, and what its model says into scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from molehill.molora.forward import Forward
from molehill.molora.likelihoods import Likelihood
from molehill.plan import Scores
from molehill.tasks.batches import Collator, Example
from molehill.tasks.lengths import Examples
from molehill.tasks.outcomes import Outcomes
from molehill.tasks.rows import Rows

__all__ = ["ByObjective", "Classes", "Example", "Tally", "Task"]


class Tally(Protocol):
    """What is measured of a model, added up batch by batch; the order of the batches does not matter."""

    def add(self, forward: Forward) -> None:
        """Count the predictions of one batch."""
        ...

    def scores(self) -> Scores:
        """What they come to.

        Raises:
            DataError: Nothing was counted.
            TrainingError: The loss is not finite.
        """
        ...

    def outcomes(self) -> Outcomes:
        """What every row was scored, in the order in which they were counted."""
        ...

    @property
    def confusion(self) -> list[list[int]] | None:
        """How many of each class (row) were taken for each (column); None where that means nothing."""
        ...

    @property
    def found(self) -> Mapping[str, tuple[int, int, int]] | None:
        """Of every type of entities how many are right, were found and are there; None where none are looked for."""
        ...


class Task(Collator, Protocol):
    """Rows to examples, examples to batches, and predictions to scores.

    Attributes:
        outputs: Numbers that a head says of a row or token; 0 where the base's own is used.
        likelihood: Of the labels, given what the model says.
    """

    @property
    def outputs(self) -> int:
        """See the class."""
        ...

    @property
    def likelihood(self) -> Likelihood:
        """See the class."""
        ...

    def encode(self, rows: Rows) -> Examples:
        """Tokenise checked rows (see `molehill.tasks.kind.Kind.conform`), and say how long they are and of which units.

        Raises:
            DataError: A row gives nothing to learn from.
        """
        ...

    def tally(self) -> Tally:
        """Nothing counted yet."""
        ...


@runtime_checkable
class ByObjective(Protocol):
    """A tally whose loss is that of the run's objective, since its predictions have no likelihood of their own."""

    def by(self, objective: Callable[[Forward], Tensor]) -> None:
        """Learn the objective before the first batch."""
        ...


@runtime_checkable
class Classes(Protocol):
    """A task whose every prediction is one of some classes."""

    def counts(self, examples: Sequence[Example]) -> list[int]:
        """How often each class, in the order of the logits, is the label of a prediction."""
        ...
