"""The interface of topologies that wire whole blocks: banks of experts beside a feed-forward block, in steps.

A step sends tokens through one bank, weighed by a router of its own. What the steps add up is added to what the frozen
block gives, ``y = block(x) + delta``; with experts whose delta is 0 it is the base.

Shapes: B batch, T tokens, d features of the block, E routed experts of a bank.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, Protocol

from torch import Tensor

from molehill.molora.interfaces import Topology


class Step(NamedTuple):
    """One way of tokens through a bank of a block.

    Attributes:
        bank: Number of the bank, from 0; several steps may go through one.
        routed: Its experts are weighed by a router; else the bank is one LoRA that is always on.
        parts: A token is cut into so many parts of equal width, which are routed and adapted each by itself.
        first: Experts before it are closed to the step's router.
    """

    bank: int
    routed: bool = True
    parts: int = 1
    first: int = 0


class Stepped(NamedTuple):
    """What a step gives.

    Attributes:
        delta: What the experts add, ``[B, T, d]``.
        weights: Those of the routed experts, ``[B|1, T|1, E]``; None where all are always on.
    """

    delta: Tensor
    weights: Tensor | None


class Run(Protocol):
    """Takes a step of a block."""

    def __call__(self, step: int, x: Tensor, share: Tensor | None = None) -> Stepped:
        """Send tokens ``[B, T, d]`` through a step.

        Args:
            step: Its number.
            x: What experts and router read.
            share: What the weights of the routed experts are multiplied by, ``[B, T, 1]``; None where they stay.
        """
        ...


class BlockTopology(Topology):
    """Wires banks beside whole feed-forward blocks, which take and give ``[B, T, d]``.

    Attributes:
        ordered: Experts are told apart by their place, so that none can be left out, or added.
    """

    ordered: bool = False

    @abstractmethod
    def steps(self, experts: int) -> tuple[Step, ...]:
        """The steps of a block whose banks have so many routed experts; the first goes through bank 0.

        Raises:
            ConfigError: It cannot have so many.
        """

    @abstractmethod
    def delta(self, run: Run, x: Tensor, y0: Tensor) -> Tensor:
        """What is added to the output of the block.

        It adds up what steps gave and never subtracts an input, so that one step alone gives exactly its own delta.

        Args:
            run: Takes a step; each is to be taken once.
            x: Input of the block ``[B, T, d]``.
            y0: Its frozen output ``[B, T, d]``.
        """
