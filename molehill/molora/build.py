"""From configuration to model: the only place of this package that sees configuration objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from molehill.config import MethodRef
from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import ConfigError, ModelError
from molehill.molora.block_maker import blocks_of
from molehill.molora.fitting import Made, mixer_of, require_whole_blocks, require_wishes, show
from molehill.molora.gain import Gain
from molehill.molora.head import Head
from molehill.molora.interfaces import Site, SitePlan
from molehill.molora.layer import ContractLinear, ExpandLinear, Fan, MoLoRALinear
from molehill.molora.model import MoLoRAModel, seed_for
from molehill.molora.recompute import keep_less
from molehill.molora.router_maker import RouterMaker
from molehill.molora.routes import ForwardState, RouteGroup
from molehill.molora.steps import BlockTopology
from molehill.molora.targets import choose
from molehill.molora.trial import Trial, trial_of

_FFN = re.compile(r"(^|\.)(mlp|ffn|feed_forward|intermediate)(\.|$)|(?<!attention)\.output\.dense$")


def wrap(
    base: nn.Module,
    config: MoLoRAConfig,
    *,
    gate: Literal["anchored", "personal", "global", "split"] = "global",
    head: Head | None = None,
    seed: int = 0,
) -> MoLoRAModel:
    """Put experts and routers into a base model (in place) and freeze everything else.

    Args:
        base: A Hugging Face model; its linears are replaced by adapted ones that hold them.
        config: What to build.
        gate: Gate policy; ``anchored`` adds a personal residual to every router.
        head: Classification head to train along, or None.
        seed: Start values depend on it, the site and the expert id only, so all machines start alike.

    Returns:
        The model; its output equals the base's until something is trained.

    Raises:
        ModelError: The targets do not fit the base.
        ConfigError: The parts do not fit each other.
    """
    base.requires_grad_(requires_grad=False)
    topology = config.topology.build("topology")
    if isinstance(topology, BlockTopology):
        return _finished(base, blocks_of(base, config, topology, gate, seed), config, head, seed)
    choice = choose(base, config.targets, config.layers)
    sites = choice.sites
    found = trial_of(base)
    keep_less(base)
    roles: dict[str, str] = {}
    for layer in sorted({site.layer for site in sites}):
        roles.update(topology.roles([site.name for site in sites if site.layer == layer]))
    plans = config.allocation.build("allocation").plan(sites, config.experts, config.shared, config.rank)
    plans = {s.name: _plain(plans[s.name], config) if _unrouted(topology.scope, roles[s.name]) else plans[s.name]
             for s in sites}  # fmt: skip
    state = ForwardState()
    groups = _groups(sites, plans, topology.scope or config.scope, RouterMaker(base, config, gate, seed), state, found)
    kinds: Mapping[str, type[MoLoRALinear]] = {
        "plain": MoLoRALinear,
        "expand": ExpandLinear,
        "contract": ContractLinear,
    }
    adapted: dict[str, MoLoRALinear] = {}
    for site in sites:
        plan, role = plans[site.name], roles[site.name]
        ranks = plan.shared_ranks + plan.ranks
        bank = config.expert.build("expert", site=site, ranks=ranks, alpha=config.alpha)
        if role != "plain":
            require_wishes(topology.wants, bank, len(plan.shared_ranks), f"topology {config.topology.name!r}")
        group = groups.get(_group_of(site, topology.scope or config.scope)) if plan.ranks else None
        if group is not None:
            require_whole_blocks(site, group.router.heads)
            if group.site.name == site.name:
                show(bank, group, len(plan.shared_ranks), config.scorer)
        module = kinds[role](
            base.get_submodule(site.name), site, bank, shared=len(plan.shared_ranks), group=group,
            mixer=mixer_of(config, bank, len(plan.shared_ranks), routed=group is not None and role == "plain"),
            dropout=config.dropout, state=state, tokens=found.on_tokens(site.name),
            gain=None if plan.gated is None else Gain(plan.gated),
        )  # fmt: skip
        parent, _, name = site.name.rpartition(".")
        setattr(base.get_submodule(parent), name, module)
        adapted[site.name] = module
    _join(adapted, found)
    made = Made({**adapted}, list(groups.values()), [plans[name] for name in adapted], state, remarks=choice.remarks)
    return _finished(base, made, config, head, seed)


def _finished(base: nn.Module, made: Made, config: MoLoRAConfig, head: Head | None, seed: int) -> MoLoRAModel:
    """The model of what was put into a base, with its start values."""
    device = next(base.parameters()).device
    experts = (
        *(f"shared{i}" for i in range(max(len(plan.shared_ranks) for plan in made.plans))),
        *(f"e{i}" for i in range(max(len(plan.ranks) for plan in made.plans))),
    )
    if head is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "head"))
            nn.init.normal_(head.weight, std=0.02)
        head.to(device)
    for part in [*made.sites.values(), *made.groups]:
        part.to(device)
    groups = {group.site.name: group for group in made.groups}
    model = MoLoRAModel(base, made.sites, groups, experts, head, made.state, made.remarks, made.blocks)
    _initialise(model, config.init, seed)
    return model


def bare(base: nn.Module) -> MoLoRAModel:
    """A causal LM without an adapter, for what asks it as it asks one with an adapter."""
    return MoLoRAModel(base, {}, {}, (), None, ForwardState())


def _join(sites: Mapping[str, MoLoRALinear], found: Trial) -> None:
    """Compute sites that read one tensor at once; with dropout every site reads another."""
    for names in found.together:
        some = [sites[name] for name in names if name in sites and sites[name].fused and sites[name].dropout.p == 0]
        fan = Fan(some)
        for site in some:
            site.fan = fan


def _unrouted(forced: str | None, role: str) -> bool:
    """In a block topology the linears outside the block get one plain LoRA."""
    return forced == "block" and role == "plain"


def _plain(plan: SitePlan, config: MoLoRAConfig) -> SitePlan:
    return SitePlan(ranks=(), shared_ranks=(max((*plan.ranks, *plan.shared_ranks, config.rank)),))


def _group_of(site: Site, scope: str) -> str:
    if scope == "site":
        return site.name
    if scope == "block":
        return f"{site.layer}/{'ffn' if _FFN.search(site.name) else 'attention'}"
    return str(site.layer) if scope == "layer" else "model"


def _groups(
    sites: Sequence[Site], plans: Mapping[str, SitePlan], scope: str, maker: RouterMaker, state: ForwardState,
    found: Trial,
) -> dict[str, RouteGroup]:  # fmt: skip
    groups: dict[str, RouteGroup] = {}
    order = {name: at for at, name in enumerate(found.calls)}  # of the pass, which is not always that of the modules
    for site in sorted(sites, key=lambda site: order.get(site.name, len(order))):
        plan, key = plans[site.name], _group_of(site, scope)
        if not plan.ranks:
            continue
        if key in groups:
            if groups[key].router.n_experts != len(plan.ranks):
                raise ConfigError(
                    f"scope {scope!r} shares one route between sites with different numbers of experts",
                    where="molora.allocation",
                    mend="Use scope 'site', or an allocation that gives them the same number.",
                )
            _require_same_rows(groups[key].site.name, site.name, scope, found)
            continue
        router = maker.router(site, plan, alone=scope == "site")
        if router is not None:
            groups[key] = RouteGroup(router, site, state, plan.costs, found.on_tokens(site.name))
    return groups


def _require_same_rows(first: str, other: str, scope: str, found: Trial) -> None:
    """Refuse one route for linears that run on different things.

    Raises:
        ModelError: A call of the other site is of other rows than that of the first.
    """
    routed, reads = found.rows(first), found.rows(other)
    if reads != routed[: len(reads)]:
        raise ModelError(
            f"{other} does not run on the same rows as {first}, from which the route of both would come "
            f"(scope {scope!r})",
            where="molora.scope",
            mend='Set molora.scope = "site", or leave one of them out of molora.targets.',
        )


def _initialise(model: MoLoRAModel, ref: MethodRef, seed: int) -> None:
    init = ref.build("init")
    for name, site in model.sites.items():
        for index, expert in enumerate(model.expert_ids(site)):
            drawn = "routed" if init.alike and index >= site.shared else expert
            site.bank.start(index, init, torch.Generator().manual_seed(seed_for(seed, name, drawn)))
