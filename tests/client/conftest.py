from __future__ import annotations

import pytest
import tiny_world
import torch
from tiny_house import House


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_world.save_base(folder / "bert", "bert"), tiny_world.write_rows(folder / "r.jsonl", tiny_world.rows(60))


@pytest.fixture
def house(sources, tmp_path):
    torch.set_num_threads(1)
    return lambda name="clients", **sections: House(sources, tmp_path / name, **sections)


@pytest.fixture
def one(house):
    return house()
