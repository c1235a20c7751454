"""What code may rely on in any configuration."""

from __future__ import annotations

from typing import Annotated

from molehill.config import Axis, Config, MethodRef, Section, method_refs


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
