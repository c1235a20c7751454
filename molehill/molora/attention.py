"""Attention by two batched matrix products, for bf16 training on CPUs.

The CPU flash kernel has a slow bf16 backward; below a few hundred tokens the plain form with a hand-written backward
is faster. Memory grows with T^2, so it is used for short inputs only (`MAX_TOKENS`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "molehill_bmm"
MAX_TOKENS = 512


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        # contiguous once: batched products would copy every operand at every use
        q, k, v = (q * scale).contiguous(), k.contiguous(), v.contiguous()
        scores = torch.matmul(q, k.transpose(-1, -2))
        if bias is not None:
            scores += bias
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.matmul(p, v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad = grad.contiguous()
        gv = torch.matmul(p.transpose(-1, -2), grad)
        ds = torch._softmax_backward_data(torch.matmul(grad, v.transpose(-1, -2)), p, -1, p.dtype)  # noqa: SLF001
        gq = torch.matmul(ds, k).mul_(ctx.scale)
        gk = torch.matmul(ds.transpose(-1, -2), q)  # q carries the scale
        return gq, gk, gv, None, None


def _bmm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - frozen bases run in eval mode, where it is 0
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # grouped-query attention
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
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
    out = _Attention.apply(query, key, value, bias, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention known to transformers (with its mask form: without it padding would be ignored)."""
    AttentionInterface.register(NAME, _bmm_attention)
    AttentionMaskInterface.register(NAME, eager_mask)


def use_fast_attention(base: nn.Module, max_length: int) -> None:
    """Switch a bf16 CPU model with short inputs to the two-product form; other models keep theirs.

    Args:
        base: A Hugging Face model.
        max_length: Longest input in tokens.
    """
    first = next(base.parameters())
    if first.device.type == "cpu" and first.dtype == torch.bfloat16 and max_length <= MAX_TOKENS:
        register()
        base.set_attn_implementation(NAME)  # type: ignore[operator]
