"""What code may rely on in any configuration."""

from __future__ import annotations

import math
from typing import Annotated

import pytest

from molehill.config import Axis, Config, MethodRef, Section, method_refs, parse
from molehill.errors import ConfigError


class Optional(Section):
    """A section whose methods may be left out, as a later version may have one.

    Attributes:
        one: A method.
        some: Several.
    """

    one: Annotated[MethodRef, Axis("codec")] | None = None
    some: tuple[Annotated[MethodRef, Axis("codec")], ...] | None = None


class Wider(Config):
    """A configuration with such a section."""

    extra: Optional = Optional()


def test_a_method_that_is_left_out_is_no_reference():
    names = [(key, axis, ref.name) for key, axis, ref in method_refs(Wider()) if key.startswith("extra")]
    assert names == []
    named = Wider(extra=Optional(one=MethodRef(name="int8")))
    assert [(key, axis, ref.name) for key, axis, ref in method_refs(named) if key.startswith("extra")] == [
        ("extra.one", "codec", "int8")
    ]


@pytest.mark.parametrize(
    "sections",
    [
        {"round": {"norm_bound": math.inf}, "privacy": {"secure_aggregation": True}},
        {"round": {"deadline": math.inf}},
        {"train": {"lr": math.nan}},
    ],
)
def test_numbers_that_are_not_finite_are_refused(sections):
    key, value = next((f"{section}.{key}", value) for section, keys in sections.items() for key, value in keys.items())
    with pytest.raises(ConfigError, match=rf"{key}: .* Given: {value}"):
        parse(sections)


def test_a_federation_brings_the_adapter_of_its_name_unless_another_is_named():
    brought = parse({"federation": {"preset": "fedamole"}, "molora": {"experts": 4}})
    assert (brought.molora.preset, brought.molora.scorer.name, brought.molora.experts) == ("fedamole", "lowrank_dot", 4)
    assert parse(brought.model_dump(mode="json")) == brought
    assert parse({"federation": {"preset": "fedamole"}, "molora": {"preset": "mola"}}).molora.preset == "mola"
    assert parse({"federation": {"preset": "fedit"}}).molora == parse({}).molora
