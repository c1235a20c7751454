"""``molehill methods``: people find a method and read what it does, programs get all that is known of it."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from molehill import registry
from molehill.cli import app

TERMINAL = {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "80"}
CODE = re.compile(r"\b[SZ]\d+\b")


def methods(*words, env=None, code=0):
    result = CliRunner().invoke(app, ["methods", *words], env=env)
    assert result.exit_code == code, result.output
    return result


def test_programs_get_the_whole_registry():
    told = json.loads(methods("--json").stdout)
    assert {(m["axis"], m["name"]) for m in told} == {(m.axis, m.name) for m in registry.methods()}
    assert set(told[0]) == {"name", "axis", "paper", "url", "seeds", "summary"}


@pytest.mark.parametrize("words", [[], ["--seeds"]])
def test_people_read_them_axis_by_axis_in_80_columns(words):
    lines = methods(*words, env=TERMINAL).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    headings = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert [axis for axis in headings if axis in registry.axes()] == registry.axes()
    at = {axis: next(i for i, line in enumerate(lines) if line.split()[:1] == [axis]) for axis in registry.axes()}
    for method in registry.methods():
        line = next(line for line in lines[at[method.axis] :] if line.startswith(f"  {method.name} "))
        assert method.summary.replace("`", "").split()[0] in line
    assert bool(CODE.search("\n".join(lines))) == bool(words)


def test_an_axis_and_a_text_narrow_the_list():
    one = methods("selector").stdout
    assert "top_k" in one
    assert "int4" not in one
    found = json.loads(methods("--search", "KRUM", "--json").stdout)
    assert {method["name"] for method in found} == {"krum", "multi_krum"}
    both = json.loads(methods("codec", "--search", "krum", "--json").stdout)
    assert both == []
    assert "no method is like that" in methods("--search", "nothing of this kind").stderr
    assert "Did you mean selector" in methods("selectors", code=2).stderr
