"""Mix the experts' parameters: one merged adapter per route."""

from __future__ import annotations

from torch import Tensor

from molehill.errors import ConfigError
from molehill.molora.experts.lora import LoRABank
from molehill.molora.interfaces import Expert
from molehill.registry import register


@register(
    "mixer",
    "param",
    paper="Ponti et al. 2023 (Poly); Caccia et al. 2023, Multi-Head Adapter Routing (MHR)",
    url="https://arxiv.org/abs/2211.03831",
    seeds=("S118",),
)
class ParamMixer:
    """``(sum_e w_e B_e)(sum_e w_e A_e) x``: not the same function as output mixing, and it folds into one LoRA."""

    fused = False

    def __call__(self, bank: Expert, x: Tensor, y0: Tensor, weights: Tensor) -> Tensor:
        """Return the delta ``[B, T, d_out]`` for weights ``[B|1, 1, (H,) E]``.

        Raises:
            ConfigError: The experts are no LoRAs of one rank, or the route varies by token.
        """
        if not isinstance(bank, LoRABank) or len(set(bank.ranks)) != 1:
            raise ConfigError("mixer 'param' needs LoRA experts of equal rank", where="molora.mixer")
        if weights.shape[1] != 1:
            raise ConfigError(
                "mixer 'param' needs one route per row or per task",
                where="molora.mixer",
                mend="Use scorer 'task_table'.",
            )
        return bank.mixed(x, weights)
