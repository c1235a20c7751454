"""The owner's policy: a TOML file on the owner's machine with what a coordinator may ask of it.

Whatever is left out counts as its careful default, and unknown keys are errors. Nothing that a server sends changes
the file; it is read again for every run.
"""

from __future__ import annotations

import hashlib
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tomli_w
from pydantic import AfterValidator, Field, ValidationError

from molehill import evidence, files, registry, toml_file
from molehill.config import Section
from molehill.errors import ConfigError
from molehill.wire.keys import KINDS as TENSORS

_HEAD = """\
# What the owner of this machine's rows lets a run do: molehill client join --policy FILE. Whatever a run or a plan asks
# for beyond it is refused, with the line of this file. It is read again for every run.
"""

_COLUMNS = tuple(
    dict.fromkeys(name for kind in registry.methods("task") for name in registry.declared(kind, "columns"))
)
_CODECS = tuple(method.name for method in registry.methods("codec"))
_CHOICES = {"tell": {kind.name: kind.meaning for kind in evidence.KINDS}}


def _known(what: str, names: tuple[str, ...]) -> AfterValidator:
    def check(given: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"there is no {what} {unknown[0]!r}; known are {', '.join(names)}")
        return given

    return AfterValidator(check)


class Protection(Section):
    """What must stand between this machine's update and whoever reads it.

    Attributes:
        needs: ``secure-aggregation``, ``clip`` (a limit on the update, ``privacy.clip``), ``either`` of them, ``both``,
            or ``nothing``.
        clip: Largest ``privacy.clip`` that counts as one.
    """

    needs: Literal["secure-aggregation", "clip", "either", "both", "nothing"] = "either"
    clip: float = Field(default=10.0, gt=0)


class Base(Section):
    """The base models that may be loaded.

    Attributes:
        models: Names as a run gives them in ``base.model``; ``*`` stands for any part of a name. With ``client join
            --base`` the owner has chosen a folder, and names do not count.
        digests: SHA-256 of the weights, as ``molehill client status`` shows them; empty for any weights under these
            names.
    """

    models: tuple[str, ...] = ()
    digests: tuple[Annotated[str, Field(pattern="^[0-9a-f]{64}$")], ...] = ()


class Data(Section):
    """The rows.

    Attributes:
        columns: Names in the owner's file of the columns that may be read; and ``molehill.group`` where the file has
            one, which says what stays together, and is neither learnt nor told.
    """

    columns: tuple[str, ...] = _COLUMNS


class Share(Section):
    """What may leave the machine.

    Attributes:
        tensors: Kinds of tensors whose changes may be sent: ``A`` and ``B`` of experts, ``dense`` for the
            tensors of experts of any other kind, ``gate`` for routers, ``head`` for the classification head.
        codecs: How they may be encoded.
        tell: Kinds of evidence that may be told beside them.
    """

    tensors: Annotated[tuple[str, ...], _known("kind of tensor", TENSORS)] = TENSORS
    codecs: Annotated[tuple[str, ...], _known("codec", _CODECS)] = _CODECS
    tell: Annotated[tuple[str, ...], _known("kind of evidence", tuple(kind.name for kind in evidence.KINDS))] = (
        *("rows", "time", "scores", "choice", "answers", "baselines"),
    )


class Limits(Section):
    """How much a run may ask for.

    Attributes:
        rounds: Most rounds of a run.
        steps: Most optimiser steps of a round, and of fitting the personal parts; for a candidate that starts over
            (``personal.candidates``) as many as in all ``rounds``.
        rank: Highest rank of an expert of any kind, whatever the kind calls it (the width of a bottleneck).
    """

    rounds: int = Field(default=100, ge=1)
    steps: int = Field(default=100, ge=1)
    rank: int = Field(default=32, ge=1)


class Policy(Section):
    """What an owner agrees to."""

    protection: Protection = Protection()
    base: Base = Base()
    data: Data = Data()
    share: Share = Share()
    limits: Limits = Limits()


@dataclass(frozen=True)
class Word:
    """A policy as it was read; equal when its files are.

    Attributes:
        policy: What it says.
        lines: Where it says so.
        digest: SHA-256 (hex) of the file.
    """

    policy: Policy = field(compare=False)
    lines: toml_file.Lines = field(compare=False)
    digest: str


def read(path: Path) -> Word:
    """Read a policy.

    Raises:
        ConfigError: The file cannot be read or parsed, or a key or value is wrong.
    """
    values, lines = toml_file.read(path, "policy")
    try:
        policy = Policy.model_validate(values)
    except ValidationError as error:
        raise toml_file.explain(error, Policy, values, lines) from None
    return Word(policy, lines, hashlib.sha256(lines.text.encode()).hexdigest())


def careful() -> str:
    """The text of a careful policy, with every key and what it means."""
    parts = [_HEAD]
    for name, info in Policy.model_fields.items():
        section = info.get_default(call_default_factory=True)
        meanings = toml_file.meanings(type(section))
        parts.append(f"\n[{name}]\n")
        for key, value in section.model_dump(mode="json").items():
            said = [meanings.get(key, ""), *(f"  {word}: {what}" for word, what in _CHOICES.get(key, {}).items())]
            parts += [f"# {line}\n" for text in said for line in textwrap.wrap(text, 118)]
            parts.append(_written(key, value))
    return "".join(parts)


def _written(key: str, value: object) -> str:
    """A key with its value, on one line where that is short enough."""
    if not isinstance(value, list):
        return tomli_w.dumps({key: value})
    each = ", ".join(tomli_w.dumps({"x": item}).removeprefix("x = ").strip() for item in value)
    line = f"{key} = [{each}]\n"
    return line if len(line) <= 120 else f"{key} = [\n{textwrap.indent(textwrap.fill(each, 116), '    ')},\n]\n"


def begin(path: Path) -> None:
    """Write a careful policy where there is none.

    Raises:
        ConfigError: There is a file, or it cannot be written.
    """
    try:
        files.write(path, careful().encode(), replace=False)
    except FileExistsError:
        raise ConfigError("there is a file already", where=str(path), mend="Remove it, or name another.") from None
    except OSError as error:
        what = f"cannot write the policy: {error.strerror}"
        raise ConfigError(what, where=str(path), mend="Name another place.") from None
