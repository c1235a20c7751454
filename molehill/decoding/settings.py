"""Settings that fit a model's routers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from molehill.decoding.interfaces import Setting
from molehill.errors import AnswerError


def only_of(routers: Sequence[Sequence[str]], experts: Iterable[str]) -> Setting:
    """The setting in which none but some experts may be chosen.

    Args:
        routers: Ids of the experts of every router, in the order of its logits.
        experts: Ids of those.

    Raises:
        AnswerError: There is no such expert, or a router would be left without.
    """
    wanted, known = set(experts), {each for router in routers for each in router}
    if unknown := sorted(wanted - known):
        names = ", ".join(sorted(known)) or "none that are routed"
        raise AnswerError(f"there is no expert {unknown[0]!r} to choose", mend=f"There are {names}.")
    if any(not wanted & set(router) for router in routers):
        raise AnswerError(f"a router has none of the experts {', '.join(sorted(wanted))}", mend="Choose more of them.")
    return Setting(mask=tuple(each in wanted for router in routers for each in router))
