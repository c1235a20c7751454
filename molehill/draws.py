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
        sampling: ``fixed`` for so many of the pool at random, ``poisson`` for every client by itself, see `Poisson`.
    """

    sampling: ClassVar[Literal["fixed", "poisson"]]


@runtime_checkable
class Poisson(Drawn, Protocol):
    """Parameters of Poisson sampling: every client is drawn by itself, so chance decides how many there are."""

    @property
    def rate(self) -> float:
        """Probability with which a client takes part in a round."""
        ...


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
    if params.sampling != "fixed" and not (params.sampling == "poisson" and isinstance(params, Poisson)):
        raise ConfigError(
            f"selector {select.name!r} declares its draw as {params.sampling!r}, which privacy cannot count",
            where="federation.select",
            mend="Its parameters need sampling 'fixed', or 'poisson' and a rate.",
        )
    return params


def poisson(select: MethodRef) -> Poisson | None:
    """The parameters of a selector that samples as Poisson does; None for any other."""
    found = drawn(select)
    return found if isinstance(found, Poisson) and is_poisson(found) else None


def is_poisson(params: object) -> bool:
    """Whether parameters, or their class, are those of Poisson sampling."""
    return isinstance(params, Drawn) and params.sampling == "poisson"
