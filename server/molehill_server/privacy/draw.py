"""How the clients of a round are drawn, and what that means for the privacy of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from molehill.config import Config
from molehill.draws import drawn, poisson


class Round(NamedTuple):
    """What a round's draw counts as.

    Attributes:
        population: Clients that were there.
        sample: How many of them a fair draw of so many chose; all of them where no draw counts.
        rate: Probability with which each was drawn by itself; None where it was not.
    """

    population: int
    sample: int
    rate: float | None = None


@dataclass(frozen=True)
class Draw:
    """The selector of a run, as its parameters declare it, see `molehill.draws`.

    A draw hides who took part only while nothing else tells. So a round with a secret draw does not depend on who was
    drawn: it waits for all of them, up to its deadline, has no quorum, is not tried again, and ends with the noisy sum
    of what came, though it be of nobody. If it were given up or drawn again when too few answer, a reliable client
    would be in the rounds that count with another probability than the draw's, and the sums with it and without it
    would differ by what the others sent.

    Attributes:
        sampling: ``fixed`` for so many at random, ``poisson`` for each by itself, empty where nobody is drawn.
        rate: Of Poisson sampling; None for any other.
        secret: Whether the draw is counted as hiding who took part.
    """

    sampling: str
    rate: float | None
    secret: bool

    @classmethod
    def of(cls, config: Config) -> Draw:
        """The draw of a configuration.

        Under secure aggregation a sum needs a threshold of clients, so whether a round counts depends on who was drawn.
        """
        ref = config.federation.select
        found, each = drawn(ref), poisson(ref)
        private = config.privacy.clip is not None and not config.privacy.secure_aggregation
        return cls(found.sampling if found else "", each.rate if each else None, private and found is not None)

    def spent(self, population: int, sample: int) -> Round:
        """What a round counts as in which ``sample`` of ``population`` clients were asked."""
        if not self.secret:
            return Round(population, population)
        return Round(population, population, self.rate) if self.rate is not None else Round(population, sample)

    def expected(self, population: int, sample: int) -> float:
        """How many clients a sum is divided by: no chance of the draw is in it."""
        return sample if self.rate is None else self.rate * population
