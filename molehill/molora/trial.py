"""One tiny pass through a frozen base, forward and backward: what it really does, whatever its configuration says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from molehill.errors import ModelError, first_line
from molehill.molora.recompute import version_of

_NUMBERED = re.compile(r"\.(\d+)\.")
_ROWS, _TOKENS = 2, 3  # the last row is padded by one token
_WHOLE = {(_ROWS, _TOKENS), (_ROWS * _TOKENS,)}


@dataclass(frozen=True)
class Trial:
    """What one pass over two short rows of text showed.

    Attributes:
        width: Features of the output.
        states: Whether the output is the last token states; logits otherwise.
        calls: Leading shapes of the inputs a linear had, call by call, by the linear's name; no entry for a linear of
            the layers that was not called. Rows and tokens come as ``(2, 3)``.
        learning: Names of the called linears whose output the model's output depends on with a gradient.
        together: Names of linears, called once, that read one tensor, in the order of the pass; only those that are
            two or more.
        positions: How many tokens the learned tables of positions hold; None where there are none.
    """

    width: int
    states: bool
    calls: Mapping[str, tuple[tuple[int, ...], ...]]
    learning: frozenset[str]
    together: tuple[tuple[str, ...], ...]
    positions: int | None

    def on_tokens(self, name: str) -> tuple[bool, ...]:
        """For every call of a linear, whether its input are the tokens of the batch, in rows or one after another."""
        return tuple(lead == () for lead in self.rows(name))

    def rows(self, name: str) -> tuple[tuple[int, ...], ...]:
        """What a linear runs on, call by call: empty for the tokens of the batch, else the leading shape."""
        calls = self.calls.get(name, ((0,),))  # not called: an expert of a mixture, which gets some of the tokens
        return tuple(() if lead in _WHOLE else lead for lead in calls)


def linears(base: nn.Module) -> dict[str, nn.Module]:
    """The linear modules inside numbered layers by name, in the order of the model's modules.

    A linear that gives something else, such as a mixture's router, is none.
    """
    return {name: module for name, module in base.named_modules() if is_numbered(name) and _is_linear(module)}


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight and adds its bias; where its forward pass is its own, a row tells."""
    if type(module).forward in {nn.Linear.forward, Conv1D.forward}:
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = torch.linspace(-1, 1, module.in_features, device=module.weight.device, dtype=module.weight.dtype)[None]
    wanted = F.linear(x, module.weight, module.bias)
    try:
        y = type(module).forward(module, x)
    except Exception:  # noqa: BLE001  (it wants other arguments, or rows of another width)
        return False
    close = 1e-5 if x.dtype == torch.float32 else 1e-2
    return isinstance(y, Tensor) and y.shape == wanted.shape and bool((y - wanted).norm() <= close * wanted.norm())


def is_numbered(name: str) -> bool:
    """Whether a module or parameter lies in a numbered layer."""
    return _NUMBERED.search(f".{name}.") is not None


def layer_of(name: str) -> int:
    """The number of the layer that a module or parameter lies in."""
    found = _NUMBERED.search(f".{name}.")
    assert found is not None
    return int(found[1])


def stack_of(name: str) -> str:
    """The path of the stack of layers that a module or parameter lies in."""
    return f".{name}".partition(f".{layer_of(name)}.")[0].removeprefix(".")


