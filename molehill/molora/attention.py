"""Attention by batched matrix products, for bf16 training on CPUs.

The CPU flash kernel has a slow bf16 backward; below a few hundred tokens the plain form is faster. It goes through the
batch a few rows at a time, so that scores stay in the processor's cache and never exist for the whole batch, and keeps
q, k and v only: the backward computes the probabilities again. The work grows with T^2 all the same, so it is used for
short inputs only (`MAX_TOKENS`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from molehill.errors import ModelError
from molehill.molora.trial import plain_tokens

NAME = "molehill_bmm"
MAX_TOKENS = 512
_AT_ONCE = 2**19  # scores of the rows that are taken together: 1 MiB in bf16


class _Attention(torch.autograd.Function):
    """Queries ``[B, H, T, D]``, keys and values ``[B, K, S, D]``; every H / K queries in a row share a key head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
        ctx.save_for_backward(q, k, v, bias)
        ctx.scale = scale
        out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)  # as the next product wants it
        for at in _runs(q, k):
            q3, k3, v3 = _together(q[at], k), _together(k[at], k), _together(v[at], k)
            out[at] = (_probabilities(q3, k3, bias, at, q.shape, scale) @ v3).view_as(out[at])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for at in _runs(q, k):
            q3, k3, v3, g3 = _together(q[at], k), _together(k[at], k), _together(v[at], k), _together(grad[at], k)
            p = _probabilities(q3, k3, bias, at, q.shape, ctx.scale)
            gv[at] = (p.mT @ g3).view_as(v[at])
            ds = torch._softmax_backward_data(g3 @ v3.mT, p, -1, p.dtype)  # noqa: SLF001  (one kernel; public autograd would keep p)
            gq[at] = (ds @ k3).mul_(ctx.scale).view_as(q[at])
            gk[at] = (ds.mT @ q3).mul_(ctx.scale).view_as(k[at])
        return gq, gk, gv, None, None


def _runs(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Rows of the batch whose scores fit in the cache."""
    step = max(1, _AT_ONCE // (q.shape[1] * q.shape[2] * k.shape[2]))
    return (slice(start, start + step) for start in range(0, len(q), step))


def _together(t: Tensor, k: Tensor) -> Tensor:
    """``[n, H, T, D]`` to ``[n * K, H / K * T, D]``, contiguous: one product serves all queries of a key head."""
    n, heads, tokens, width = t.shape
    return t.reshape(n * k.shape[1], heads // k.shape[1] * tokens, width).contiguous()


def _probabilities(q3: Tensor, k3: Tensor, bias: Tensor | None, at: slice, shape: torch.Size, scale: float) -> Tensor:
    """Softmax of the scaled scores of one run, ``[n * K, H / K * T, S]``; ``shape`` is that of all queries."""
    scores = (q3 * scale) @ k3.mT
    if bias is not None:
        scores.view(-1, shape[1], shape[2], k3.shape[1]).add_(bias if len(bias) == 1 else bias[at])
    return torch.softmax(scores, -1)


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
            mend='Set base.precision = "fp32".',
        )
    elif _watched:
        _watched[-1].add("")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=query.dtype, device=query.device).masked_fill_(
            ~bias, torch.finfo(query.dtype).min
        )
    elif bias is None and causal and query.shape[2] > 1:
        size = (query.shape[2], key.shape[2])
        bias = torch.full(size, torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
        bias = bias.triu(1 + size[1] - size[0])
    if bias is not None:
        bias = bias[..., : key.shape[2]]
    if bias is not None and bias.requires_grad:  # `_Attention` has no gradient for it
        grouped = key.shape[1] != query.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=grouped)
    else:
        out = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]  # untyped torch
    return out.transpose(1, 2).contiguous(), None


# Arguments that change nothing here: what they say of order and windows is in the mask, the others ask for more output.
_IN_THE_MASK = {"sliding_window", "position_ids", "cache_position"}
_OUTPUT = {"use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}

_watched: list[set[str]] = []  # what models ask for, while somebody watches; "" for a call that asks for nothing more


def _beyond(dropout: float, extras: Mapping[str, Any]) -> set[str]:
    """Names of the arguments that this attention does not implement."""
    asked = {name for name, value in extras.items() if value is not None} - _IN_THE_MASK - _OUTPUT
    return asked | {"dropout"} if dropout else asked


def register() -> None:
    """Make the attention known to transformers (with its mask form: without it padding would be ignored)."""
    AttentionInterface.register(NAME, _bmm_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def use_fast_attention(base: nn.Module, max_length: int) -> None:
    """Switch a bf16 CPU model with short inputs to this attention; other models keep theirs.

    So does a model whose attention gets what this one does not implement (sinks, soft caps, biases of heads, dropout),
    which one short pass shows.

    Args:
        base: A Hugging Face model in eval mode.
        max_length: Longest input in tokens.
    """
    first = next(base.parameters())
    if first.device.type != "cpu" or first.dtype != torch.bfloat16 or max_length > MAX_TOKENS:
        return
    part: Any = base
    own = part.config._attn_implementation  # noqa: SLF001  (there is no public name for it)
    register()
    part.set_attn_implementation(NAME)
    if _asked(part) != {""}:
        part.set_attn_implementation(own)


@torch.no_grad()
def _asked(base: Any) -> set[str]:
    """What the attention of a model asks for in a short pass with padding; empty when it never came here."""
    ids = torch.tensor(plain_tokens(base, 6)).view(2, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    _watched.append(set())
    try:
        base(input_ids=ids, attention_mask=mask)
    except Exception:  # noqa: BLE001  (whatever it was, its own attention will do better)
        return {"another attention"}
    finally:
        asked = _watched.pop()
    return asked
