"""What a rule says, and what rules ask of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from molehill import registry
from molehill.config import Config, MethodRef
from molehill.errors import ConfigError
from molehill.molora.interfaces import Site, SitePlan
from molehill_server.planning.planner import scopes, select, shares
from molehill_server.privacy.draw import Draw


@dataclass(frozen=True)
class Conflict:
    """Things in a configuration that do not go together.

    Attributes:
        verdict: ``refuse`` stops the run, ``warn`` only says so.
        keys: The configuration keys concerned.
        why: The reason.
    """

    verdict: Literal["refuse", "warn"]
    keys: tuple[str, ...]
    why: str

    @property
    def mend(self) -> str:
        """What to do."""
        return "Change one of them." if len(self.keys) > 1 else "Change it."


Rule = Callable[[Config], Iterator[Conflict]]


def asked(config: Config) -> int:
    """How many clients take part in a round; where that is left to chance, on average and rounded up."""
    pool = [str(number) for number in range(config.data.clients)]
    return math.ceil(Draw.of(config).expected(len(pool), len(select(config, pool, 1, 0))))


def asked_by(config: Config) -> str:
    """The key that says how many clients take part in a round."""
    return "data.clients" if asked(config) == config.data.clients else "federation.select"


def has_factors(config: Config) -> bool:
    """Whether experts are low-rank pairs, whose factors A and B have products."""
    return bool(config.molora.expert.declared("expert", "kind") == "pairs")


def both_shared(config: Config) -> bool:
    """Whether every client sends both factors in every round (methods that alternate do so with period 2)."""
    return all(decided.A == decided.B == "shared" for decided in (shares(config, 1), shares(config, 2)))


def closed_spaces() -> str:
    """The spaces, as an advice names them, that are sums of what clients send."""
    products, factors = (registry.those("space", closed=True, products=each) for each in (True, False))
    return f"{factors}, or {products} with a policy that freezes one factor"


def sends_nothing(config: Config) -> bool:
    """Whether nothing ever leaves a client."""
    return not any(scope == "shared" for number in (1, 2) for _, scope in scopes(config, number))


def planned(allocation: MethodRef, config: Config) -> SitePlan:
    """What an allocation gives a site."""
    site, molora = Site(layer=0, name="any", n_layers=1, d_in=1, d_out=1), config.molora
    plans: Mapping[str, SitePlan] = allocation.build("allocation").plan(
        [site], molora.experts, molora.shared, molora.rank
    )
    return plans["any"]


def k_of_the_allocation(config: Config) -> int | None:
    """Experts per token that the allocation itself gives; None where it leaves them to the selector."""
    try:
        return planned(config.molora.allocation, config).top_k
    except ConfigError:  # which another rule tells
        return None
