"""A base whose weights stay in their files: every layer reads its own when it runs, and lets go of them afterwards.

It gives what the model would that was loaded in float32, to the bit, and can be trained on as well. It takes the memory
of one layer, and the time to read all of them in every pass.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from molehill.molora.trial import is_numbered
from molehill.tasks.mapped import mapped, release
from molehill.tasks.weights import Stored

_LAYER = re.compile(r"^(?:.*?\.)?\d+(?=\.)")


def stand_ins(stored: Stored) -> dict[str, Tensor]:
    """Tensors of the stored shapes that take no memory, to make a model of that `stream` gives its weights."""
    return {name: torch.zeros(()).expand(place.shape) for name, place in stored.places().items()}


def stream(model: nn.Module, stored: Stored) -> bool:
    """Give a model its weights where they lie.

    Args:
        model: Made of `stand_ins`; frozen, on the CPU.
        stored: The files.

    Returns:
        False where a weight is not stored under its own name and in its own shape; the model is of no use then.
    """
    tensors = mapped(stored)
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones the first
    weights = _weights(model, names, tensors)
    if weights is None:
        return False
    parts: dict[str, list[_Weight]] = defaultdict(list)
    for name, weight in weights.items():
        weight.owner.register_parameter(weight.key, weight.stored)
        layer = _LAYER.match(name) if is_numbered(name) else None
        parts[layer[0] if layer else name.rpartition(".")[0]].append(weight)
        weight.owner.register_forward_hook(_let_go)
    for path, held in parts.items():
        module = model.get_submodule(path)
        if type(module).forward is nn.Embedding.forward:
            module.register_forward_hook(_in_full)  # a few rows of the table
            continue
        part = _Part(held)
        module.register_forward_pre_hook(part.open)
        module.register_forward_hook(part.close, always_call=True)
    return True


class _Weight(NamedTuple):
    owner: nn.Module
    key: str
    stored: nn.Parameter


def _weights(model: nn.Module, names: Mapping[int, str], tensors: Mapping[str, Tensor]) -> dict[str, _Weight] | None:
    """Every weight at every place it has, by its name there; None where one is not stored."""
    made: dict[str, nn.Parameter] = {}
    found = {}
    for path, owner in model.named_modules():
        for key, parameter in owner.named_parameters(recurse=False):
            name = names[id(parameter)]
            if name not in tensors or tensors[name].shape != parameter.shape:
                return None
            if name not in made:
                made[name] = nn.Parameter(tensors[name], requires_grad=False)
            found[f"{path}.{key}"] = _Weight(owner, key, made[name])
    return found


class _Part:
    """Weights that are read together.

    Args:
        weights: As they lie in the files.
    """

    def __init__(self, weights: list[_Weight]) -> None:
        self._weights = weights
        self._read: dict[int, Tensor] = {}  # as stored, by the address of what was read
        self._saving: saved_tensors_hooks | None = None

    def open(self, *_: Any) -> None:
        """Read them."""
        for owner, key, stored in self._weights:
            whole = _whole(stored)
            owner.register_parameter(key, whole)
            self._read[whole.untyped_storage().data_ptr()] = stored
        if torch.is_grad_enabled():  # what a backward pass needs of them it reads again
            self._saving = saved_tensors_hooks(self._pack, _unpack)
            self._saving.__enter__()

    def close(self, *_: Any) -> None:
        """Let go of them."""
        if self._saving is not None:
            self._saving.__exit__()
            self._saving = None
        for owner, key, stored in self._weights:
            owner.register_parameter(key, stored)
        self._read.clear()

    def _pack(self, saved: Tensor) -> Any:
        stored = self._read.get(saved.untyped_storage().data_ptr())
        return saved if stored is None else (stored, saved.shape, saved.stride(), saved.storage_offset())


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    stored, *view = packed
    return _whole(stored).as_strided(*view)


def _whole(stored: Tensor) -> nn.Parameter:
    whole = nn.Parameter(stored.detach().to(torch.float32, copy=True), requires_grad=False)
    release()
    return whole


def _in_full(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.float()


def _let_go(*_: Any) -> None:
    release()
