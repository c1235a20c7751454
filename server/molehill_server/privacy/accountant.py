"""What the rounds so far cost, and what the next one would."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module

from molehill.config import Config
from molehill.errors import PrivacyError
from molehill.extras import needs
from molehill_server.privacy.draw import Round

_COARSE = 0.5  # noise below which a fine grid of losses would take long, and finds little
_LEAST = 0.3  # noise below which sampling is not counted: a round then spends tens of epsilon


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
    """Accounting of the Gaussian mechanism (dp-accounting).

    Two runs are neighbours when one client's part in them is replaced by nothing. Then every sum differs by at most
    the clip, and what hides that depends on how clients are drawn; see `Draw` for what a round must keep to.

    - Nobody is drawn: n rounds are one Gaussian mechanism of noise multiplier z / sqrt(n), whose epsilon is known
      exactly (Balle & Wang 2018, https://arxiv.org/abs/1805.06530).
    - Every client by itself (``poisson``): a round with the client is the mixture of N(0, z^2) and N(1, z^2) with
      weights 1 - q and q, one without it N(0, z^2). The privacy losses of rounds are composed numerically on a grid,
      rounded so that epsilon is an upper bound (Doroshenko et al. 2022, https://arxiv.org/abs/2207.04380).
    - So many of those that are there (``random``): the Renyi bound for samples without replacement (Wang, Balle &
      Kasiviswanathan 2019, https://arxiv.org/abs/1808.00087). It is about replacing one client's part by any other,
      which moves a sum by twice the clip, so it is asked for the multiplier z / 2; what it promises includes our
      neighbours. It is loose.

    No draw makes it worse, so what holds without a draw bounds all of them, and the smallest bound counts.

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
        bounds = [_of_all(self._noise, self._delta, len(rounds))]
        counts = Counter(rounds)
        rates = {spent.rate for spent in counts}
        if rates == {None}:
            if any(spent.sample < spent.population for spent in counts):
                bounds.append(_of_fixed(self._noise, self._delta, tuple(sorted(counts.items()))))
        elif self._noise >= _LEAST:
            by_rate = Counter(1.0 if spent.rate is None else spent.rate for spent in rounds)
            bounds.append(_of_poisson(self._noise, self._delta, tuple(sorted(by_rate.items()))))
        return min(bounds)

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
    from dp_accounting import gaussian_mechanism  # noqa: PLC0415 - an extra, and slow to import

    return float(gaussian_mechanism.get_epsilon_gaussian(noise / math.sqrt(rounds), delta))


@cache  # a quarter of a second
def _of_poisson(noise: float, delta: float, counts: tuple[tuple[float, int], ...]) -> float:
    """Epsilon where every client is drawn by itself, with so many rounds of every rate."""
    import dp_accounting  # noqa: PLC0415 - the same
    from dp_accounting import pld  # noqa: PLC0415 - the same

    grid = 1e-4 if noise >= _COARSE else 1e-3
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid)
    gaussian = dp_accounting.GaussianDpEvent(noise)
    for rate, count in counts:
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), count)
    return float(accountant.get_epsilon(delta))


@cache  # a quarter of a second for every kind of round
def _of_fixed(noise: float, delta: float, counts: tuple[tuple[Round, int], ...]) -> float:
    """Epsilon where so many are drawn, for replacing one client by any other."""
    import dp_accounting  # noqa: PLC0415 - the same
    from dp_accounting import rdp  # noqa: PLC0415 - the same

    accountant = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    gaussian = dp_accounting.GaussianDpEvent(noise / 2)
    for (population, sample, _), count in counts:
        accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(population, sample, gaussian), count)
    return float(accountant.get_epsilon(delta))
