"""What a kind of task is: which columns it reads, what it predicts, and how its rows are brought to one form.

Reading rows and drawing reports need no more than this; what turns rows into tensors is made by `Kind.make` and needs
torch (see `molehill.tasks.task`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from molehill import config, registry
from molehill.tasks.measures import Measure
from molehill.tasks.rows import Rows

if TYPE_CHECKING:  # they need torch
    from transformers import PreTrainedTokenizerBase

    from molehill.tasks.task import Task

Predicts: TypeAlias = Literal["class", "flags", "number", "pair"]


class Kind(ABC):
    """A kind of task; methods of the axis ``task`` derive from it.

    Attributes:
        columns: What it reads of a source, by Molehill's names.
        required: Those of ``columns`` that no run can do without.
        predicts: One of several classes, any number of them, a number, or which of two answers is better; objectives
            say which of these they can be computed for.
        head: Whether a layer of ours reads each ``row`` or each ``token``; None where the base has its own.
        convex: Whether the likelihood of a label is convex in what that layer says, so that a best one can be computed.
        writes: Whether the model writes text afterwards.
        objective: What is minimised where the configuration says nothing; None for its default.
        sequences: Inputs of the model that a row becomes.
        labelled: Whether its classes have names (``task.labels``).
        spans: Whether what it finds of a class are parts of a row, entities, and not rows.
        bundle: What a device calls a model of it.
        pipeline: What the hub calls a model of it.
        measures: What is measured of every model; a run is judged by the first.
        stages: What the stages of the scores are, in words.
    """

    columns: ClassVar[tuple[str, ...]]
    required: ClassVar[tuple[str, ...]] = ()
    predicts: ClassVar[Predicts] = "class"
    head: ClassVar[Literal["row", "token"] | None] = "row"
    convex: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    objective: ClassVar[str | None] = None
    sequences: ClassVar[int] = 1
    labelled: ClassVar[bool] = False
    spans: ClassVar[bool] = False
    bundle: ClassVar[str]
    pipeline: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    stages: ClassVar[str] = (
        "Base: frozen model with a head trained on that client. Local: the same adapter trained on that client alone. "
        "Global: the federated model. Personalised: the federated model with the client's own gate and head."
    )

    def require_read(self, rows: Rows, taken: Sequence[str]) -> None:
        """Refuse columns of a source that mean something here and that nothing reads.

        Args:
            rows: With the columns of their source.
            taken: Columns that the configuration names, which are read.

        Raises:
            DataError: One of them is filled in.
        """
        del rows, taken

    def reads(self, there: Collection[str]) -> Collection[str]:
        """Columns that are read, by Molehill's names.

        Args:
            there: Those of checked rows; without them, those that no run can do without.
        """
        return tuple(name for name in self.columns if name in self.required or name in there)

    def settle(self, rows: Rows, task: config.Task) -> config.Task:
        """Fill in what the configuration leaves to the rows, such as the names of the classes.

        Args:
            rows: Rows with the schema's column names.
            task: The configuration.

        Raises:
            DataError: The rows do not say it.
        """
        del rows
        return task

    def missing(self, task: config.Task) -> str:
        """The key that nobody can fill in who does not see the rows; empty when there is none.

        Args:
            task: The configuration.
        """
        return "labels" if self.labelled and not task.labels else ""

    @abstractmethod
    def conform(self, rows: Rows, task: config.Task, named: Collection[str] = ()) -> Rows:
        """Check every row and bring its columns to one form.

        Args:
            rows: Rows with the schema's column names.
            task: As `settle` returned it.
            named: Columns that the configuration names, which decide where the columns have several meanings.

        Raises:
            DataError: A column or value is missing, has the wrong type, is empty, or is none that the task knows.
        """

    def counts(self, rows: Rows, labels: Sequence[str]) -> Mapping[str, int]:
        """Rows of every class in the order of the logits, or entities of every type; empty where there are none.

        Args:
            rows: Checked rows.
            labels: Names of the classes.
        """
        del rows, labels
        return {}

    def strata(self, rows: Rows) -> Sequence[str] | None:
        """What the rows held out should be alike in to the others; None for the column ``label``, if there is one.

        Args:
            rows: Checked rows.
        """
        del rows
        return None

    @abstractmethod
    def make(self, tokenizer: PreTrainedTokenizerBase, task: config.Task) -> Task:
        """What turns rows into tensors.

        Args:
            tokenizer: Of the base model, with a padding token.
            task: As `settle` returned it; its labels may not be known yet.
        """


def kind_of(task: config.Task | str) -> Kind:
    """The kind of a task, by its configuration or name.

    Raises:
        ConfigError: There is none of this name.
    """
    made: Any = registry.build("task", task if isinstance(task, str) else task.kind)
    assert isinstance(made, Kind)  # the registry sees to it
    return made


def make_task(task: config.Task, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Build the task of a run.

    Args:
        task: With its labels known (see `molehill.tasks.schema.load_rows`).
        tokenizer: Of the base model, with a padding token.
    """
    return kind_of(task).make(tokenizer, task)
