"""What is cheap to compute is computed again in the backward pass instead of being kept.

Between its products a transformer has norms, activations and gates: little work, but outputs as large as any. An
adapted linear would keep such an output for the gradient of A. Here the linear keeps what the output was made from,
which the norm or activation keeps for its own gradient anyway, and makes it again.

Norms and activations that are one kernel keep their own backward; `_note` only remembers how their output was made.
RMS norms get one of one kernel (`molehill.molora.norms`). What else is several operations (an activation; the gated
product of a Llama's feed-forward block, which keeps the activation and two factors) becomes one function, `_Again`,
that keeps its inputs alone. Nothing changes in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import activations

from molehill.molora.norms import RMSForm, form_of, rms_norm

_NORMS = ("LayerNorm", "RMSNorm")
_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
# One kernel that keeps its input, and activations of several operations.
_ONE = (
    nn.LayerNorm,
    nn.GELU,
    nn.SiLU,
    activations.GELUActivation,
    activations.GELUTanh,
    activations.SiLUActivation,
)
_SEVERAL = (
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.QuickGELUActivation,
    activations.AccurateGELUActivation,
    activations.MishActivation,
    activations.ReLUSquaredActivation,
)


class Recipe:
    """Makes a tensor again once for all of its readers.

    Args:
        function: Its inputs to the tensor.
        graph: Record the function's own graph, for a reader that needs its gradient.
    """

    __slots__ = ("_function", "_graph", "_left", "_made", "readers")

    def __init__(self, function: Callable[..., Tensor], *, graph: bool) -> None:
        self.readers = 0
        self._function, self._graph, self._left = function, graph, 0
        self._made: tuple[list[Tensor], Tensor] | None = None

    def make(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], Tensor]:
        """The leaves that stand for the inputs, and the tensor; kept until all readers of a pass had it."""
        if self._made is None:
            leaves = [tensor.detach().requires_grad_(self._graph) for tensor in inputs]
            with torch.set_grad_enabled(self._graph):
                self._made = leaves, self._function(*leaves)
            self._left = self.readers
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made


@dataclass(frozen=True)
class Source:
    """How a tensor was made; shared by all who are to make it again.

    Attributes:
        inputs: What it was made from. Whoever makes it again keeps these in its own graph node, where autograd lets go
            of them when the pass is over.
        recipe: Makes it from them.
        versions: How often the tensor and its inputs had been written to by then.
    """

    inputs: tuple[Tensor, ...]
    recipe: Recipe
    versions: tuple[int, ...]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipe: Recipe, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        recipe.readers += 1
        ctx.recipe = recipe
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves, made = ctx.recipe.make(ctx.saved_tensors)
        # the graph is kept for another walk over it; it goes with the last reader
        return None, None, *torch.autograd.grad(made, leaves, grad, retain_graph=True)


_SOURCES = WeakTensorKeyDictionary()


def source_of(x: Tensor) -> Source | None:
    """How ``x`` was made, when it is cheap to do again and still gives the same."""
    source: Source | None = _SOURCES.get(x)  # type: ignore[no-untyped-call]  # untyped torch
    return source if source is not None and source.versions == _versions(x, *source.inputs) else None


def _remember(y: Tensor, recipe: Recipe, inputs: tuple[Tensor, ...]) -> None:
    detached = tuple(tensor.detach() for tensor in inputs)
    _SOURCES[y] = Source(detached, recipe, _versions(y, *inputs))


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; of one made in inference mode nobody knows, and it is 0."""
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  (torch tells in-place changes nowhere else)


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(map(version_of, tensors))


def _note(function: Callable[..., Tensor], *inputs: Tensor, **extras: Any) -> Tensor:
    """``function(*inputs)``, remembering how it was made."""
    y = function(*inputs, **extras)
    if not extras and _tensors(y, *inputs) and y.requires_grad:
        _remember(y, Recipe(function, graph=False), inputs)
    return y


def _again(function: Callable[..., Tensor], *inputs: Tensor, **extras: Any) -> Tensor:
    """``function(*inputs)``, keeping the inputs alone."""
    if extras or not _tensors(*inputs):  # a gate or a residual beside the input: not one of ours
        return function(*inputs, **extras)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)):
        return function(*inputs)
    recipe = Recipe(function, graph=True)
    y: Tensor = _Again.apply(recipe, function, *inputs)  # type: ignore[no-untyped-call]  # untyped torch
    _remember(y, recipe, inputs)
    return y


def _normed(norm: nn.Module, form: RMSForm, function: Callable[..., Tensor], *inputs: Any, **extras: Any) -> Tensor:
    """The forward pass ``function`` of an RMS norm, with a backward of one kernel."""
    weight: Tensor = norm.weight  # type: ignore[assignment]  # modules hide their attributes' types
    if extras or len(inputs) != 1 or weight.requires_grad or not (torch.is_grad_enabled() and inputs[0].requires_grad):
        return function(*inputs, **extras)
    y = rms_norm(inputs[0], weight, form, function)
    _remember(y, Recipe(function, graph=False), inputs)
    return y


def _tensors(*values: Any) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _gated(block: nn.Module, x: Tensor, *rest: Any, **extras: Any) -> Tensor:
    """The forward pass of a feed-forward block with a gate."""
    if rest or extras:
        return type(block).forward(block, x, *rest, **extras)  # type: ignore[no-any-return]  # its callee is untyped
    part: Any = block
    return part.down_proj(_again(partial(_gate, part.act_fn), part.gate_proj(x), part.up_proj(x)))  # type: ignore[no-any-return]  # its callee is untyped


def _gate(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up  # type: ignore[no-any-return]  # its callee is untyped


def keep_less(base: nn.Module) -> None:
    """Let the norms, activations and gates of a frozen base keep their inputs only.

    Args:
        base: A Hugging Face model, not adapted yet. Modules of an unknown kind stay as they are.
    """
    for module in base.modules():
        if "forward" in vars(module):  # replaced already
            continue
        norm = type(module).__name__.endswith(_NORMS)
        if norm and (form := form_of(module)) is not None:
            module.forward = partial(_normed, module, form, module.forward)
            continue
        # in float32 the operations of a norm keep its input and no copy of it
        if isinstance(module, _ONE) or (
            norm and getattr(getattr(module, "weight", None), "dtype", None) == torch.float32
        ):
            module.forward = partial(_note, module.forward)
        elif norm or isinstance(module, _SEVERAL):
            module.forward = partial(_again, module.forward)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED) and _is_gated(module):
            module.forward = partial(_gated, module)


@torch.no_grad()
def _is_gated(block: nn.Module) -> bool:
    """Whether a block with the parts of a gated one puts them together as `_gated` does."""
    weight: Tensor = block.gate_proj.weight  # type: ignore[union-attr, assignment]  # modules hide their attributes' types
    x = torch.randn(1, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        return torch.equal(block(x), _gated(block, x))
    except (RuntimeError, TypeError, AttributeError):
        return False
