"""How many clients a client of a run wants beside it before it masks anything, and until the sum is unmasked."""

from __future__ import annotations

from molehill.config import Config
from molehill.draws import poisson
from molehill.secure.messages import threshold


def needed(config: Config, advertised: int = 0) -> int:
    """Fewest clients that a sum is of; see `threshold`.

    A client works it out of its own copy of the configuration. The server, which says who takes part, could else take
    any three of a hundred and learn the sum of one that it is curious about and two that it knows.

    Args:
        config: The run; of ``data.clients`` clients, ``federation.select`` chooses those of a round.
        advertised: How many advertised keys; they count where they are more than the configuration has take part.
    """
    return threshold(max(_expected(config), advertised), config.privacy.threshold)


def _expected(config: Config) -> int:
    """How many clients take part in a round; all of them, where that is left to chance."""
    ref = config.federation.select
    pool = [str(number) for number in range(config.data.clients)]
    if poisson(ref) is not None:
        return len(pool)
    return len(ref.build("client_selector", pool=pool, round_number=1, attempt=0, seed=config.run.seed))
