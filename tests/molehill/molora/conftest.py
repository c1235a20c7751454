"""Builders of routes for the tests of routing methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from molehill.molora.interfaces import Route, RouteContext, RouteRecord, Site

SITE = Site(layer=0, name="layers.0.mlp.up_proj", n_layers=4, d_in=8, d_out=8)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def context() -> Callable[..., RouteContext]:
    def build(**values: object) -> RouteContext:
        values.setdefault("x", torch.zeros(1, 1, SITE.d_in))
        return RouteContext(site=SITE, **values)  # type: ignore[arg-type]

    return build


@pytest.fixture
def record() -> Callable[..., RouteRecord]:
    def build(route: Route, mask: Tensor | None = None, **values: object) -> RouteRecord:
        values.setdefault("costs", torch.ones(route.logits.shape[-1]))
        values.setdefault("site", SITE)
        return RouteRecord(route=route, mask=mask, **values)  # type: ignore[arg-type]

    return build
