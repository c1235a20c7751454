"""Finding the feed-forward blocks of a base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from molehill.errors import ModelError
from molehill.molora.blocks import Span
from molehill.molora.interfaces import Site
from molehill.molora.targets import matches, shape_of
from molehill.molora.trial import adaptable, layer_of, linears, trial_of

_INTO = re.compile(r"(^|\.)(gate_proj|up_proj|c_fc|intermediate\.dense|fc1|lin1)$")
_OUT_OF = re.compile(r"(^|\.)(down_proj|mlp\.c_proj|(?<!attention\.)output\.dense|fc2|lin2)$")
_EXPERTS = ("has_gate", "has_bias", "is_transposed", "down_proj")  # of the experts of any family in transformers


def ends_of(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of some linears that begin a feed-forward block, and those that end one."""
    names = list(names)
    return [name for name in names if _INTO.search(name)], [name for name in names if _OUT_OF.search(name)]


def mixtures(base: nn.Module) -> dict[str, nn.Module]:
    """The experts of a base that is a mixture itself, by their path: modules of 3-D weights."""
    return {name: part for name, part in base.named_modules() if all(hasattr(part, mark) for mark in _EXPERTS)}


def choose_blocks(base: Any, targets: Sequence[str] | str, layers: Sequence[int] | None = None) -> list[Span]:
    """Find the feed-forward blocks to put experts beside.

    Args:
        base: The base model.
        targets: ``all-linear`` for every one, or patterns as of `molehill.molora.targets.choose`, of which one matches
            the block, or its first or last linear.
        layers: Indices of the transformer layers to keep; all when None.

    Raises:
        ModelError: There is none, or none that is meant; or a block does not give what it takes.
    """
    spans = list(_blocks(base))
    patterns = (r".*",) if targets == "all-linear" else (targets,) if isinstance(targets, str) else targets
    found = [
        span
        for span in spans
        if any(matches(pattern, name) for name in (span.site.name, span.first, span.last) for pattern in patterns)
        and (layers is None or span.site.layer in layers)
    ]
    if not found:
        names = ", ".join(span.site.name for span in spans[:4]) or "none"
        raise ModelError(
            "the base has no feed-forward block that is meant",
            where="molora.targets" if layers is None else "molora.targets, molora.layers",
            mend=f'Its blocks are {names}{" ..." if len(spans) > 4 else ""}; targets = "all-linear" means all.',
        )
    return found


def _blocks(base: Any) -> Iterator[Span]:
    """All that text reaches."""
    every, found = linears(base), trial_of(base)
    reached = list(adaptable(base))
    depth = 1 + max((layer_of(name) for name in reached), default=0)
    own: dict[int, tuple[str, Any]] = {
        layer_of(name): (name.rpartition(".")[0], part) for name, part in mixtures(base).items()
    }
    for layer in sorted({layer_of(name) for name in reached}):
        if layer in own:
            block, experts = own[layer]
            width = int(base.config.get_text_config().hidden_size)
            yield Span(Site(layer, block, depth, width, width), block, block, len(experts.down_proj))
            continue
        begin, end = ends_of(name for name in reached if layer_of(name) == layer)
        if not begin or len(end) != 1:
            continue
        first, last = begin[0], end[0]
        pairs = zip(first.split("."), last.split("."), strict=False)
        name = ".".join(part for part, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        (width, _), (_, out) = shape_of(every[first]), shape_of(every[last])
        if width != out or found.rows(first) != found.rows(last):
            raise ModelError(
                f"{name} does not give what it takes: {width} features in and {out} out, or of other rows",
                where="molora.topology",
                mend="Use a topology of linears.",
            )
        yield Span(Site(layer, name, depth, width, out), first, last)
