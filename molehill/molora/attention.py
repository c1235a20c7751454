"""Attention by batched matrix products, for training on CPUs with products in bf16.

The CPU flash kernel has a slow bf16 backward; where the processor multiplies in bf16, and below a few hundred tokens,
the plain form is faster (`molehill.tasks.kernels` measures it). It goes through the
batch a few rows at a time, so that scores stay in the processor's cache and never exist for the whole batch, and keeps
q, k and v only: the backward computes the probabilities again. Where no query sees a later key, the queries come in
blocks, and what a whole block does not see is not computed. The work grows with T^2 all the same, so it is used for
short inputs only (`MAX_TOKENS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from molehill.errors import ModelError
from molehill.molora.trial import plain_tokens

NAME = "molehill_bmm"
MAX_TOKENS = 512
_AT_ONCE = 2**19  # scores of the rows that are taken together: 1 MiB in bf16
_BLOCK = 128  # queries of a block: half as many skip a little more, in products that are less efficient


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, ordered: bool) -> Tensor:
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())].expand(-1, q.shape[1], -1, -1)
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale, ctx.ordered = scale, ordered
        out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # as the next product wants it
        for at in _runs(q, k):
            q4, k3, v3 = _queries(q[at], k), _joined(k[at]), _joined(v[at])
            for rows, keys in _blocks(q, k, ordered):
                p = _probabilities(q4[:, :, rows], k3[:, keys], _part(bias, at, rows, keys), scale, ordered)
                out[at, :, rows] = (p @ v3[:, keys]).view_as(out[at, :, rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at in _runs(q, k):
            q4, k3, v3, g4 = _queries(q[at], k), _joined(k[at]), _joined(v[at]), _queries(grad[at], k)
            gk3 = gv3 = None
            for rows, keys in reversed(_blocks(q, k, ctx.ordered)):  # the last block sees all keys
                p = _probabilities(q4[:, :, rows], k3[:, keys], _part(bias, at, rows, keys), ctx.scale, ctx.ordered)
                q3, g3 = q4[:, :, rows].flatten(1, 2), g4[:, :, rows].flatten(1, 2)
                ds = torch._softmax_backward_data(g3 @ v3[:, keys].mT, p, -1, p.dtype)  # noqa: SLF001  (one kernel; public autograd would keep p)
                gq[at, :, rows] = _scaled(ds, k3[:, keys], ctx.scale).view_as(gq[at, :, rows])
                if gk3 is None or gv3 is None:
                    gk3, gv3 = _scaled(ds.mT, q3, ctx.scale), p.mT @ g3
                else:
                    gk3[:, keys].baddbmm_(ds.mT, q3, alpha=ctx.scale)
                    gv3[:, keys].baddbmm_(p.mT, g3)
            gk[at], gv[at] = gk3.view_as(gk[at]), gv3.view_as(gv[at])  # type: ignore[union-attr]  # there is a last block
        return gq, gk, gv, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, *, ordered: bool) -> Tensor:
    """Attention by products.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, K, S, D]``; every H / K queries in a row share a key head.
        v: ``[B, K, S, D']``.
        bias: Added to the scores, ``[T, S]`` or what becomes ``[B, H, T, S]``; it gets no gradient.
        scale: Of the scores.
        ordered: No query sees a later key; the last query is as late as the last key.

    Returns:
        ``[B, H, T, D']``.
    """
    return _Attention.apply(q, k, v, bias, scale, ordered)  # type: ignore[no-any-return, no-untyped-call]  # untyped torch


def _runs(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Rows of the batch whose scores fit in the cache."""
    step = max(1, _AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, len(q), step))


def _blocks(q: Tensor, k: Tensor, ordered: bool) -> list[tuple[slice, slice]]:
    """Queries that are taken together, with the keys that the last of them sees."""
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    stops = [min(start + _BLOCK, tokens) for start in range(0, tokens, _BLOCK)] if ordered else [tokens]
    return [(slice(start, stop), slice(0, stop + past)) for start, stop in zip([0, *stops], stops, strict=False)]


def _joined(t: Tensor) -> Tensor:
    """``[n, K, S, D]`` to ``[n * K, S, D]``, contiguous."""
    return t.flatten(0, 1).contiguous()


def _queries(t: Tensor, k: Tensor) -> Tensor:
    """``[n, H, T, D]`` to ``[n * K, H / K, T, D]``, contiguous: one product serves all queries of a key head."""
    n, heads, tokens, width = t.shape
    return t.reshape(n * k.shape[1], heads // k.shape[1], tokens, width).contiguous()


def _part(bias: Tensor | None, at: slice, rows: slice, keys: slice) -> Tensor | None:
    """What a bias ``[1 or B, H, 1 or T, S]`` adds to the scores of some queries."""
    if bias is None:
        return None
    return bias[at if len(bias) > 1 else slice(None), :, rows if bias.shape[2] > 1 else slice(None), keys]


def _probabilities(q4: Tensor, k3: Tensor, bias: Tensor | None, scale: float, ordered: bool) -> Tensor:
    """Softmax of the scaled scores, ``[n * K, H / K * t, s]``; the last query is as late as the last key."""
    scores = _scaled(q4.flatten(1, 2), k3.mT, scale)
    tokens, keys = q4.shape[2], k3.shape[1]
    if bias is not None:
        scores.view(-1, bias.shape[1], tokens, keys).add_(bias)
    elif ordered:
        scores.view(-1, tokens, keys)[..., keys - tokens :].add_(_later(tokens, scores.dtype, scores.device))
    return torch.softmax(scores, -1)


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``scale * left @ right`` in one operation."""
    nothing = left.new_empty(1, 1, 1).expand(len(left), left.shape[1], right.shape[2])
    return torch.baddbmm(nothing, left, right, beta=0, alpha=scale)


@cache
def _later(tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of as many queries as keys, so that none sees a later one."""
    return torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype, device=device).triu(1)


def _bmm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    asked = _beyond(dropout, extras)
    if asked and _watched:
        _watched[-1].update(asked)
    elif asked:
        raise ModelError(
            f"the base's attention wants {', '.join(sorted(asked))}, which ours does not do",
            where=type(module).__name__,
            mend=f"Set task.max_length above {MAX_TOKENS}, with which a model keeps its own attention.",
        )
    elif _watched:
        _watched[-1].add("")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = query.shape[2] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    bias = attention_mask
    ordered = causal if bias is None else bias in _ORDERED
    if bias is not None:
        bias = _added(bias, query.dtype)[..., : key.shape[2]]
    if (bias is not None and bias.requires_grad) or (ordered and query.shape[2] > key.shape[2]):  # not `_Attention`'s
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(
            query, key, value, bias, is_causal=bias is None, scale=scale, enable_gqa=grouped
        )
    else:
        out = attend(query, key, value, bias, scale, ordered=ordered)
    return out.transpose(1, 2).contiguous(), None


_ORDERED = WeakTensorKeyDictionary()  # masks by which no query sees a later key


def _mask(**asked: Any) -> Tensor | None:
    """What transformers asks a mask for, as what is added to scores; None where there is only the causal order."""
    square = asked["q_length"] == asked["kv_length"]  # otherwise transformers counts queries from the first key
    asked["allow_is_causal_skip"] = asked.get("allow_is_causal_skip", True) and square
    seen = sdpa_mask(**asked)
    if seen is None:
        return None
    mask = _added(seen, asked.get("dtype", torch.float32))
    if square and not bool(seen.triu(1).any()):
        _ORDERED[mask] = True
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: the lowest number where a boolean mask is False."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


# Arguments that change nothing here: what they say of order and windows is in the mask, the others ask for more output,
# or for an order of sums that does not vary.
_IN_THE_MASK = {"sliding_window", "position_ids", "cache_position"}
_OUTPUT = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}
_ALWAYS = {"deterministic"}

