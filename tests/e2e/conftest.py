from __future__ import annotations

import pytest
import tiny_world
import torch

from molehill_simulation.simulate import simulate


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return tiny_world.save_base(tmp_path_factory.mktemp("base") / "bert", "bert")


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return tiny_world.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny_world.rows(60))


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """One thread, nothing left in memory by the test before; and no test can see whether a disk was synced."""
    torch.set_num_threads(1)
    tiny_world.forget()
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def config(bert, source):
    """Make a configuration; ``base`` is a section as any other."""
    return lambda **sections: tiny_world.config(bert, source, **sections)


@pytest.fixture
def finished(config, tmp_path):
    """Run to the end: ``finished("name", **sections) -> (summary, folder)``."""

    def run(name="run", **sections):
        return simulate(config(**sections), tmp_path / name), tmp_path / name

    return run
