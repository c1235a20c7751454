"""Experts at fixed weights as one adapter, or inside the linears of the base.

Weights are by site and of all its experts, always-on ones first: ``[E]``, or ``[H, E]`` where heads weigh parts of an
expert apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from molehill.errors import ModelError
from molehill.molora.adapted import Adapted
from molehill.molora.banks import Peft
from molehill.molora.layer import ContractLinear, ExpandLinear, MoLoRALinear
from molehill.molora.model import MoLoRAModel
from molehill_export.insertion import Array
from molehill_export.stacks import expert_tensors

Weights = Mapping[str, Tensor]


def alone(model: MoLoRAModel, expert: str) -> dict[str, Tensor]:
    """An expert at weight 1 and nothing else; sites that have it not are left out."""
    found = {}
    for name, site in model.sites.items():
        ids = model.expert_ids(site)
        if expert in ids:
            found[name] = torch.tensor([float(each == expert) for each in ids])
    return found


def as_chosen(model: MoLoRAModel, expert: str) -> dict[str, Tensor]:
    """An expert at weight 1, with those that are always on: what answers when a router may choose no other.

    Raises:
        ModelError: A blend weighs these token by token.
    """
    _require_no_blend(model)
    found = {}
    for name, site in model.sites.items():
        ids = model.expert_ids(site)
        on = [site.group is None or place < site.shared or each == expert for place, each in enumerate(ids)]
        found[name] = torch.tensor(on, dtype=torch.float32)
    return found


def by_routes(model: MoLoRAModel, routes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All experts at the weights that every route has.

    Args:
        model: The model.
        routes: Weights of the routed experts by the name of the route's first site, ``[E]`` or ``[H, E]``.

    Raises:
        ModelError: A blend weighs always-on experts token by token.
    """
    _require_no_blend(model)
    found = {}
    for name, site in model.sites.items():
        if site.group is None:
            weights = torch.ones(site.bank.n_experts)
        else:
            routed = routes[site.group.site.name]
            weights = torch.cat([routed.new_ones(*routed.shape[:-1], site.shared), routed], -1)
        if site.gain is None or site.gain.on:
            found[name] = weights
    return found


def _require_no_blend(model: MoLoRAModel) -> None:
    for name, group in model.routers.items():
        if group.router.blend is not None:
            raise ModelError(
                "how much always-on experts weigh beside the routed ones is decided by a blend, and not fixed",
                where=name,
                mend="Export a bundle, which blends.",
            )


def as_lora(model: MoLoRAModel, weights: Weights) -> dict[str, tuple[Array, Array]]:
    """A ``[r, d_in]`` and B ``[d_out, r]`` of one LoRA by site, scale and weights absorbed in B.

    Of outputs that are added up, the factors follow each other on the rank axis; parameters that are, are.

    Raises:
        ModelError: No LoRA is that.
    """
    tensors = {expert: expert_tensors(model, expert) for expert in model.experts}
    found = {}
    for name, given in weights.items():
        site = model.sites[name]
        _require_one(site, name, given)
        if not site.pairs:
            _require_linear(site, name)
            raise ModelError(f"{site.bank.noun} experts cannot become a LoRA", where=name)
        if given.dim() > 1:
            raise ModelError("heads weigh parts of an expert apart, which no LoRA does", where=name)
        pairs = [
            (w, tensors[expert][f"{name}/A"], tensors[expert][f"{name}/B"])
            for expert, w in zip(model.expert_ids(site), given.tolist(), strict=True)
            if w
        ]
        if not pairs:
            continue
        if site.mixer.mixes == "parameters":
            found[name] = np.asarray(sum(w * a for w, a, _ in pairs)), np.asarray(sum(w * b for w, _, b in pairs))
        else:
            found[name] = np.concatenate([a for _, a, _ in pairs]), np.concatenate([w * b for w, _, b in pairs], 1)
    return found


