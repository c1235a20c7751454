"""What the rounds so far cost, and what the next one would."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module

from molehill.config import Config
from molehill.errors import PrivacyError
from molehill.extras import needs

Round = tuple[
    int, int
]  # clients that were there, and how many of them a fair draw chose; equal where nothing was drawn


@dataclass(frozen=True)
class Ledger:
    """The privacy state of a run; a checkpoint keeps it.

    Attributes:
        secret: Seed of the client selection. Sampling hides a client only while nobody can redo it, so it does not
            follow from the run's seed.
        rounds: All rounds whose noisy mean was released.
    """

    secret: int = field(default_factory=lambda: secrets.randbits(128))
    rounds: tuple[Round, ...] = ()

    def after(self, spent: Round) -> Ledger:
        """The ledger with one more round."""
        return replace(self, rounds=(*self.rounds, spent))


class Accountant:
    """Renyi accounting of the Gaussian mechanism (dp-accounting).

    Two runs are neighbours when one client's part in them is replaced by nothing. Then every sum differs by at most
    the clip, and the rounds compose as Gaussian mechanisms of noise multiplier z. Where clients are drawn (selector
    ``random``: so many of those that are there, without replacement), the bound for such samples
    (Wang, Balle & Kasiviswanathan 2019, https://arxiv.org/abs/1808.00087) holds as well. It is about replacing one
    client's part by any other, which moves a sum by twice the clip, so it is asked for the multiplier z / 2; what it
    promises includes our neighbours. Both bounds are true, and the smaller one counts. Other selectors get no
    amplification. Nothing else is released: quorums, deadlines and retries depend on nobody's data.

    Args:
        noise: z.
        delta: Probability with which the bound may fail.
        budget: Largest epsilon.

    Raises:
        ConfigError: The library is not installed.
    """

    def __init__(self, noise: float, delta: float, budget: float) -> None:
        with needs("privacy"):
            import_module("dp_accounting")
        self._noise, self._delta, self._budget = noise, delta, budget

    @classmethod
    def of(cls, config: Config) -> Accountant | None:
        """The accountant of a configuration; None when privacy is off."""
        privacy = config.privacy
        if privacy.noise is None or privacy.delta is None or privacy.epsilon is None:
            return None
        return cls(privacy.noise, privacy.delta, privacy.epsilon)

    def epsilon(self, rounds: Sequence[Round]) -> float:
        """Epsilon of all these rounds together, at the accountant's delta."""
        if not rounds:
            return 0.0
        counts = Counter(rounds)
        alike = _of_all(self._noise, self._delta, len(rounds))
        if all(population == sample for population, sample in counts):
            return alike
        return min(alike, _of_drawn(self._noise, self._delta, tuple(sorted(counts.items()))))

    def lasts(self, spent: Round, rounds: int) -> int:
        """How many of ``rounds`` equal rounds the budget allows."""
        low, high = 0, rounds
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.epsilon([spent] * middle) <= self._budget else (low, middle - 1)
        return low

    def require(self, rounds: Sequence[Round]) -> float:
        """Epsilon of these rounds, of which the last one is only planned.

        Raises:
            PrivacyError: It is above the budget.
        """
        after = self.epsilon(rounds)
        if after > self._budget:
            raise PrivacyError(
                f"it would bring epsilon to {after:.3g} at delta {self._delta:g}, above the budget of "
                f"{self._budget:g}; {self.epsilon(rounds[:-1]):.3g} is spent",
                where=f"round {len(rounds)}",
                mend="The last committed round stands. Plan fewer rounds, more noise or a larger privacy.epsilon in a "
                "new run.",
            )
        return after


@cache
def _of_all(noise: float, delta: float, rounds: int) -> float:
    """Epsilon without sampling."""
    import dp_accounting  # noqa: PLC0415 - an extra, and slow to import
    from dp_accounting import rdp  # noqa: PLC0415

    accountant = rdp.RdpAccountant()
    accountant.compose(dp_accounting.GaussianDpEvent(noise), rounds)
    return float(accountant.get_epsilon(delta))


@cache  # a quarter of a second for every kind of round
def _of_drawn(noise: float, delta: float, counts: tuple[tuple[Round, int], ...]) -> float:
    """Epsilon with sampling, for replacing one client by any other."""
    import dp_accounting  # noqa: PLC0415
    from dp_accounting import rdp  # noqa: PLC0415

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    gaussian = dp_accounting.GaussianDpEvent(noise / 2)
    for (population, sample), count in counts:
        accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(population, sample, gaussian), count)
    return float(accountant.get_epsilon(delta))


def drawn(config: Config, population: int, sample: int) -> Round:
    """What a round's selection counts as."""
    return (population, sample if config.federation.select.name == "random" else population)
