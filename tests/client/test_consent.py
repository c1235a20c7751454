"""What a plan may ask of a tensor that nobody has thought of yet."""

from __future__ import annotations

import pytest
from tiny_house import EXPERTS

from molehill.errors import MessageError
from molehill.wire.keys import Key
from molehill_client.consent import require_consent


@pytest.mark.parametrize("role", ["scale", "scale.x", "ranks", "__class__"])
def test_of_a_kind_that_the_policy_does_not_know_nothing_is_shared(house, role):
    one = house()
    key = Key("site", "e0", role)
    plan = one.plan(0, scopes=((f"*/{role}", "shared"), *EXPERTS), codec=one.config.wire.up)
    with pytest.raises(MessageError, match=r"which federation\.policy does not share"):
        require_consent(plan, one.config, [key], "client-1")
    require_consent(plan.model_copy(update={"scopes": EXPERTS}), one.config, [key], "client-1")
