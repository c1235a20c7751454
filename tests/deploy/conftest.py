from __future__ import annotations

import pytest
import tiny_world
from lab import NAMES, open_lab


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return tiny_world.save_base(tmp_path_factory.mktemp("base") / "bert", "bert")


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return tiny_world.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", tiny_world.rows(60))


@pytest.fixture(scope="session")
def config(base, source):
    """Three rounds over three machines."""

    def make(**sections):
        sections = {"run": {"rounds": 3}, "task": {"labels": list(tiny_world.LABELS)}} | sections
        return tiny_world.config(base, source, **sections)

    return make


@pytest.fixture(scope="module")
def lab(config, tmp_path_factory):
    """A coordinator that is up, and nobody joined."""
    with open_lab(tmp_path_factory.mktemp("lab"), config(), NAMES) as lab:
        lab.up()
        yield lab
