"""Finding the modules to adapt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from molehill.errors import ModelError
from molehill.molora.interfaces import Site

_INDEX = re.compile(r"\.(\d+)\.")


def find_sites(model: nn.Module, targets: Sequence[str] | str, layers: Sequence[int] | None = None) -> list[Site]:
    """Return the adapted linears in the order of the model's modules.

    Args:
        model: The base model.
        targets: ``all-linear`` (every linear inside a numbered transformer layer), or patterns; a pattern matches a
            module when it equals the last part of its path or, as a regular expression, matches an end of the path
            that starts at a dot (or the whole path).
        layers: Indices of the transformer layers to keep; all when None.

    Raises:
        ModelError: A pattern is no regular expression, or it, or the choice of layers, matches nothing.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and _INDEX.search(f".{name}.")
    }
    if isinstance(targets, str):
        targets = (r".*",) if targets == "all-linear" else (targets,)
    chosen: set[str] = set()
    for pattern in targets:
        try:
            hits = {name for name in linears if _matches(pattern, name)}
        except re.error as error:
            raise ModelError(
                f"{pattern!r} is no regular expression: {error}",
                where="molora.targets",
                mend="Give names of modules; in a regular expression put a backslash before ( [ * + ? and the like.",
            ) from None
        if not hits:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(
                f"target {pattern!r} matches no linear module of the base model",
                where="molora.targets",
                mend=f"Linear modules in its layers: {', '.join(kinds) or 'none'}.",
            )
        chosen |= hits
    depth = 1 + max(_layer(name) for name in linears)
    sites = []
    for name, module in linears.items():
        if name in chosen and (layers is None or _layer(name) in layers):
            d_in, d_out = _shape(module)
            sites.append(Site(_layer(name), name, depth, d_in, d_out))
    if not sites:
        raise ModelError(
            f"layers {list(layers or ())} hold no target", where="molora.layers", mend=f"The model has {depth} layers."
        )
    return sites


def _matches(pattern: str, name: str) -> bool:
    return name.rpartition(".")[2] == pattern or re.search(rf"(?:^|\.)(?:{pattern})$", name) is not None


def _layer(name: str) -> int:
    found = _INDEX.search(f".{name}.")
    assert found is not None
    return int(found[1])


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight  # Conv1D stores [d_in, d_out]
    return int(weight.shape[0]), int(weight.shape[1])  # type: ignore[index]  # modules hide their attributes' types
