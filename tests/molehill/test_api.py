"""What ``import molehill`` gives."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import molehill

ROOT = Path(__file__).parents[2]


def test_everything_that_is_named_is_there_and_is_typed():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["molehill.api"]
    assert sorted(declared) == sorted(molehill.__all__)
    assert set(molehill.__all__) <= set(dir(molehill))
    for name in molehill.__all__:
        found = getattr(molehill, name)
        assert found.__doc__
        module, _, attribute = declared[name].partition(":")
        assert found is getattr(importlib.import_module(module), attribute)
    stub = (ROOT / "molehill" / "__init__.pyi").read_text()
    assert all(f" as {name}\n" in stub for name in molehill.__all__)
    assert stub.partition("__all__ = ")[2].strip() == str(molehill.__all__).replace("'", '"')
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = molehill.nothing


def test_importing_it_imports_nothing_else():
    code = "import sys, molehill; print([name for name in sys.modules if name.startswith('molehill.')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