def keeps_logits(base: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some tokens only."""
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def trial_of(base: nn.Module) -> Trial:
    """Run a base once on two short rows; what was seen is remembered for as long as the base lives.

    Args:
        base: A Hugging Face model in eval mode, without adapters; its parameters need no gradient.

    Raises:
        ModelError: The model cannot be run on text with padding, does not give one output per token, or gives numbers
            that are not finite.
    """
    known = _TRIALS.get(base)
    if known is None:
        known = _TRIALS[base] = _run_trial(base)
    return known


def takes(base: nn.Module, tokens: int) -> bool:
    """Whether an input of so many tokens gets through the embeddings and the first layer.

    Args:
        base: A base that `trial_of` accepted, on the CPU: a GPU may not survive a position that does not exist.
        tokens: Length of the input.
    """
    deeper = [module for name, module in linears(base).items() if layer_of(name) > 0]
    ids = torch.full((1, tokens), plain_tokens(base, 1)[0], device=_device(base))
    with ExitStack() as stack, torch.no_grad():
        for module in deeper:
            stack.callback(module.register_forward_pre_hook(_stop).remove)
        try:
            _run(base, ids, torch.ones_like(ids))
        except _EnoughError:
            return True
        except (RuntimeError, IndexError, ValueError):
            return False
    return True


_TRIALS: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


class _EnoughError(Exception):
    """The first layer is done."""


def _stop(*_: Any) -> None:
    raise _EnoughError


class _Positions(TorchFunctionMode):
    """Watches lookups in tables: an index that rises by one with every token is a position."""

    def __init__(self) -> None:
        super().__init__()
        self.least: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.embedding:
            index, table = (given.get(name, args[at] if len(args) > at else None) for at, name in enumerate(_LOOKUP))
            self._see(index, table)
        return func(*args, **given)

    def _see(self, index: Any, table: Any) -> None:
        if not (isinstance(index, Tensor) and index.dim() and index.shape[-1] == _TOKENS):
            return
        rows = index.reshape(-1, _TOKENS)
        rows = rows[: max(1, len(rows) - 1)]  # the last row of a batch has padding
        if bool((rows.diff() == 1).all()):
            holds = int(table.shape[0] - rows[0, 0])
            self.least = holds if self.least is None else min(self.least, holds)


_LOOKUP = ("input", "weight")


def _run_trial(base: nn.Module) -> Trial:
    calls: dict[str, list[tuple[int, ...]]] = {}
    inputs: dict[str, Tensor] = {}  # kept, so that no two have one identity
    reads: dict[tuple[int, int], list[str]] = {}
    anchors: dict[str, Tensor] = {}

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.setdefault(name, []).append(tuple(args[0].shape[:-1]))
        inputs.setdefault(name, args[0])
        reads.setdefault((id(inputs[name]), version_of(args[0])), []).append(name)
        if name not in anchors:
            anchors[name] = output.new_zeros(output.shape[-1]).requires_grad_()
        return output + anchors[name]

    mask = torch.ones(_ROWS, _TOKENS, dtype=torch.long, device=_device(base))
    mask[-1, -1] = 0
    try:
        tokens = plain_tokens(base, _ROWS * _TOKENS)
        ids = torch.tensor(tokens, device=mask.device).view(_ROWS, _TOKENS)
        with ExitStack() as stack, torch.enable_grad(), _Positions() as positions:
            for name, module in linears(base).items():
                stack.callback(module.register_forward_hook(partial(note, name)).remove)
            out, states = _run(base, ids, mask)
            reached = list(anchors.values()) if out.requires_grad else []
            grads = torch.autograd.grad(out.float().sum(), reached, allow_unused=True) if reached else ()
    except Exception as error:  # noqa: BLE001  (the code of some hundred architectures: it raises what it likes)
        half = next(base.parameters()).dtype != torch.float32
        mend = 'Set base.precision = "fp32", or give another base.' if half else "Give another base."
        what = f"the model cannot be run on rows of text: {first_line(error)}"
        raise ModelError(what, where=_kind(base), mend=mend) from None
    if out.dim() != 3 or tuple(out.shape[:2]) != (_ROWS, _TOKENS):
        raise ModelError(
            f"the model gives outputs {list(out.shape)} for {_ROWS} rows of {_TOKENS} tokens, not one per token",
            where=_kind(base),
            mend="Give another base.",
        )
    if not bool(out.detach()[mask.bool()].isfinite().all()):
        raise ModelError(
            "the model gives numbers that are not finite",
            where=_kind(base),
            mend='Check its weights, or set base.precision = "fp32".',
        )
    learning = frozenset(name for name, grad in zip(anchors, grads, strict=False) if grad is not None)
    seen = {name: tuple(shapes) for name, shapes in calls.items()}
    once = [tuple(name for name in names if len(calls[name]) == 1) for names in reads.values()]
    together = tuple(names for names in once if len(names) > 1)
    return Trial(int(out.shape[-1]), states, seen, learning, together, positions.least)


def _run(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, bool]:
    """Token states, or logits of a model without them, ``[B, T, d]``, and whether they are states."""
    out = base(input_ids=ids, attention_mask=mask)
    states: Tensor | None = getattr(out, "last_hidden_state", None)
    return (out.logits, False) if states is None else (states, True)


def plain_tokens(base: nn.Module, count: int) -> list[int]:
    """Ids that mean nothing to the model, not in rising order; they repeat where the vocabulary is small."""
    part: Any = base
    special: set[int] = set()
    for settings in (part.config, part.config.get_text_config()):
        for name, value in settings.to_dict().items():
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                special.update(value if isinstance(value, list) else [value])
    vocabulary = int(part.get_input_embeddings().weight.shape[0])
    plain = [token for token in range(min(vocabulary, 4 * count + len(special))) if token not in special]
    plain = plain or list(range(vocabulary))
    return [plain[-1 - at % len(plain)] for at in range(count)]


def _device(base: nn.Module) -> torch.device:
    return next(base.parameters()).device


def _kind(base: nn.Module) -> str:
    return str(getattr(getattr(base, "config", None), "model_type", type(base).__name__))


def adaptable(base: nn.Module) -> Iterator[str]:
    """Names of the linears that text reaches and that can learn from it.

    A linear that was not called counts all the same when its like in the layers was: of a mixture's experts only those
    are called that a token was sent to.
    """
    found = trial_of(base)
    kinds = {likeness(name) for name in found.learning}
    return (name for name in linears(base) if likeness(name) in kinds)


def likeness(name: str) -> str:
    """A path with its numbers taken out, equal for the same part of every layer and expert."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name)
