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
    headings = {line.split()[0]: i for i, line in enumerate(lines) if line and not line.startswith(" ")}
    at = {axis: i for axis, i in headings.items() if axis in registry.axes()}
    assert list(at) == registry.axes()
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


def test_into_a_pipe_a_method_is_a_line_whatever_it_says():
    lines = [" ".join(line.split()) for line in methods("--seeds").stdout.splitlines()]
    for method in registry.methods():
        cells = method.name, method.summary.replace("`", ""), method.paper, *method.seeds
        assert " ".join(" ".join(cells).split()) in lines
    narrow = methods(env={"COLUMNS": "70"}).stdout.splitlines()  # asked for, so also there
    assert 60 < max(map(len, narrow)) <= 70


def test_codes_are_searched_where_they_are_shown():
    coded = next(method for method in registry.methods() if method.seeds)
    (code, *_) = coded.seeds
    assert json.loads(methods("--search", code, "--json").stdout) == []
    found = json.loads(methods("--search", code, "--seeds", "--json").stdout)
    assert (coded.axis, coded.name) in {(method["axis"], method["name"]) for method in found}


@pytest.mark.parametrize(
    ("word", "axes"),
    [
        ("router", "scorer, selector"),
        ("Gating", "scorer, selector"),
        ("rules", "rule"),
        ("quantization", "codec"),
        ("optimizer", "server_opt"),
        ("aggregator", "rule, space"),
        ("losses", "objective, routing_loss"),
        ("adapters", "expert"),
        ("nothing like it", ", ".join(registry.axes())),
    ],
)
def test_a_word_of_the_field_leads_to_its_axis(word, axes):
    assert f"Did you mean {axes}?" in " ".join(methods(word, code=2).stderr.split())


def test_every_axis_says_what_else_it_is_called():
    assert all(registry.words(axis) for axis in registry.axes())
    assert not {word for axis in registry.axes() for word in registry.words(axis)} & {*registry.axes()}
