"""A whole run: all sections, what presets fill in, and which methods it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import tomli_w
from pydantic import field_validator, model_validator

from molehill import registry
from molehill.config.methods import MethodRef, axes_of
from molehill.config.sections import (
    Base,
    Data,
    Engine,
    Evaluate,
    Federation,
    MoLoRA,
    Personal,
    Privacy,
    Rounds,
    Run,
    Scenario,
    Section,
    Task,
    Train,
    Wire,
)
from molehill.errors import ConfigError


class Config(Section):
    """A whole run."""

    run: Run = Run()
    base: Base = Base()
    task: Task = Task()
    data: Data = Data()
    molora: MoLoRA = MoLoRA()
    personal: Personal = Personal()
    train: Train = Train()
    federation: Federation = Federation()
    round: Rounds = Rounds()
    wire: Wire = Wire()
    privacy: Privacy = Privacy()
    scenario: Scenario = Scenario()
    evaluate: Evaluate = Evaluate()
    engine: Engine = Engine()

    @field_validator("molora", mode="before")
    @classmethod
    def _molora_preset(cls, value: Any) -> Any:
        return _expand(value, "preset")

    @field_validator("federation", mode="before")
    @classmethod
    def _federation_preset(cls, value: Any) -> Any:
        return _expand(value, "federation")

    @model_validator(mode="before")
    @classmethod
    def _adapter_of_the_federation(cls, values: Any) -> Any:
        return _with_adapter(values)

    @model_validator(mode="before")
    @classmethod
    def _objective_of_the_task(cls, values: Any) -> Any:
        return _with_objective(values)

    @model_validator(mode="after")
    def _rows_to_judge_by(self) -> Config:
        if self.evaluate.split == "validation" and not self.data.validation_fraction:
            raise ConfigError(
                "evaluate.split: there are no validation rows, since data.validation_fraction sets none aside",
                where="evaluate.split",
                mend='Set data.validation_fraction, to 0.2 say, or evaluate.split = "test".',
            )
        return self

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the resolved configuration, less what does not change the run itself."""
        return hashlib.sha256(json.dumps(self.substance, sort_keys=True).encode()).hexdigest()

    @property
    def substance(self) -> dict[str, Any]:
        """The resolved values on which results depend: all but ``engine``."""
        return self.model_dump(mode="json", exclude={"engine"})

    def to_toml(self) -> str:
        """The resolved configuration as TOML; loading it gives an equal `Config`."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _expand(value: Any, axis: str) -> Any:
    """Fill the keys of a section from its preset."""
    if not isinstance(value, Mapping) or not isinstance(value.get("preset"), str):
        return value
    return {**registry.build(axis, value["preset"]), **value}


def _with_adapter(values: Any) -> Any:
    """Name the adapter of a federation's preset, which has the same name, where no preset of an adapter is named."""
    federation, molora = (
        values.get(name, {}) if isinstance(values, Mapping) else None for name in ("federation", "molora")
    )
    if not isinstance(federation, Mapping) or not isinstance(molora, Mapping) or "preset" in molora:
        return values
    name = federation.get("preset")
    if all(method.name != name for method in registry.methods("preset")):
        return values
    return {**values, "molora": {**molora, "preset": name}}


def _with_objective(values: Any) -> Any:
    """Fill in the objective of a kind of task that has one of its own, where none is named."""
    task, train = (values.get(name, {}) if isinstance(values, Mapping) else None for name in ("task", "train"))
    if not isinstance(task, Mapping) or not isinstance(train, Mapping) or "objective" in train:
        return values
    known = next((method for method in registry.methods("task") if method.name == task.get("kind")), None)
    objective = None if known is None else registry.declared(known, "objective")
    return values if objective is None else {**values, "train": {**train, "objective": objective}}


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def method_refs(config: Config) -> Iterator[tuple[str, str, MethodRef]]:
    """Yield ``(dotted key, axis, reference)`` for every method a configuration names, not for what is left out."""
    for section_name in type(config).model_fields:
        section = getattr(config, section_name)
        for name, info in type(section).model_fields.items():
            value = getattr(section, name)
            for axis in axes_of(info):
                for ref in value if isinstance(value, tuple) else (value,):
                    if ref is not None:  # a name alone where there is nothing beside it
                        yield f"{section_name}.{name}", axis, ref if isinstance(ref, MethodRef) else MethodRef(name=ref)
