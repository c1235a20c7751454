"""Whatever is listed can be used: every axis has a key, and every system that is named a method behind a key."""

from __future__ import annotations

import inspect

import pytest

from molehill import registry
from molehill.config import Config, MethodRef, method_refs, parse
from molehill.decoding import options
from molehill_simulation.commands.generate import generate

_OPTIONS = {"decoding": (generate, "strategy"), "picker": (generate, "assigned")}  # of a command, by axis
_PRESETS = {"preset": "molora.preset", "federation": "federation.preset"}  # whose keys hold a plain name


def _keys():
    """Every axis with the key that names its methods, as the configuration declares them."""
    any_ = (MethodRef(name="any"),)
    sections = {
        name: section.model_copy(update=dict.fromkeys(type(section).model_fields, any_)) for name, section in Config()
    }
    return {axis: key for key, axis, _ in method_refs(Config.model_construct(**sections))} | _PRESETS


KEYS = _keys()


def test_every_axis_that_is_listed_is_named_by_a_key():
    assert set(registry.axes()) == KEYS.keys() | _OPTIONS.keys()


@pytest.mark.parametrize(
    "method", [m for m in registry.methods() if m.seeds], ids=lambda method: f"{method.axis} {method.name}"
)
def test_every_system_that_is_claimed_can_be_run(method):
    if method.axis in _OPTIONS:
        verb, option = _OPTIONS[method.axis]
        assert option in inspect.signature(verb).parameters
        assert isinstance(options.build(method.axis, method.name), method.target)
        return
    section, name = KEYS[method.axis].split(".")
    values = {"name": method.name, **({"coef": 1.0} if method.axis == "routing_loss" else {})}
    many = isinstance(getattr(getattr(Config(), section), name), tuple)
    given = method.name if method.axis in _PRESETS else [values] if many else values
    assert getattr(getattr(parse({section: {name: given}}), section), name)
