"""Routers from configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from molehill import registry
from molehill.config import MethodRef
from molehill.config import MoLoRA as MoLoRAConfig
from molehill.errors import ConfigError
from molehill.molora import reading
from molehill.molora.interfaces import LogitTransform, RouteContext, Selector, Site, SitePlan
from molehill.molora.model import seed_for
from molehill.molora.router import Router


class RouterMaker:
    """Makes the routers of one model.

    Args:
        base: The base.
        config: Of the adapter.
        gate: Gate policy, see `molehill.molora.build.wrap`.
        seed: That of the start values.
    """

    def __init__(self, base: nn.Module, config: MoLoRAConfig, gate: str, seed: int) -> None:
        self._config, self._anchored, self._seed = config, gate == "anchored", seed
        self._transforms: list[LogitTransform] = [ref.build("transform") for ref in config.transforms]
        self._selectors: dict[str, Selector] = {}  # routers that share one may share a call
        reads = config.scorer.declared("scorer", "reads")
        self._width = reading.width(base) if "base" in reads else 0
        if "prompt" in reads:
            self._width = base.get_input_embeddings().weight.shape[1]  # type: ignore[operator]  # as above

    def router(
        self, site: Site, plan: SitePlan, *, alone: bool = True, further: Sequence[LogitTransform] = ()
    ) -> Router | None:
        """The router of a site's routed experts, of which there is one at least.

        Args:
            site: Where it sits; its start values depend on the name.
            plan: What the site has.
            alone: No other site shares the router.
            further: Act on the logits after the transforms that are configured.

        Returns:
            The router; None where a lone expert has weight 1 whatever the scores: a plain LoRA has no router.

        Raises:
            ConfigError: The allocation wants a k, and the selector has none.
        """
        config, experts = self._config, len(plan.ranks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self._seed, "gate", site.name))
            reads = config.scorer.declared("scorer", "reads")
            size = {"rank": plan.ranks[0]} if "experts" in reads else {}
            size |= {"width": self._width} if reads & {"base", "prompt"} else {}
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
        known = selector.model_dump_json()
        built = self._selectors.get(known) or selector.build("selector")
        self._selectors[known] = built
        if experts == 1 and alone and _always_one(built, site):
            return None
        blend = config.blend.build("blend", d_in=site.d_in) if plan.shared_ranks else None
        kept = None if blend is None or blend.plain else blend
        return Router(scorer, (*self._transforms, *further), built, anchored=self._anchored, blend=kept)


def _always_one(selector: Selector, site: Site) -> bool:
    """Whether a single expert gets weight 1 from any score."""
    scores = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1)
    ctx = RouteContext(x=torch.zeros(1, 3, 1), site=site)
    return bool((selector(scores, ctx).weights == 1).all())
