"""What a pass through a model costs before its first token."""

from __future__ import annotations

from molehill.molora.model import MoLoRAModel

# Multiply-adds of an adapted linear that take as long as starting all the small operations around it.
_START = {False: 2e7, True: 3e9}  # on a CPU; on a GPU


def start_of(model: MoLoRAModel) -> float:
    """How many tokens cost as much as starting a pass: few where linears are wide and have much to do for each."""
    sizes = [site.site.d_in * site.site.d_out for site in model.sites.values()]
    return _START[model.flat.is_cuda] * len(sizes) / max(1, sum(sizes))
