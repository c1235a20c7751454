"""How a configuration names methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from molehill import registry


class MethodRef(BaseModel):
    """A registered method by name, with its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if isinstance(value, Mapping):  # presets write tuples, TOML reads lists: equal references must compare equal
            return {key: list(item) if isinstance(item, tuple) else item for key, item in value.items()}
        return {"name": value} if isinstance(value, str) else value

    @property
    def params(self) -> dict[str, Any]:
        """The parameters given beside the name."""
        return dict(self.model_extra or {})

    def build(self, axis: str, **context: Any) -> Any:
        """The method, built with its parameters; see `molehill.registry.build`."""
        return registry.build(axis, self.name, self.params, **context)

    def declared(self, axis: str, attribute: str) -> Any:
        """What the method says of itself, whatever its parameters; see `molehill.registry.declared`."""
        return registry.declared(registry.get(axis, self.name), attribute)


class Axis:
    """Marks a `MethodRef` field with the registry axis it names."""

    def __init__(self, name: str) -> None:
        self.name = name


class LossRef(MethodRef):
    """A routing loss with its coefficient."""

    coef: float = Field(gt=0)


def ref(name: str, **params: Any) -> Any:
    """A reference, as the default value of a key."""
    return MethodRef.model_validate({"name": name, **params})


def distinct_names(refs: Sequence[MethodRef], why: str) -> None:
    """Refuse a method that is named twice.

    Args:
        refs: The methods of one key.
        why: What to say beside it.

    Raises:
        ValueError: One is.
    """
    names = [each.name for each in refs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} is there twice; {why}")


def axes_of(info: Any) -> Iterator[str]:
    """The registry axes that a field of a section names methods of."""
    yield from (item.name for item in info.metadata if isinstance(item, Axis))
    for argument in getattr(info.annotation, "__args__", ()):
        for item in getattr(argument, "__metadata__", ()):
            if isinstance(item, Axis):
                yield item.name
