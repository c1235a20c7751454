"""How many clients a client of a run wants beside it before it masks anything."""

from __future__ import annotations

from molehill import registry
from molehill.config import Config
from molehill.secure.messages import threshold


def smallest_company(config: Config) -> int:
    """Fewest clients whose keys may go round in a round: `threshold` of those that the configuration has take part.

    A client works it out of its own copy. The server, which says who takes part, could else take any three of a hundred
    and learn the sum of one that it is curious about and two that it knows.

    Args:
        config: The run; of ``data.clients`` clients, ``federation.select`` chooses those of a round.
    """
    ref = config.federation.select
    pool = [str(number) for number in range(config.data.clients)]
    chosen = registry.build(
        "client_selector", ref.name, ref.params, pool=pool, round_number=1, attempt=0, seed=config.run.seed
    )
    return threshold(len(chosen), config.privacy.threshold)
