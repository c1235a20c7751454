from __future__ import annotations

import pytest

from molehill.errors import IdentityError, MessageError
from molehill_server.exchange.grants import Grant, Grants


def test_grants_are_given_read_and_taken(tmp_path):
    grants = Grants(tmp_path)
    one = Grant(run="r", round=1, read=["a" * 64], write=True, max_bytes=5)
    grants.give("lab-1", one)
    assert Grants(tmp_path).of("lab-1") == one
    grants.renew({"lab-2": one})
    assert grants.of("lab-1") is None
    assert grants.all() == {"lab-2": one}
    grants.take("lab-2")
    grants.take("lab-2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../lab", "", ".hidden", "a/b", "x" * 65])
def test_a_name_never_becomes_another_path(tmp_path, name):
    for call in (Grants(tmp_path).of, Grants(tmp_path).take, lambda node: Grants(tmp_path).give(node, None)):
        with pytest.raises(IdentityError, match="cannot be the name of a node"):
            call(name)


def test_a_damaged_grant_is_said_and_shows_in_all(tmp_path):
    (tmp_path / "lab-1.json").write_text('{"run": "r", "round": 1, "colour": 2}')
    with pytest.raises(MessageError, match="the grant is damaged"):
        Grants(tmp_path).of("lab-1")
    assert Grants(tmp_path).all() == {"lab-1": None}
