"""What the parameters of a client selector say of how it draws."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol, runtime_checkable

from molehill import registry
from molehill.config import MethodRef
from molehill.errors import ConfigError


@runtime_checkable
class Drawn(Protocol):
    """Parameters of a selector that draws; others say nothing of it.

    Attributes:
        sampling: ``fixed`` for so many of the pool at random, ``coins`` for every client by itself, see `Coins`.
    """

    sampling: ClassVar[Literal["fixed", "coins"]]


@runtime_checkable
class Coins(Drawn, Protocol):
    """Parameters of a selector that draws every client by itself, so that chance decides how many there are.

    Attributes:
        rate: Probability with which a client takes part in a round.
    """

    @property
    def rate(self) -> float: ...  # noqa: D102 - see above


def drawn(select: MethodRef) -> Drawn | None:
    """How a selector draws; None for one that does not.

    Args:
        select: The selector with its parameters, ``federation.select``.

    Raises:
        ConfigError: It says that it draws, and not how: nothing could be counted on.
    """
    params = registry.parse_params("client_selector", select.name, select.params)
    if not isinstance(params, Drawn):
        return None
    if params.sampling != "fixed" and not (params.sampling == "coins" and isinstance(params, Coins)):
        raise ConfigError(
            f"selector {select.name!r} declares its draw as {params.sampling!r}, which privacy cannot count",
            where="federation.select",
            mend="Its parameters need sampling 'fixed', or 'coins' and a rate.",
        )
    return params


def coins(select: MethodRef) -> Coins | None:
    """The coins of a selector that draws every client by itself; None for any other."""
    found = drawn(select)
    return found if isinstance(found, Coins) and by_coins(found) else None


def by_coins(params: object) -> bool:
    """Whether parameters, or their class, are those of a selector that draws every client by itself."""
    return isinstance(params, Drawn) and params.sampling == "coins"
