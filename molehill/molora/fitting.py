"""What parts of a site need of each other, and what building a model gives."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from molehill.config import MethodRef
from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import ConfigError
from molehill.molora.adapted import Adapted
from molehill.molora.banks import Bank, Mixer
from molehill.molora.blocks import Block
from molehill.molora.interfaces import Site, SitePlan, Wish
from molehill.molora.routes import ForwardState, RouteGroup


@dataclass
class Made:
    """What was put into a base.

    Attributes:
        sites: Everything with experts, by its name.
        groups: The routers.
        plans: What the sites got.
        state: What they share.
        blocks: The blocks that sites are banks of.
        remarks: See `molehill.molora.targets.Choice`.
    """

    sites: dict[str, Adapted]
    groups: list[RouteGroup]
    plans: list[SitePlan]
    state: ForwardState
    blocks: list[Block] = field(default_factory=list)
    remarks: tuple[str, ...] = ()


def show(bank: Bank, group: RouteGroup, shared: int, scorer: MethodRef) -> None:
    """Let a router that reads the experts see those of its site."""
    if "experts" not in group.router.scorer.reads:
        return
    require_wishes(group.router.scorer.wants, bank, shared, f"scorer {scorer.name!r}", "molora.scorer")
    group.__dict__["bank"] = bank


def mixer_of(config: MoLoRAConfig, bank: Bank, shared: int, *, routed: bool) -> Mixer:
    """What mixes the experts of a site: by default where no router weighs them.

    Args:
        config: Of the adapter.
        bank: Of the site.
        shared: Number of its always-on experts.
        routed: Whether a router weighs the others.

    Raises:
        ConfigError: The bank is not what the mixer wants.
    """
    if not routed:
        plain: Mixer = MoLoRAConfig().mixer.build("mixer")
        return plain
    ref = config.mixer
    mixer: Mixer = ref.build("mixer", **({"site": bank.site} if ref.declared("mixer", "fits") else {}))
    require_wishes(mixer.wants, bank, shared, f"mixer {ref.name!r}", "molora.mixer")
    return mixer


def require_wishes(wants: Collection[Wish], bank: Bank, shared: int, part: str, where: str = "molora.topology") -> None:
    """Refuse a bank that is not what a part of its site wants.

    Args:
        wants: What it wants.
        bank: The bank.
        shared: Number of its always-on experts.
        part: What to call it.
        where: Its key.

    Raises:
        ConfigError: The bank is something else.
    """
    unmet = {
        "pairs": ("low-rank pairs", bank.kind != "pairs"),
        "equal_ranks": ("experts of one rank", len(set(bank.ranks)) > 1),
        "no_shared": ("no shared experts", shared > 0),
        "vectors": ("experts with vectors", not bank.modulates),
    }
    missing = [words for wish, (words, broken) in unmet.items() if wish in wants and broken]
    if missing:
        raise ConfigError(f"{part} needs {' and '.join(missing)}", where=where)


def require_whole_blocks(site: Site, heads: int) -> None:
    """Refuse heads that do not divide what a site takes and gives.

    Raises:
        ConfigError: They do not.
    """
    if site.d_in % heads or site.d_out % heads:
        raise ConfigError(
            f"{heads} heads do not divide the {site.d_in} features in and {site.d_out} out of {site.name}",
            where="molora.scorer",
            mend="Set the scorer's splits to a number that divides both, or choose other molora.targets.",
        )
