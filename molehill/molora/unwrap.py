"""The base of an adapted model by itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from molehill.molora.layer import MoLoRALinear
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
    inside: dict[str, tuple[nn.Module, nn.Module]] = {
        name: (site.base, site) for name, site in model.sites.items() if isinstance(site, MoLoRALinear)
    } | {block.span.last: (block.base, block) for block in model.blocks}
    try:
        for name, (frozen, _) in inside.items():
            _put(base, name, frozen)
        for block in model.blocks:
            block.detach()
        yield base
    finally:
        for name, (_, adapted) in inside.items():
            _put(base, name, adapted)
        for block in model.blocks:
            block.attach()
        for module, forward in forwards:
            module.forward = forward
        base._forward_pre_hooks = hooks  # noqa: SLF001  (as above)


def _put(base: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(base.get_submodule(parent), last, module)
