"""What a client agreed to with its own configuration, and no plan may change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from molehill import registry
from molehill.config import Config
from molehill.errors import MessageError
from molehill.plan import ClientPlan
from molehill.wire.keys import Key

_MEND = "Run the same configuration on server and clients."


def require_consent(plan: ClientPlan, config: Config, keys: Iterable[Key], client: str) -> None:
    """Refuse a plan that would have more leave this machine than its configuration says.

    A plan may share less: what it freezes or leaves on the machine tells nobody anything.

    Args:
        plan: The plan.
        config: The client's own copy.
        keys: Of all tensors of its model.
        client: Its id, for the message.

    Raises:
        MessageError: The plan shares what is personal or frozen, or has another clip than ``privacy.clip``.
    """
    where = f"client {client}"
    ref = config.federation.policy
    decided = registry.build("policy", ref.name, ref.params, round_number=plan.round)
    for key in keys:
        if plan.scope(key) != "shared":
            continue
        if key.residual:
            raise MessageError("plan asks for what is personal: residuals never leave a machine", where=where)
        owner = _keeper(key, config, decided)
        if owner:
            raise MessageError(f"plan asks for {key.name}, which {owner} does not share", where=where, mend=_MEND)
    if plan.clip != config.privacy.clip:
        raise MessageError(
            f"plan has changes clipped to {plan.clip}, privacy.clip is {config.privacy.clip}", where=where, mend=_MEND
        )


def _keeper(key: Key, config: Config, decided: Any) -> str:
    """The configuration key that keeps a tensor from being shared; empty when none does."""
    scope = getattr(decided, key.kind)
    if scope is not None:
        return "" if scope == "shared" else "federation.policy"
    if key.kind == "head":
        return "personal.head" if config.personal.head == "personal" else ""
    main = config.personal.gate == "mixture" and not key.role.startswith("gate.sub")
    return "personal.gate" if config.personal.gate == "personal" or main else ""
