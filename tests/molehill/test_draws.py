"""What selectors say of how they draw, which privacy and secure aggregation count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from molehill import registry
from molehill.config import MethodRef
from molehill.draws import drawn, poisson
from molehill.errors import ConfigError

SELECTORS = [method.name for method in registry.methods("client_selector")]
POOL = [f"client-{number}" for number in range(10)]


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_draws_as_it_says(name):
    ref = MethodRef(name=name)
    chosen = {
        seed: [
            ref.build("client_selector", pool=POOL, round_number=number, attempt=0, seed=seed)
            for number in range(1, 41)
        ]
        for seed in (1, 2)
    }
    sizes, found = {len(each) for each in chosen[1]}, drawn(ref)
    assert (found is None) is (chosen[1] == chosen[2])
    if found is not None:
        assert (len(sizes) == 1) is (found.sampling == "fixed")
        assert (poisson(ref) is not None) is (found.sampling == "poisson")
    if each := poisson(ref):
        assert sum(map(len, chosen[1])) / 400 == pytest.approx(each.rate, abs=0.1)


def test_what_has_a_rate_and_is_not_poisson_draws_nobody_by_itself(monkeypatch):
    @dataclass(frozen=True)
    class Params:
        rate: float = 0.5
        sampling: ClassVar[str] = "fixed"

    monkeypatch.setattr(registry, "parse_params", lambda *_: Params())
    assert drawn(MethodRef(name="any")) is not None
    assert poisson(MethodRef(name="any")) is None


@pytest.mark.parametrize(("declared", "of"), [("bernoulli", "rate"), ("poisson", "fraction")])
def test_a_draw_that_nobody_can_count_is_an_error_and_not_one_of_so_many(monkeypatch, declared, of):
    kind = dataclass(frozen=True)(type("Params", (), {"__annotations__": {of: float}, of: 0.5, "sampling": declared}))
    monkeypatch.setattr(registry, "parse_params", lambda *_: kind())
    with pytest.raises(ConfigError, match=f"declares its draw as '{declared}'"):
        drawn(MethodRef(name="any"))
