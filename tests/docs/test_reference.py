"""The generated pages leave nothing out: no public name, no method, no command, no option."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

import molehill
import molehill_edge
from molehill_simulation.commands.generate import generate
from molehill_simulation.loaded import Loaded

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
HOST, DEVICE, COMMANDS = ((REFERENCE / name).read_text() for name in ("api.md", "api-device.md", "commands.md"))
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["molehill.commands"]


def headings(text):
    return [
        line.lstrip("# ")
        for line in re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
        if line[:1] == "#"
    ]


def parts(text, level):
    """What stands under every heading of a level, by heading."""
    found = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize(("package", "page"), [(molehill, HOST), (molehill_edge, DEVICE)])
def test_every_public_name_is_described(package, page):
    assert set(package.__all__) <= set(headings(page))


@pytest.mark.parametrize(
    ("kind", "page"), [(Loaded, HOST), (molehill_edge.Bundle, DEVICE), (molehill_edge.View, DEVICE)]
)
def test_every_method_and_property_is_described(kind, page):
    for name, member in vars(kind).items():
        if name[0] == "_" or any(hasattr(base, name) for base in kind.__bases__):
            continue
        if isinstance(member, property):
            assert f"\n| `{name}` |" in parts(page, 3)[kind.__name__]
        else:
            assert f"{kind.__name__}.{name}" in headings(page)


def test_every_argument_is_in_its_signature():
    for name, member in [
        ("load", molehill.load),
        ("simulate", molehill.simulate),
        ("Loaded.generate", Loaded.generate),
    ]:
        block = re.search(rf"^```python signature\n{name}\((.*?)^```$", HOST, re.MULTILINE | re.DOTALL)[1]
        wanted = [each for each in inspect.signature(member).parameters if each != "self"]
        assert re.findall(r"^    (\w+): ", block, re.MULTILINE) == wanted


@pytest.mark.parametrize("page", [HOST, DEVICE], ids=["host", "device"])
def test_links_within_a_page_lead_somewhere(page):
    anchors = {re.sub(r"[^a-z0-9_ -]", "", line.lower()).replace(" ", "-") for line in headings(page)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_every_command_and_option_is_described():
    described = parts(COMMANDS, 2)
    assert {f"molehill {name.replace('.', ' ')}" for name in POINTS} <= described.keys()
    rows = [line for line in described["molehill generate"].splitlines() if line.startswith("| `")]
    assert len(rows) == len(inspect.signature(generate).parameters)
