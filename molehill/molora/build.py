"""From configuration to model: the only place of this package that sees configuration objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from molehill import registry
from molehill.config import MethodRef
from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import ConfigError, ModelError
from molehill.molora import reading
from molehill.molora.banks import Bank
from molehill.molora.head import Head
from molehill.molora.interfaces import RouteContext, Selector, Site, SitePlan, Wish
from molehill.molora.layer import ContractLinear, ExpandLinear, Fan, MoLoRALinear
from molehill.molora.model import MoLoRAModel, seed_for
from molehill.molora.recompute import keep_less
from molehill.molora.router import Router
from molehill.molora.routes import ForwardState, RouteGroup
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
    choice = choose(base, config.targets, config.layers)
    sites = choice.sites
    found = trial_of(base)
    keep_less(base)
    topology = config.topology.build("topology")
    roles: dict[str, str] = {}
    for layer in sorted({site.layer for site in sites}):
        roles.update(topology.roles([site.name for site in sites if site.layer == layer]))
    plans = config.allocation.build("allocation").plan(sites, config.experts, config.shared, config.rank)
    plans = {s.name: _plain(plans[s.name], config) if _unrouted(topology.scope, roles[s.name]) else plans[s.name]
             for s in sites}  # fmt: skip
    device = next(base.parameters()).device
    state = ForwardState()
    groups = _groups(base, sites, plans, config, topology.scope or config.scope, gate, seed, state, found)
    mixer = config.mixer.build("mixer")
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
            _require_wishes(topology.wants, bank, len(plan.shared_ranks), f"topology {config.topology.name!r}")
        group = groups.get(_group_of(site, topology.scope or config.scope)) if plan.ranks else None
        if group is not None:
            _require_whole_blocks(site, group.router.heads)
            if group.site.name == site.name:
                _show(bank, group, len(plan.shared_ranks), config.scorer)
        module = kinds[role](
            base.get_submodule(site.name), site, bank, shared=len(plan.shared_ranks), group=group,
            mixer=MoLoRAConfig().mixer.build("mixer") if group is None else mixer, dropout=config.dropout,
            state=state, tokens=found.on_tokens(site.name),
        )  # fmt: skip
        parent, _, name = site.name.rpartition(".")
        setattr(base.get_submodule(parent), name, module)
        adapted[site.name] = module
    _join(adapted, found)
    experts = (
        *(f"shared{i}" for i in range(max(len(p.shared_ranks) for p in plans.values()))),
        *(f"e{i}" for i in range(max(len(p.ranks) for p in plans.values()))),
    )
    if head is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "head"))
            nn.init.normal_(head.weight, std=0.02)
        head.to(device)
    for part in [*adapted.values(), *groups.values()]:
        part.to(device)
    model = MoLoRAModel(base, adapted, {g.site.name: g for g in groups.values()}, experts, head, state, choice.remarks)
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


def _show(bank: Bank, group: RouteGroup, shared: int, scorer: MethodRef) -> None:
    """Let a router that reads the experts see those of its site."""
    if "experts" not in group.router.scorer.reads:
        return
    _require_wishes(group.router.scorer.wants, bank, shared, f"scorer {scorer.name!r}", "molora.scorer")
    group.__dict__["bank"] = bank


def _require_wishes(
    wants: Collection[Wish], bank: Bank, shared: int, part: str, where: str = "molora.topology"
) -> None:
    unmet = {
        "pairs": ("low-rank pairs", bank.kind != "pairs"),
        "equal_ranks": ("experts of one rank", len(set(bank.ranks)) > 1),
        "no_shared": ("no shared experts", shared > 0),
    }
    missing = [words for wish, (words, broken) in unmet.items() if wish in wants and broken]
    if missing:
        raise ConfigError(f"{part} needs {' and '.join(missing)}", where=where)


def _require_whole_blocks(site: Site, heads: int) -> None:
    if site.d_in % heads or site.d_out % heads:
        raise ConfigError(
            f"{heads} heads do not divide the {site.d_in} features in and {site.d_out} out of {site.name}",
            where="molora.scorer",
            mend="Set the scorer's splits to a number that divides both, or choose other molora.targets.",
        )


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
    base: nn.Module,
    sites: Sequence[Site],
    plans: Mapping[str, SitePlan],
    config: MoLoRAConfig,
    scope: str,
    gate: str,
    seed: int,
    state: ForwardState,
    found: Trial,
) -> dict[str, RouteGroup]:
    groups: dict[str, RouteGroup] = {}
    transforms = [ref.build("transform") for ref in config.transforms]
    selectors: dict[str, Selector] = {}  # routers that share one may share a call
    width = reading.width(base) if "base" in config.scorer.declared("scorer", "reads") else 0
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
        experts = len(plan.ranks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(seed, "gate", site.name))
            reads = config.scorer.declared("scorer", "reads")
            size = {"rank": plan.ranks[0]} if "experts" in reads else {}
            size |= {"width": width} if "base" in reads else {}
            scorer = config.scorer.build("scorer", d_in=site.d_in, n_experts=experts, **size)
        selector = config.selector
        if plan.top_k and not selector.declared("selector", "takes_k"):
            raise ConfigError(
                f"allocation {config.allocation.name!r} needs a selector with k, which {selector.name!r} does not have",
                where="molora.selector",
                mend=f"Use selector {registry.those('selector', takes_k=True)}, or another allocation.",
            )
        if "k" in selector.params or plan.top_k:
            k = min(plan.top_k or selector.params["k"], experts)
            selector = MethodRef.model_validate({"name": selector.name, **selector.params, "k": k})
        built = selectors.get(selector.model_dump_json()) or selector.build("selector")
        selectors[selector.model_dump_json()] = built
        if experts == 1 and scope == "site" and _always_one(built, site):
            continue  # a lone expert whose weight is 1 whatever the scores: a plain LoRA has no router
        blend = config.blend.build("blend", d_in=site.d_in) if plan.shared_ranks else None
        kept = None if blend is None or blend.plain else blend
        router = Router(scorer, transforms, built, anchored=gate == "anchored", blend=kept)
        ranks = torch.tensor(plan.ranks, dtype=torch.float32)
        groups[key] = RouteGroup(router, site, state, ranks / ranks.mean(), found.on_tokens(site.name))
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


def _always_one(selector: Selector, site: Site) -> bool:
    """Whether a single expert gets weight 1 from any score."""
    scores = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1)
    ctx = RouteContext(x=torch.zeros(1, 3, 1), site=site)
    return bool((selector(scores, ctx).weights == 1).all())


def _initialise(model: MoLoRAModel, ref: MethodRef, seed: int) -> None:
    init = ref.build("init")
    for name, site in model.sites.items():
        for index, expert in enumerate(model.expert_ids(site)):
            drawn = "routed" if init.alike and index >= site.shared else expert
            site.bank.start(index, init, torch.Generator().manual_seed(seed_for(seed, name, drawn)))
