"""How many processor cores there are to use."""

from __future__ import annotations

import os

import pytest

from molehill_simulation import engine


@pytest.mark.parametrize(
    ("said", "cores"), [("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 16), ("", 16)]
)
def test_a_container_that_gives_fewer_cores_than_it_shows(said, cores, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(said)
    monkeypatch.setattr(engine, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert engine.cores() == cores


def test_there_may_be_no_quota_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_QUOTA", tmp_path / "none")
    assert engine.cores() >= 1
