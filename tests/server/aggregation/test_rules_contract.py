"""What every rule, space, lower and server optimiser must have and do, whoever adds it."""

from __future__ import annotations

import numpy as np
import pytest

from molehill import registry
from molehill_server.aggregation.interfaces import CoordRule

RULES = [method.name for method in registry.methods("rule")]
OPTS = [method.name for method in registry.methods("server_opt")]
LOWERS = [method.name for method in registry.methods("lower")]


def weights(rule, updates, glob):
    return [(weight.rest, dict(weight.experts)) for weight in rule.weights(updates, glob)]


def updates_of(kit, far=1.0, count=7):
    glob = kit.model()
    return glob, [kit.client(glob, seed, examples=10 + seed, far=far) for seed in range(count)]


@pytest.mark.parametrize("name", RULES)
def test_the_weights_of_a_sum_do_not_look_at_numbers(kit, name):
    rule = registry.build("rule", name)
    glob, updates = updates_of(kit)
    others = [kit.client(glob, 100 + seed, examples=10 + seed, far=5.0) for seed in range(len(updates))]
    others = [type(one)(one.client, other.tree, one.examples, one.tokens)
              for one, other in zip(updates, others, strict=True)]  # fmt: skip
    if rule.sums:  # a promise: a rule that keeps it without giving it is refused in more places than it must be
        assert rule.additive
        assert not isinstance(rule, CoordRule)
        assert weights(rule, updates, glob) == weights(rule, others, glob)


@pytest.mark.parametrize("name", RULES)
def test_every_update_and_every_expert_of_it_has_a_weight(kit, name):
    glob, updates = updates_of(kit)
    found = registry.build("rule", name).weights(updates, glob)
    assert len(found) == len(updates)
    for weight, update in zip(found, updates, strict=True):
        numbers = [weight.of(key) for key in update.tree]
        assert all(np.isfinite(number) and number >= 0 for number in numbers)
    assert any(weight.rest > 0 for weight in found)


@pytest.mark.parametrize("name", RULES)
def test_an_additive_rule_weighs_one_by_one_as_all_at_once(kit, name):
    rule = registry.build("rule", name)
    glob, updates = updates_of(kit)
    if rule.additive:
        alone = [weight for update in updates for weight in weights(rule, [update], glob)]
        assert alone == weights(rule, updates, glob)
    assert rule.least >= 1


@pytest.mark.parametrize("name", OPTS)
def test_an_optimiser_keeps_and_moves_what_it_says(kit, name):
    opt = registry.build("server_opt", name)
    glob, (update, *_) = updates_of(kit)
    new = update.tree
    old = glob.tree.select(lambda key: key in new)
    _, state = opt.apply(old, new, frozenset(new), {})
    tree, state = opt.apply(old, new, frozenset(new), state)  # some do nothing of their own in the first round
    assert bool(state) is opt.stateful
    assert np.allclose(tree.flat, new.flat, rtol=1e-6) is not opt.moves


@pytest.mark.parametrize("name", LOWERS)
def test_a_lower_that_restarts_or_patches_says_so(name):
    lower = registry.build("lower", name)
    assert lower.needs_products or not (lower.tails or lower.restarts)
    assert not (lower.restarts and lower.fixed_gauge)