_PASSES = 2  # with and without padding

_watched: list[set[str]] = []  # what models ask for, while somebody watches; "" for a call that asks for nothing more


def _beyond(dropout: float, extras: Mapping[str, Any]) -> set[str]:
    """Names of the arguments that this attention does not implement."""
    asked = {name for name, value in extras.items() if value is not None} - _IN_THE_MASK - _OUTPUT - _ALWAYS
    return asked | {"dropout"} if dropout else asked


def register() -> None:
    """Make the attention known to transformers (with its mask form: without it padding would be ignored)."""
    AttentionInterface.register(NAME, _bmm_attention)
    AttentionMaskInterface.register(NAME, _mask)


def use_fast_attention(base: nn.Module, max_length: int, when: Callable[[bool], bool]) -> bool:
    """Switch a CPU model with short inputs to this attention where it is faster; other models keep theirs.

    So does a model whose attention gets what this one does not implement (sinks, soft caps, biases of heads, dropout),
    or that gives something else with it, which a short pass shows.

    Args:
        base: A Hugging Face model in eval mode.
        max_length: Longest input in tokens.
        when: Whether it is faster for such inputs on this machine's processor, given whether tokens see only those
            before them; asked only if the rest allows it.

    Returns:
        Whether the model has it now.
    """
    if next(base.parameters()).device.type != "cpu" or max_length > MAX_TOKENS:
        return False
    if not when(any(getattr(module, "is_causal", False) for module in base.modules())):
        return False
    part: Any = base
    own = part.config._attn_implementation  # noqa: SLF001  (there is no public name for it)
    expected = _outputs(part)
    register()
    part.set_attn_implementation(NAME)
    _watched.append(set())
    found = _outputs(part)
    alike = len(found) == len(expected) == _PASSES and all(map(_alike, found, expected))
    ours = _watched.pop() == {""} and alike
    if not ours:
        part.set_attn_implementation(own)
    return ours


@torch.no_grad()
def _outputs(base: Any) -> list[Tensor]:
    """What a model gives for two short rows and for two of which one is padded; less where it cannot be run."""
    ids = torch.tensor(plain_tokens(base, 6)).view(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    try:
        return [base(input_ids=ids)[0], base(input_ids=ids, attention_mask=mask)[0][mask.bool()]]
    except Exception:  # noqa: BLE001  (whatever it was, its own attention will do better)
        return []


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs differ by rounding only: a mask that was lost changes most of them by more."""
    close = 1e-4 if found.dtype == torch.float32 else 5e-2
    return bool((found - expected).float().norm() <= close * expected.float().norm())
