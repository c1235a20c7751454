"""What a strategy asks of a model, and what it is.

`Passes` are those of one model for one text at a time: `molehill.molora.decode.TorchPasses` on a host, the view of a
bundle on a device. A strategy sees numbers only, so it needs neither torch nor a runtime.

Shapes: S routed experts of all routers one after another, V tokens of the vocabulary (or classes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

import numpy as np

from molehill.errors import AnswerError

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Setting:
    """How routers choose in a pass; what is None is as the gate in use has it.

    Attributes:
        bias: Added to the logits of routers, S numbers.
        mask: Which experts may be chosen, S truth values.
        ranks: Tokens choose the experts at these places, from the best at 0: ``(1, 3)`` are the second and third. They
            share the weight by the softmax of their logits.
        weights: Those of the experts for all tokens, in place of what routers say, S numbers: the experts as one.
        base: The frozen base alone, without any expert.
    """

    bias: tuple[float, ...] | None = None
    mask: tuple[bool, ...] | None = None
    ranks: tuple[int, int] | None = None
    weights: tuple[float, ...] | None = None
    base: bool = False


OWN = Setting()
BASE = Setting(base=True)


class Passes(Protocol):
    """Passes of one model."""

    @property
    def experts(self) -> tuple[str, ...]:
        """Ids of the routed experts."""
        ...

    @property
    def size(self) -> int:
        """S."""
        ...

    @property
    def answers(self) -> int:
        """V."""
        ...

    @property
    def writes(self) -> bool:
        """Whether it is a causal LM; else it classifies."""
        ...

    def only(self, experts: Iterable[str]) -> Setting:
        """The setting in which none but these experts may be chosen.

        Raises:
            AnswerError: There is no such expert, or a router would be left without.
        """
        ...

    def logits(self, ids: Sequence[int], setting: Setting = OWN, lane: str = "") -> Array:
        """Logits after the last of some tokens, or of the classes, float32 ``[V]``; valid until the next call.

        Args:
            ids: At least one.
            setting: How routers choose.
            lane: What was read in one is not read again there; another setting begins it anew.

        Raises:
            AnswerError: The model cannot do this setting.
        """
        ...

    def losses(self, ids: Sequence[int], setting: Setting = OWN) -> Array:
        """Minus the log probability of every token but the first, given those before, float32 ``[len(ids) - 1]``.

        Raises:
            AnswerError: The model classifies, or cannot do this setting.
        """
        ...


@runtime_checkable
class Conditions(Protocol):
    """Passes that tell what a text is like."""

    def condition(self, ids: Sequence[int]) -> Array:
        """The mean of the last states of the base without experts, float32 ``[d]``."""
        ...


@runtime_checkable
class Gradients(Protocol):
    """Passes that tell how the loss of a text follows the routers."""

    def slope(self, ids: Sequence[int], setting: Setting) -> Array:
        """The gradient of the mean of `Passes.losses` by the setting's bias, float32 ``[S]``.

        Args:
            ids: At least two.
            setting: How routers choose; no bias counts as zeros.

        Raises:
            AnswerError: The model classifies, or cannot do this setting.
        """
        ...


@runtime_checkable
class Likeness(Protocol):
    """Passes that tell how alike experts are."""

    def likeness(self) -> Array:
        """The sum over tensors of the absolute cosine of every two experts, float64 ``[E, E]``, E as in `experts`.

        Raises:
            AnswerError: Their tensors differ in shape.
        """
        ...


@runtime_checkable
class Aided(Protocol):
    """Passes beside those of other models."""

    @property
    def others(self) -> Mapping[str, Passes]:
        """Other models that read the same tokens, by what they are here."""
        ...


def other(passes: Passes, name: str) -> Passes:
    """Another model beside the one that was trained.

    Args:
        passes: Of the trained model.
        name: What the other is to it.

    Raises:
        AnswerError: There is none.
    """
    found = passes.others.get(name) if isinstance(passes, Aided) else None
    if found is None:
        raise AnswerError(f"there is no {name} model beside this one", where="--strategy", mend=f"Give --{name} MODEL.")
    return found


Scores: TypeAlias = Callable[[Sequence[int]], Array]


@dataclass(frozen=True)
class Example:
    """A row that a strategy learns from.

    Attributes:
        ids: Of the prompt, or of the text.
        answer: Ids of the answer, or the number of the class; empty where the row has none.
        columns: What else the row says.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)


Through: TypeAlias = Callable[[Sequence[Example]], Iterable[Example]]


def all_of(examples: Sequence[Example]) -> Iterable[Example]:
    """Rows one after another, and nothing shown of how far it is."""
    return examples


@runtime_checkable
class Learns(Protocol):
    """A strategy that is fitted to a few rows before the first answer; they stay where they are."""

    @property
    def rows(self) -> str:
        """The file of rows; empty for none."""
        ...

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """Be fitted.

        Args:
            passes: Of the model.
            examples: The rows of the file.
            through: Gives some rows one after another where each takes passes, and may show how far it is.

        Raises:
            AnswerError: They are not what it needs.
        """
        ...


class Strategy(ABC):
    """Turns passes into scores of the next token, or of the classes.

    Attributes:
        on_device: Whether bundles can do it: with what a device's passes have, and nothing fitted on a host.
        routed: It needs routers to choose otherwise.
        writes: It is for causal LMs only.
        classifies: It is for classifiers only.
        own: Scores are the model's own logits, so that several rows may go in one pass.
        asks: What other models it asks (`Aided`), by name.
        neutral: Parameters under which scores are the model's own logits; None where there are none.
    """

    on_device: bool = True  # of a class, or of an instance that knows more
    routed: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    own: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, Any] | None] = None

    @abstractmethod
    def begin(self, passes: Passes, prompt: Sequence[int]) -> Scores:
        """Begin an answer.

        Args:
            passes: Of the model.
            prompt: Ids of the prompt, or of the text that is classified.

        Returns:
            What gives the scores ``[V]`` after all tokens so far: prompt and answer. -inf is never chosen.
        """


class Picker(ABC):
    """Says how good every expert is for a text.

    Attributes:
        on_device: As of `Strategy`.
        fitted: It learns from rows, and knows nothing without.
        weigh: How several experts share a text when nobody says: as the ``router`` chooses among them, by the
            ``softmax`` of their scores, or by their ``mean``.
    """

    on_device: bool = True  # of a class, or of an instance that knows more
    fitted: ClassVar[bool] = True
    weigh: ClassVar[str] = "router"

    def learn(self, passes: Passes, examples: Sequence[Example], through: Through = all_of) -> None:
        """See `Learns.learn`."""
        del passes, examples, through

    @abstractmethod
    def scores(self, passes: Passes, prompt: Sequence[int]) -> Array:
        """How good the experts are, ``[E]`` as in `Passes.experts`: more is better, -inf is never picked.

        Args:
            passes: Of the model.
            prompt: Ids of the text.

        Raises:
            AnswerError: The text, or the model, is none for it.
        """

    def group(self, scores: Array, k: int) -> list[int]:
        """The places of the experts that answer together: the best, of equals the first.

        Args:
            scores: Of `scores`; at least k are finite.
            k: How many.
        """
        return [int(place) for place in np.argsort(-scores, kind="stable")[:k]]


def log_softmax(logits: Array) -> Array:
    """Log probabilities over the last axis, in float64."""
    z = logits.astype(np.float64)
    z = z - z.max(-1, keepdims=True)
    found: Array = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return found
