"""The plain next token."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from molehill.errors import ConfigError
from molehill.molora.layer import MoLoRALinear
from molehill.registry import register


@register("inference", "greedy", paper="house: one pass, the model's own next-token logits")
class Greedy:
    """One forward pass; the logits after every row's last real token, whichever side the padding is on."""

    export: Literal["graph_input", "two_pass", "host_only"] = "graph_input"

    @torch.no_grad()
    def step(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return next-token logits ``[B, V]``.

        Args:
            model: Causal language model (the ``base`` of a MoLoRA model); its output has ``logits`` ``[B, T, V]``.
            input_ids: ``[B, T]`` int64.
            attention_mask: True for real tokens, ``[B, T]``.

        Raises:
            ConfigError: A router looks at later tokens or other rows, which do not exist while a text is written.
        """
        for module in model.modules():
            group = module.group if isinstance(module, MoLoRALinear) else None
            if group is not None and not group.router.selector.causal:
                raise ConfigError(
                    f"selector {type(group.router.selector).__name__} is not causal and cannot generate text",
                    where="molora.selector",
                )
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask).logits
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (attention_mask.long() * positions).argmax(-1)
        return logits[torch.arange(len(last), device=last.device), last]
