"""The same start for all experts of a site."""

from __future__ import annotations

from molehill.molora.inits.lora import LoRAInit
from molehill.registry import register


@register("init", "alike", paper="house: experts that are one LoRA until owners lean apart")
class AlikeInit(LoRAInit):
    """The start values of LoRA, the same for all routed experts of a site.

    Weighed by anything that sums to 1, alike experts are one LoRA, and they stay so until owners lean on different
    ones. So the first rounds train one model for all, and `federation.assign` can part the experts at any time without
    a change of what the model says.
    """

    alike = True