@torch.no_grad()
def as_peft(model: MoLoRAModel, weights: Weights) -> tuple[Peft, dict[str, dict[str, Array]]]:
    """What peft calls the adapter, and its tensors by site and role, as for `molehill.molora.peft_folder.write_peft`.

    Raises:
        ModelError: peft has no such adapter.
    """
    sites = {name: model.sites[name] for name in weights}
    methods = {site.peft for site in sites.values()}
    (method,) = methods if len(methods) == 1 else (None,)
    if method is None:
        name, site = next((name, site) for name, site in sites.items() if site.peft is None or len(methods) > 1)
        _require_linear(site, name)
        raise ModelError(f"peft has no {site.bank.noun} experts like these", where=name, mend="Try --merged.")
    if method == "LORA":
        return method, {name: {"A": a, "B": b} for name, (a, b) in as_lora(model, weights).items()}
    found = {}
    for name, given in weights.items():
        _require_one(model.sites[name], name, given)
        tensors = sites[name].bank.as_one(given)
        if tensors is None:
            what = f"{sites[name].bank.noun} experts at these weights are not one expert"
            raise ModelError(what, where=name, mend="Export one of them, or try --merged.")
        found[name] = {role: value.numpy() for role, value in tensors.items()}
    return method, found


@torch.no_grad()
def fold(model: MoLoRAModel, weights: Weights) -> None:
    """Put the experts into the frozen linears, in place: the base alone then computes what all of it did.

    Args:
        model: In float32, its base in memory; it is of no use afterwards but for its base.
        weights: Of the experts.

    Raises:
        ModelError: No linears of these shapes compute that.
    """
    owners = Counter(id(parameter) for _, parameter in model.base.named_parameters(remove_duplicate=False))
    for name, given in weights.items():
        site = _require_linear(model.sites[name], name)
        _require_one(site, name, given)
        if any(owners[id(parameter)] > 1 for parameter in site.base.parameters()):
            raise ModelError("the base has this weight in several places", where=name, mend="Export a bundle.")
        made = _folded(site, name, given)
        if made is None or (made[1] is not None and site.bias is None):
            why = "is no change of a weight" if made is None else "adds a bias, and the base has none"
            raise ModelError(f"a {site.bank.noun} expert {why} here", where=name, mend="Export a bundle.")
        site.weight.copy_(made[0])
        if made[1] is not None and site.bias is not None:
            site.bias.copy_(made[1])


def _folded(site: MoLoRALinear, name: str, given: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``[d_out, d_in]`` and bias of a linear with its experts in; None where there is none."""
    if site.mixer.mixes == "parameters":
        each_input = torch.eye(site.site.d_in).unsqueeze(0)
        nothing = torch.zeros(1, site.site.d_in, site.site.d_out)
        change = site.mixer(site.bank, each_input, nothing, given[None, None])[0]
        return site.weight + change.t(), site.bias
    if given.dim() > 1:
        raise ModelError("heads weigh parts of an expert apart, which no weight does", where=name)
    return site.bank.folded(given, site.weight, site.bias)


def _require_one(site: Adapted, name: str, given: Tensor) -> None:
    """Refuse a mixture of blocks, and one that is no sum of what experts are."""
    if site.group is not None and not site.mixer.keeps():
        what = "what the owner has fitted of how experts are mixed is no change of a linear"
        raise ModelError(what, where=name, mend="Export a bundle.")
    if sorted(given.flatten().tolist(), reverse=True)[:2] in ([1.0], [1.0, 0.0]):
        return
    if isinstance(site, ExpandLinear | ContractLinear):
        raise ModelError("experts that are whole blocks mix their outputs, which no linear does", where=name)
    if site.group is not None and site.mixer.mixes == "other" and not site.mixer.fits:
        what = "what these experts are together is no sum of them"
        raise ModelError(what, where=name, mend="Export a bundle, or give one expert.")


def _require_linear(site: Adapted, name: str) -> MoLoRALinear:
    """Refuse experts beside a block."""
    if not isinstance(site, MoLoRALinear):
        what = "experts beside a whole block are no change of a linear"
        raise ModelError(what, where=name, mend="Export a bundle, or ask the run itself.")
    return site
