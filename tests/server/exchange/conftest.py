from __future__ import annotations

import pytest
from exchange_house import House, Wire
from tiny_pki import Authority


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="session")
def identities(authority):
    """The identity folder of a machine by name, made once."""
    return {name: authority.issue(name) for name in ("server", "lab-1", "lab-2")}


@pytest.fixture
def house(tmp_path, identities):
    house = House(tmp_path / "exchange", identities)
    yield house
    house.close()


@pytest.fixture
def serving(house):
    """A house that serves in a thread and lets lab-1 write."""
    house.give()
    house.start()
    return house


@pytest.fixture
def wire(serving):
    wire = Wire(serving.port)
    yield wire
    serving.close()
    wire.close()
