"""What a plan may ask of a tensor that nobody has thought of yet."""

from __future__ import annotations

import pytest
from tiny_house import EXPERTS

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill_client.consent import require_consent


@pytest.mark.parametrize("role", ["scale", "scale.x", "ranks", "__class__"])
def test_tensors_of_any_other_kind_follow_the_policy(house, role):
    key = Key("site", "e0", role)
    shared = ((f"*/{role}", "shared"), *EXPERTS)
    open_, one = house(), house(federation={"preset": "local"})
    require_consent(open_.plan(0, scopes=shared, codec=open_.config.wire.up), open_.config, [key], "client-1")
    plan = one.plan(0, scopes=shared, codec=one.config.wire.up)
    with pytest.raises(MessageError, match=r"which federation\.policy does not share"):
        require_consent(plan, one.config, [key], "client-1")
    require_consent(plan.model_copy(update={"scopes": EXPERTS}), one.config, [key], "client-1")
