"""Blocks with banks beside them, from configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import ConfigError
from molehill.molora.blocks import Block, BlockBank, From, Span
from molehill.molora.feed_forward import choose_blocks, mixtures
from molehill.molora.fitting import Made, mixer_of, require_whole_blocks, require_wishes, show
from molehill.molora.gain import Gain
from molehill.molora.interfaces import Site, SitePlan
from molehill.molora.recompute import keep_less
from molehill.molora.router_maker import RouterMaker
from molehill.molora.routes import ForwardState, RouteGroup
from molehill.molora.steps import BlockTopology, Step
from molehill.molora.trial import trial_of


def blocks_of(base: nn.Module, config: MoLoRAConfig, topology: BlockTopology, gate: str, seed: int) -> Made:
    """Put banks and routers beside the feed-forward blocks of a base.

    Raises:
        ModelError: The base has no such blocks.
        ConfigError: The parts do not fit each other.
    """
    if config.scope != "site":
        raise ConfigError(
            f"topology {config.topology.name!r} routes every step by itself, and scope {config.scope!r} shares routes",
            where="molora.scope",
            mend='Set molora.scope = "site".',
        )
    spans, steps = choose_blocks(base, config.targets, config.layers), topology.steps(config.experts)
    found = trial_of(base)
    keep_less(base)
    places = {(span, step.bank): _site(span, step) for span in spans for step in reversed(steps)}
    routed = {step.bank for step in steps if step.routed}
    allocation = config.allocation.build("allocation")
    planned = allocation.plan(
        [site for (_, bank), site in places.items() if bank in routed], config.experts, config.shared, config.rank
    )
    plans = dict(planned)
    if "base_route" in config.scorer.declared("scorer", "reads"):
        plans |= {site.name: _as_many(config, span, plans[site.name]) for (span, _), site in places.items()}
    own = {name.rpartition(".")[0]: part for name, part in mixtures(base).items()}
    maker = _Maker(base, config, topology, RouterMaker(base, config, gate, seed))
    made = Made({}, [], [], ForwardState())
    for span in spans:
        banks = {bank: (site, plans.get(site.name, SitePlan((), (config.rank,))))
                 for (other, bank), site in places.items() if other == span}  # fmt: skip
        calls = (True,) if span.first == span.last else found.on_tokens(span.last)
        maker.block(span, own.get(span.last), steps, banks, calls, made)
    return made


def _as_many(config: MoLoRAConfig, span: Span, plan: SitePlan) -> SitePlan:
    """A plan with an expert for each that the base has in the block.

    Raises:
        ConfigError: The base has none.
    """
    if not span.experts:
        raise ConfigError(
            f"scorer {config.scorer.name!r} goes by the base's own router, and {span.site.name} is no mixture",
            where="molora.scorer",
            mend="Give a base that is one (OLMoE, Mixtral, Qwen-MoE), or another scorer.",
        )
    return replace(plan, ranks=(plan.ranks[0],) * span.experts)


def _site(span: Span, step: Step) -> Site:
    """The place of a bank."""
    site = span.site
    if site.d_in % step.parts:
        raise ConfigError(
            f"the {site.d_in} features of {site.name} cannot be cut into {step.parts} parts",
            where="molora.topology",
            mend="Set a number of heads that divides them.",
        )
    name = f"{site.name}.bank{step.bank + 1}" if step.bank else site.name
    return site._replace(name=name, d_in=site.d_in // step.parts, d_out=site.d_out // step.parts)


class _Maker:
    def __init__(self, base: nn.Module, config: MoLoRAConfig, topology: BlockTopology, routers: RouterMaker) -> None:
        self._base, self._config, self._topology, self._routers = base, config, topology, routers

    def block(
        self, span: Span, own: nn.Module | None, steps: Sequence[Step],
        planned: Mapping[int, tuple[Site, SitePlan]], calls: tuple[bool, ...], made: Made,
    ) -> None:  # fmt: skip
        """Put the banks of one block beside it, and watch its own experts."""
        config = self._config
        groups: list[RouteGroup | None] = []
        for at, step in enumerate(steps):
            site, plan = planned[step.bank]
            if any(each.bank == step.bank for each in steps[:at]):  # a further router of the bank
                site = site._replace(name=f"{site.name}.step{at + 1}")
            further = (From(step.first),) if step.first else ()
            router = self._routers.router(site, plan, further=further) if step.routed else None
            if router is not None:
                require_whole_blocks(site, router.heads)
            groups.append(
                None if router is None else RouteGroup(router, site, made.state, plan.costs, calls, step.parts)
            )
        banks = []
        for number, (site, plan) in sorted(planned.items()):
            bank = config.expert.build("expert", site=site, ranks=plan.shared_ranks + plan.ranks, alpha=config.alpha)
            require_wishes(self._topology.wants, bank, len(plan.shared_ranks), f"topology {config.topology.name!r}")
            mine = [group for group, step in zip(groups, steps, strict=True) if group and step.bank == number]
            for group in mine:
                show(bank, group, len(plan.shared_ranks), config.scorer)
            banks.append(
                BlockBank(
                    span, site, bank, mine, shared=len(plan.shared_ranks), dropout=config.dropout, state=made.state,
                    mixer=mixer_of(config, bank, len(plan.shared_ranks), routed=bool(mine)), tokens=calls,
                    gain=None if plan.gated is None else Gain(plan.gated),
                )
            )  # fmt: skip
            made.sites[site.name] = banks[-1]
            made.plans.append(plan)
        made.groups.extend(group for group in groups if group is not None)
        last = self._base.get_submodule(span.last)
        first = None if span.first == span.last else self._base.get_submodule(span.first)
        block = Block(last, first, own, span, self._topology, steps, banks, groups)
        parent, _, name = span.last.rpartition(".")
        setattr(self._base.get_submodule(parent), name, block)
        made.blocks.append(block)
