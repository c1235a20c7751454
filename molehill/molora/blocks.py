"""Banks beside a whole block of the base, and the steps in which a topology sends tokens through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molehill.errors import ModelError
from molehill.molora.adapted import Adapted
from molehill.molora.banks import Bank
from molehill.molora.interfaces import LogitTransform, RouteContext, Site
from molehill.molora.routes import RouteGroup
from molehill.molora.steps import BlockTopology, Step, Stepped


class Span(NamedTuple):
    """A feed-forward block of a base.

    Attributes:
        site: Its place; its name is what the names of its linears begin with.
        first: Path of the module whose input is the block's.
        last: Path of the module whose output is the block's; the same where the block is one module.
        experts: How many experts of its own the block has; 0 for one that is no mixture.
    """

    site: Site
    first: str
    last: str
    experts: int = 0


class BlockBank(Adapted):
    """A bank beside a block, with the routers of the steps that go through it.

    Args:
        span: The block.
        site: Its place, whose name is its own.
        bank: Its experts, shared ones first.
        groups: The routers, in the order of their steps; none where all experts are always on.
        parts: As of `Adapted`.
    """

    def __init__(self, span: Span, site: Site, bank: Bank, groups: Sequence[RouteGroup], **parts: Any) -> None:
        super().__init__(site, bank, group=groups[0] if groups else None, **parts)
        self._span = span
        # held outside the module tree: they belong to the model
        self.__dict__["_groups"] = tuple(groups)

    @property
    def groups(self) -> tuple[RouteGroup, ...]:
        """Its routers."""
        found: tuple[RouteGroup, ...] = self.__dict__["_groups"]
        return found

    @property
    def of_block(self) -> bool:
        """It does."""
        return True

    @property
    def span(self) -> tuple[str, str]:
        """The modules between which it lies."""
        return self._span.first, self._span.last


class Block(nn.Module):
    """The last module of a frozen block, with what a topology adds to the block's output.

    Args:
        base: That module; frozen.
        first: The module whose input is the block's; None where it is the same.
        own: The block's own experts, which are called with tokens, places and weights of those chosen; None where it
            has none.
        span: The block.
        topology: In which steps tokens go through the banks.
        steps: These steps.
        banks: The banks by number.
        groups: The router of every step, or None.
    """

    def __init__(
        self,
        base: nn.Module,
        first: nn.Module | None,
        own: nn.Module | None,
        span: Span,
        topology: BlockTopology,
        steps: Sequence[Step],
        banks: Sequence[BlockBank],
        groups: Sequence[RouteGroup | None],
    ) -> None:
        super().__init__()
        self.base, self.span, self.topology, self.steps = base, span, topology, tuple(steps)
        self.banks = nn.ModuleList(banks)
        # held outside the module tree: one is a module of the base, the others belong to the model
        self.__dict__["watched"], self.__dict__["groups"] = (first, own), tuple(groups)
        self._hooks: list[Any] = []
        self._read: Tensor | None = None
        self._route: Tensor | None = None
        self.attach()

    @property
    def adapted(self) -> tuple[BlockBank, ...]:
        """The banks by number."""
        return tuple(bank for bank in self.banks if isinstance(bank, BlockBank))

    @property
    def routers(self) -> tuple[RouteGroup | None, ...]:
        """The router of every step."""
        found: tuple[RouteGroup | None, ...] = self.__dict__["groups"]
        return found

    def attach(self) -> None:
        """See the inputs of the block, and which of its own experts it chooses."""
        first, own = self.__dict__["watched"]
        if first is not None and not self._hooks:
            self._hooks.append(first.register_forward_pre_hook(self._see))
        if own is not None and not self._hooks:
            self._hooks.append(own.register_forward_pre_hook(self._overhear, with_kwargs=True))

    def detach(self) -> None:
        """Leave the base as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._read, self._route = [], None, None

    def _see(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._read = args[0]

    def _overhear(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, places, weights = (*args, *(kwargs[name] for name in ("top_k_index", "top_k_weights")[len(args) - 1 :]))
        nobody = weights.new_zeros(len(weights), self.span.experts, dtype=torch.float32)
        self._route = nobody.scatter_add(-1, places, weights.float())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the last module gives, and what the banks add: ``[B, T, d]``, or a tuple that begins with it.

        Raises:
            ModelError: The block's first module did not run.
        """
        out = self.base(x, *args, **kwargs)
        read, self._read = x if self.__dict__["watched"][0] is None else self._read, None
        route, self._route = self._route, None
        bank = self.adapted[0]
        if not bank.state.enabled:
            return out
        if read is None:
            raise ModelError(f"{self.span.last} runs without {self.span.first}", mend="Choose another molora.topology.")
        y0 = out[0] if isinstance(out, tuple) else out
        for group in self.routers:
            if group is not None:
                group.base_route = None if route is None else route.view(*_in_rows(read).shape[:2], -1)
        y = y0 + self._delta(_in_rows(read), _in_rows(y0), bank.next_call()).to(y0.dtype).view(y0.shape)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    def _delta(self, entered: Tensor, y0: Tensor, call: int) -> Tensor:
        def run(step: int, x: Tensor, share: Tensor | None = None) -> Stepped:
            (number, _, parts, _), group = self.steps[step], self.routers[step]
            bank = self.adapted[number]
            z = cut(x, parts)
            weights = bank.weigh(group, z, call, None if share is None else cut(share, parts))
            delta = bank.mixer(bank.bank, bank.dropout(z), cut(y0, parts), weights)
            return Stepped(delta.reshape(x.shape), None if group is None else weights[..., bank.shared :])

        return self.topology.delta(run, entered, y0)


def cut(x: Tensor, parts: int) -> Tensor:
    """Tokens ``[B, T, d]`` in parts of equal width, one after another: ``[B, T * parts, d / parts]``.

    A share ``[B, T, 1]`` is that of every part.
    """
    if parts == 1:
        return x
    if x.shape[-1] == 1:
        return x.repeat_interleave(parts, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1] // parts)


def _in_rows(x: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.flatten(0, -2).unsqueeze(0)


class From(LogitTransform):
    """Closes the experts before one to a router.

    Args:
        first: The first that stays open.
    """

    by_logits = True

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, z: Tensor, ctx: RouteContext) -> Tensor:
        """Return logits of the same shape."""
        del ctx
        closed = torch.arange(z.shape[-1], device=z.device) < self.first
        return z.masked_fill(closed, torch.finfo(z.dtype).min)
