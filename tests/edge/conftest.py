from __future__ import annotations

import shutil

import pytest
from edge_attacks import Shown, shown


@pytest.fixture(scope="session")
def shown_once(tmp_path_factory):
    return shown(tmp_path_factory.mktemp("shown")).folder


@pytest.fixture
def empty(shown_once, tmp_path):
    """An owner who shows a version, and a device that has pulled none."""
    shutil.copytree(shown_once, tmp_path / "world", symlinks=True)
    return Shown(tmp_path / "world")
