"""The base of an adapted model by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from molehill.molora.model import MoLoRAModel


@contextmanager
def unwrapped(model: MoLoRAModel) -> Iterator[Any]:
    """The base as it was before `molehill.molora.build.wrap`, with the same weights in the same memory.

    Args:
        model: An adapted model; it must not run while the context is open.
    """
    base = model.base
    hooks, base._forward_pre_hooks = base._forward_pre_hooks, OrderedDict()  # noqa: SLF001  (torch lists them nowhere else)
    forwards = [(module, vars(module).pop("forward")) for module in base.modules() if "forward" in vars(module)]
    try:
        for name, site in model.sites.items():
            _put(base, name, site.base)
        yield base
    finally:
        for name, site in model.sites.items():
            _put(base, name, site)
        for module, forward in forwards:
            module.forward = forward
        base._forward_pre_hooks = hooks  # noqa: SLF001  (as above)


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(base.get_submodule(parent), last, module)
