"""Finding the modules to adapt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from molehill.errors import ModelError
from molehill.molora.interfaces import Site
from molehill.molora.trial import adaptable, is_numbered, layer_of, likeness, linears, stack_of

_MATRIX = 2  # dimensions


@dataclass(frozen=True)
class Choice:
    """What of a base is adapted, and what is not though the targets name it.

    Attributes:
        sites: The adapted linears, in the order of the model's modules.
        remarks: Sentences about weights of the layers that stay as they are; empty when there are none.
    """

    sites: list[Site]
    remarks: tuple[str, ...]


def find_sites(model: nn.Module, targets: Sequence[str] | str, layers: Sequence[int] | None = None) -> list[Site]:
    """The sites of `choose`."""
    return choose(model, targets, layers).sites


def choose(model: nn.Module, targets: Sequence[str] | str, layers: Sequence[int] | None = None) -> Choice:
    """Find the linears to adapt, and what is left out.

    Args:
        model: The base model.
        targets: ``all-linear`` (every linear inside a numbered transformer layer that text reaches), or patterns; a
            pattern matches a module when it equals the last part of its path or, as a regular expression, matches an
            end of the path that starts at a dot (or the whole path).
        layers: Indices of the transformer layers to keep; all when None.

    Raises:
        ModelError: A pattern is no regular expression, or it, or the choice of layers, matches nothing; or the model
            does not run.
    """
    every = linears(model)
    reached = list(adaptable(model))
    if not reached:
        raise ModelError("the base has no layers with linear modules that text reaches", mend="Give another base.")
    if isinstance(targets, str):
        targets = (r".*",) if targets == "all-linear" else (targets,)
    chosen: set[str] = set()
    for pattern in targets:
        try:
            hits = {name for name in reached if matches(pattern, name)}
        except re.error as error:
            raise ModelError(
                f"{pattern!r} is no regular expression: {error}",
                where="molora.targets",
                mend="Give names of modules; in a regular expression put a backslash before ( [ * + ? and the like.",
            ) from None
        if not hits:
            raise _no_hit(model, pattern, every, reached)
        chosen |= hits
    depth = 1 + max(layer_of(name) for name in reached)
    sites = [
        Site(layer_of(name), name, depth, *shape_of(every[name]))
        for name in reached
        if name in chosen and (layers is None or layer_of(name) in layers)
    ]
    _require_one_place(model, sites)
    if not sites:
        raise ModelError(
            f"layers {list(layers or ())} hold no target", where="molora.layers", mend=f"The model has {depth} layers."
        )
    return Choice(sites, _remarks(model, targets, layers, every.keys(), set(reached)))


def _require_one_place(model: nn.Module, sites: Iterable[Site]) -> None:
    """Refuse a linear that is an attribute of two modules, or twice of one: at one of them it would stay as it is.

    Raises:
        ModelError: There is one.
    """
    names = {id(model.get_submodule(site.name)): site.name for site in sites}
    for path, parent in model.named_modules():
        for last, module in parent._modules.items():  # noqa: SLF001  (named_children leaves out what comes twice)
            name = names.get(id(module))
            place = f"{path}.{last}".removeprefix(".")
            if name is not None and place != name:
                raise ModelError(
                    f"{name} and {place} are one module, which cannot be adapted at one of them alone",
                    where="molora.targets",
                    mend="Leave them out of molora.targets, or give another base.",
                )


def _no_hit(model: nn.Module, pattern: str, every: Iterable[str], reached: Iterable[str]) -> ModelError:
    """Why a pattern matches nothing that can be adapted."""
    kinds = sorted({name.rpartition(".")[2] for name in reached})
    mend = f"Linear modules in its layers: {', '.join(kinds) or 'none'}."
    unreached = sorted(name for name in every if matches(pattern, name))
    if unreached:
        what = f"target {pattern!r} matches only modules that text never reaches, such as {unreached[0]}"
        return ModelError(what, where="molora.targets", mend=mend)
    weights = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and any(matches(pattern, part) for part in (name, name.rpartition(".")[0]))
    }
    if not weights:
        return ModelError(
            f"target {pattern!r} matches no linear module of the base model", where="molora.targets", mend=mend
        )
    name, parameter = next(iter(weights.items()))
    shape = " x ".join(map(str, parameter.shape))
    if parameter.dim() > _MATRIX:
        why = f"is one parameter of {shape} for all experts of the base, not a linear module"
    elif isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D):
        why = "lies outside the transformer layers"
    else:
        why = f"is a parameter of {shape}, not a linear module"
    return ModelError(
        f"target {pattern!r} matches {name}, which {why}, and cannot be adapted", where="molora.targets", mend=mend
    )


def _remarks(
    model: nn.Module, targets: Sequence[str], layers: Sequence[int] | None, every: Collection[str], reached: set[str]
) -> tuple[str, ...]:
    """What the targets name in the layers and nothing can adapt: weights of no linear, linears that text misses."""
    alive = {stack_of(name) for name in reached}
    total, bare, silent = 0, Counter[str](), Counter[str]()
    for name, parameter in model.named_parameters():
        if parameter.dim() < _MATRIX or not is_numbered(name) or (layers and layer_of(name) not in layers):
            continue
        module, stack = name.rpartition(".")[0], stack_of(name)
        total += parameter.numel() if stack in alive else 0
        if module in reached or not any(matches(pattern, part) for pattern in targets for part in (module, name)):
            continue
        if stack not in alive:
            silent[stack] += 1
        elif module in every:
            silent[likeness(module)] += 1
        else:
            bare[likeness(name)] += parameter.numel()
    remarks = []
    if bare:
        left = bare.total()
        remarks.append(
            f"{left:,} of the {total:,} weights in the layers ({left / total:.0%}) are not adapted, since they lie in "
            f"no linear module: {', '.join(sorted(bare))}"
        )
    if silent:
        parts = ", ".join(f"{count} of {name}" for name, count in sorted(silent.items()))
        remarks.append(f"weights that text never reaches are not adapted: {parts}")
    return tuple(remarks)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of ``molora.targets`` means a module; see `choose`."""
    return name.rpartition(".")[2] == pattern or re.search(rf"(?:^|\.)(?:{pattern})$", name) is not None


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Features that a linear takes, and those that it gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight  # Conv1D stores [d_in, d_out]
    return int(weight.shape[0]), int(weight.shape[1])  # type: ignore[index]  # modules hide their attributes' types
