"""The table of combinations that cannot work."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from toy_federation import config

from molehill import config as configuration
from molehill import registry
from molehill.errors import ConfigError
from molehill.molora.banks import PairBank
from molehill_server.check import check, require
from molehill_server.planning.planner import shares

PRESETS = [method.name for method in registry.methods("federation")]
POLICIES = [method.name for method in registry.methods("policy")]
SERVER_OPTS = [method.name for method in registry.methods("server_opt")]
NO_OPT = {
    "svd",
    "merge_restart",
    "residual",
    "chain_of_loras",
}  # lowers whose factors are made anew or go with their patch


def refusals(**sections):
    return [conflict for conflict in check(config(**sections)) if conflict.verdict == "refuse"]


def adapter(preset):
    """The adapter that is a part of a published method of federation."""
    return {"preset": preset} if preset in {method.name for method in registry.methods("preset")} else {}


def assert_real(keys):
    """Every one is a dotted key of the configuration."""
    assert keys
    for key in keys:
        section, _, name = key.partition(".")
        assert name in type(getattr(config(), section)).model_fields, key


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_works_as_published(preset):
    assert refusals(federation={"preset": preset}, molora=adapter(preset), run={"rounds": 6}) == []


@pytest.mark.parametrize(("preset", "policy", "opt"), list(product(PRESETS, POLICIES, SERVER_OPTS)))
def test_every_pair_is_accepted_or_refused_with_the_right_reason(preset, policy, opt):
    federation = {"preset": preset, "policy": policy, "server_opt": opt}
    settings = config(federation=federation, molora=adapter(preset), run={"rounds": 6})
    found = [conflict for conflict in check(settings) if conflict.verdict == "refuse"]
    federation = settings.federation
    one, two = shares(settings, 1), shares(settings, 2)
    both = one.A == one.B == two.A == two.B == "shared"
    products = federation.space.name in {"product", "stack"}
    kept = {"shared", "frozen"} if federation.space.name == "common" else {"shared"}  # what the server may make anew
    fixed = federation.space.params.get("factor")  # of space common
    no_common = fixed is not None and any(
        decided.A == decided.B == "shared"
        or (fixed == "A" and decided.A == "shared")
        or decided.B == "personal" != decided.A
        for decided in (one, two)
    )
    forms = federation.assign.declared("assignment", "forms")
    bad = (
        (products and not both)
        or (federation.lower.name != "none" and not {one.A, one.B, two.A, two.B} <= kept)
        or (federation.lower.name in NO_OPT and opt != "none")
        or (federation.space.name == "common" and bool(one.ranks))
        or (federation.rule.name == "norm_weights" and one.B == "personal")
        or no_common
        or (bool(one.ks) and not settings.molora.selector.declared("selector", "takes_k"))
        or (bool(one.ks) and settings.molora.scorer.declared("scorer", "weighs") == "best")
        or (forms and not (one.B == two.B == "shared" and one == two and one.gate is None))
        or (federation.assign.declared("assignment", "leans") and one.gate is not None)  # no part of it is a client's
    )
    assert bool(found) == bad, found
    for conflict in found:
        assert len(conflict.why) > 40
        assert_real(conflict.keys)
    if found:
        with pytest.raises(ConfigError, match="federation"):
            require(settings)
    else:
        require(settings)


@pytest.mark.parametrize(
    ("molora", "keys"),
    [
        ({"mixer": "param"}, {("molora.mixer", "molora.scorer")}),
        ({"preset": "poly"}, set()),
        ({"preset": "poly", "shared": 1}, set()),
        ({"preset": "poly", "allocation": {"name": "hetero_rank"}}, {("molora.mixer", "molora.allocation")}),
        (
            {"preset": "poly", "shared": 1, "allocation": {"name": "fine_grained", "m": 2}},
            {("molora.mixer", "molora.allocation"), ("molora.allocation", "molora.selector")},
        ),
        ({"allocation": "fine_grained"}, set()),
        ({"allocation": "fine_grained", "selector": "gw"}, set()),
        ({"allocation": "fine_grained", "selector": "dense"}, {("molora.allocation", "molora.selector")}),
        ({"preset": "mhr"}, set()),
        ({"preset": "mhr", "mixer": "output"}, {("molora.mixer", "molora.scorer")}),
        ({"scorer": {"name": "task_table", "splits": 1}}, set()),
        ({"preset": "poly", "topology": "block_ffn"}, {("molora.mixer", "molora.topology")}),
        ({"preset": "poly", "expert": "ia3"}, {("molora.mixer", "molora.expert")}),
        ({"preset": "mixlora"}, set()),
        ({"preset": "mixlora", "allocation": "hetero_rank"}, {("molora.topology", "molora.allocation")}),
        ({"preset": "mixlora", "shared": 1}, {("molora.topology", "molora.shared")}),
        ({"preset": "hmoe"}, set()),
        (
            {"experts": 3, "allocation": {"name": "hetero_rank", "kind": "explicit", "ranks": [1, 2]}},
            {("molora.allocation", "molora.experts")},
        ),
    ],
)
def test_experts_that_are_stacked_or_mixed_have_one_shape(molora, keys):
    assert {conflict.keys for conflict in refusals(molora=molora)} == keys


OWN_ASSIGNMENT = [name for name in PRESETS if "assign" in registry.build("federation", name)]
DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"


@pytest.mark.parametrize("preset", OWN_ASSIGNMENT)
def test_a_preset_that_is_an_assignment_is_no_other_beside_it(preset):
    """On a configuration that writes its assignment out, and names what the adapter of the preset has otherwise."""
    said = [f"federation.preset={preset}"]
    (conflict,) = (each for each in check(configuration.load(DEMO, said)) if each.verdict == "refuse")
    assert conflict.keys == ("federation.preset", "federation.assign")
    mends = re.findall(r"([a-z]+\.[a-z]+) = (\{.*?\}|\".*?\")", conflict.why)
    assert {"federation.assign", "molora.scorer"} <= dict(mends).keys()
    mended = configuration.load(DEMO, [*said, *("=".join(each) for each in mends)])
    published = config(federation={"preset": preset})
    assert mended.federation == published.federation
    assert mended.molora.scorer == published.molora.scorer
    assert not [each for each in check(mended) if each.verdict == "refuse"]
    assert refusals(federation={"preset": preset, "assign": "none"})


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in OWN_ASSIGNMENT])
def test_a_preset_that_cannot_have_an_assignment_says_how_to_go_without(preset):
    def refused(*said):
        found = check(configuration.load(DEMO, [f"federation.preset={preset}", *said]))
        return [each for each in found if each.verdict == "refuse" and "federation.assign" in each.keys]

    assert all("assignment 'none', and with it another init than 'alike'" in each.why for each in refused())
    assert bool(refused()) == (preset in {"fedpeft", "fedsa", "local"})
    assert not refused("federation.assign=none", "molora.init=lora")


@pytest.mark.parametrize(
    ("molora", "keys"),
    [
        ({}, set()),
        ({"selector": "gw"}, set()),
        ({"selector": "dense"}, {("federation.policy", "molora.selector")}),
        ({"experts": 1}, {("federation.policy", "molora.experts")}),
        ({"preset": "deepseek"}, {("federation.policy", "molora.allocation")}),
        ({"allocation": {"name": "fine_grained", "m": 2}}, {("federation.policy", "molora.allocation")}),
        ({"allocation": "hetero_rank"}, set()),
    ],
)
def test_clients_with_numbers_of_experts_of_their_own_have_routers_that_take_one(molora, keys):
    assert {conflict.keys for conflict in refusals(molora=molora, federation={"policy": "mixed_k"})} == keys


@pytest.mark.parametrize(("preset", "fits"), [("fedex", False), ("flora", False), ("flexlora", True), ("fedit", True)])
def test_patches_are_of_single_experts(preset, fits):
    federation = {"preset": preset}
    found = refusals(molora={"preset": "poly"}, federation=federation)
    assert [conflict.keys for conflict in found] == ([] if fits else [("federation.lower", "molora.mixer")])
    assert not refusals(molora={"preset": "mixlora"}, federation=federation)


@pytest.mark.parametrize(
    ("rule", "clients", "select", "keys"),
    [
        ({"name": "krum", "f": 2}, 7, "all", None),
        ({"name": "krum", "f": 2}, 6, "all", ("federation.rule", "data.clients")),
        ({"name": "krum", "f": 2}, 14, {"name": "random", "fraction": 0.5}, None),
        ({"name": "krum", "f": 2}, 12, {"name": "random", "fraction": 0.5}, ("federation.rule", "federation.select")),
        ({"name": "multi_krum", "f": 1}, 4, "all", ("federation.rule", "data.clients")),
        ({"name": "trimmed_mean", "f": 3}, 7, "all", None),
        ({"name": "trimmed_mean", "f": 3}, 6, "all", ("federation.rule", "data.clients")),
        ("median", 9, {"name": "round_robin", "count": 2}, ("federation.rule", "federation.select")),
        ("geometric_median", 2, "all", ("federation.rule", "data.clients")),
        ("mean", 1, "all", None),
    ],
)
def test_rules_against_poison_need_enough_clients(rule, clients, select, keys):
    space = {} if rule == "mean" else {"space": "product", "lower": "svd"}
    found = refusals(federation={"rule": rule, "select": select, **space}, data={"clients": clients})
    assert [conflict.keys for conflict in found] == ([keys] if keys else [])


def test_rules_against_poison_are_refused_in_factor_space():
    (conflict,) = refusals(federation={"rule": {"name": "krum", "f": 1}}, data={"clients": 8})
    assert "(B G, G^-1 A)" in conflict.why
    (conflict,) = refusals(federation={"rule": "median", "space": "product", "lower": "residual"})
    assert "full rank" in conflict.why


def test_routers_and_personal_gates():
    assert refusals(personal={"gate": "mixture"})
    assert not refusals(personal={"gate": "mixture"}, molora={"scorer": "mixture"})
    assert not check(config(molora={"scorer": "mixture"}))
    warned = check(config(federation={"preset": "flora"}))
    assert [conflict.verdict for conflict in warned] == ["warn"]
    assert not check(config(federation={"preset": "flora"}, personal={"gate": "global"}))


@pytest.mark.parametrize(
    ("sections", "warned"),
    [
        ({}, False),
        ({"personal": {"gate": "personal"}}, False),
        ({"personal": {"gate": "global"}}, True),
        ({"personal": {"gate": "split"}, "molora": {"preset": "adapter_fusion", "scorer": "mixture"}}, True),
        ({"personal": {"steps": 0}}, True),
    ],
)
def test_a_mixer_that_owners_fit_wants_them_to_fit(sections, warned):
    found = check(config(**{"molora": {"preset": "adapter_fusion"}, **sections}))
    assert [c.keys for c in found if "they fit nothing" in c.why] == [("molora.mixer", "personal.gate")] * warned


@pytest.mark.parametrize(("keys", "where"), [({"expert": "lora"}, "molora.expert"), ({"shared": 1}, "molora.shared")])
def test_compressed_experts_have_vectors_and_are_all_routed(keys, where):
    (refused,) = refusals(molora={"preset": "compressed_experts", **keys})
    assert refused.keys == ("molora.mixer", where)
    assert not refusals(molora={"preset": "compressed_experts"})


def test_nothing_to_train():
    head = {"policy": {"name": "fedpeft", "group": "head"}}
    assert not refusals(federation=head)
    assert "no head" in refusals(federation=head, task={"kind": "causal-lm"})[0].why
    assert "orth" in refusals(federation={"preset": "rolora"}, molora={"init": "orth"})[0].why
    assert not refusals(federation={"preset": "ffa"}, molora={"init": "orth"})


FACTORLESS = [method.name for method in registry.methods("expert") if not issubclass(method.target, PairBank)]
OF_FACTORS = {
    "fedamole": {("refuse", "molora.scorer")},
    "fedex": {("warn", "federation.space")},
    "fedit": set(),
    "fedpeft": set(),
    "fedsa": {("warn", "federation.policy")},
    "fedsvd": {("warn", "federation.policy"), ("warn", "federation.space")},
    "ffa": {("warn", "federation.policy"), ("warn", "federation.space")},
    "cola": {("warn", "federation.space")},
    "flexlora": {("warn", "federation.space")},
    "flora": {("warn", "federation.space")},
    "fedlease": {("refuse", "federation.assign")},
    "fedrouter": {("refuse", "federation.assign")},
    "hetlora": {("refuse", "federation.policy"), ("refuse", "federation.rule")},
    "local": set(),
    "rolora": {("warn", "federation.policy"), ("warn", "federation.space")},
}


@pytest.mark.parametrize("expert", FACTORLESS)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_acts_on_factors_says_so_of_experts_that_have_none(preset, expert):
    molora = {**adapter(preset), "expert": expert}
    found = check(config(federation={"preset": preset}, molora=molora, run={"rounds": 6}))
    assert {(conflict.verdict, conflict.keys[0]) for conflict in found} == OF_FACTORS[preset]
    for conflict in found:
        assert conflict.keys[-1] == "molora.expert"
        assert re.search(f"expert {expert!r} (has|does not have)", conflict.why)
        assert_real(conflict.keys)


@pytest.mark.parametrize("expert", FACTORLESS)
@pytest.mark.parametrize("rule", ["krum", "multi_krum", "geometric_median", "trimmed_mean", "median"])
def test_rules_against_poison_say_what_they_bound_of_experts_without_products(rule, expert):
    federation = {"rule": rule, "space": "product", "lower": "svd"}
    assert not check(config(federation=federation, data={"clients": 9}))
    (conflict,) = check(config(federation=federation, data={"clients": 9}, molora={"expert": expert}))
    assert (conflict.verdict, conflict.keys) == ("warn", ("federation.rule", "molora.expert"))
    assert "judged as they are" in conflict.why


@pytest.mark.parametrize("expert", FACTORLESS)
def test_nothing_is_refused_for_a_factor_that_is_not_there(expert):
    molora = {"expert": expert, "init": "orth"}
    found = check(config(federation={"preset": "rolora"}, molora=molora))
    assert {conflict.verdict for conflict in found} == {"warn"}
    assert "init 'orth' freezes a factor" in " ".join(conflict.why for conflict in found)
    for policy, space in (("rolora", "product"), ("ffa", "stack"), ("fedit", "common")):
        lower = "none" if space == "common" else "svd"
        federation = {"policy": policy, "space": space, "lower": lower}
        assert refusals(federation=federation)
        assert not refusals(federation=federation, molora={"expert": expert})
    private = {"clip": 0.5, "noise": 4.0, "epsilon": 50.0, "delta": 1e-5}
    assert not check(config(privacy=private, molora={"expert": expert}))


def test_only_a_head_is_no_language_model_whatever_the_experts():
    for expert in ("lora", *FACTORLESS):
        federation = {"policy": {"name": "fedpeft", "group": "head"}}
        found = refusals(federation=federation, task={"kind": "causal-lm"}, molora={"expert": expert})
        assert "no head" in found[0].why


@pytest.mark.parametrize("policy", ["fedit", "share_a"])
def test_a_policy_without_a_common_factor_is_refused_once(policy):
    (conflict,) = refusals(federation={"policy": policy, "space": "common"})
    assert policy in conflict.why


def test_the_server_sends_values_not_changes():
    assert "values" in refusals(wire={"down": "compeft"})[0].why
    assert not refusals(wire={"up": "compeft"})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"wire": {"down": "compeft"}}, r"^wire\.down: .* Change it\.$"),
        ({"federation": {"lower": "svd"}}, r"^federation\.space with federation\.lower: .* Change one of them\.$"),
    ],
)
def test_a_refusal_names_its_keys_and_what_to_change(sections, message):
    with pytest.raises(ConfigError, match=message):
        require(config(**sections))
    for conflict in refusals(**sections):
        assert_real(conflict.keys)


SECURE = {"secure_aggregation": True}


@pytest.mark.parametrize("preset", ["fedit", "ffa", "fedsa", "rolora", "fedpeft"])
@pytest.mark.parametrize("opt", ["none", "adam"])
def test_secure_aggregation_goes_with_sums_of_what_is_sent(preset, opt):
    assert refusals(privacy=SECURE, federation={"preset": preset, "server_opt": opt}) == []


@pytest.mark.parametrize(
    ("sections", "key", "why"),
    [
        ({"federation": {"preset": "flexlora"}}, "federation.space", "every client's own factors"),
        ({"federation": {"preset": "flora"}}, "federation.space", "every client's own factors"),
        ({"federation": {"preset": "fedex"}}, "federation.space", "every client's own factors"),
        (
            {"federation": {"preset": "ffa", "rule": {"name": "krum", "f": 1}}, "data": {"clients": 8}},
            "federation.rule",
            "looks at single updates",
        ),
        ({"federation": {"preset": "hetlora"}}, "federation.policy", "tensors of different shapes"),
        ({"federation": {"preset": "local"}}, "federation.policy", "nothing to hide"),
        ({"wire": {"up": "int4"}}, "wire.up", "8 bytes each; use 'fp32'"),
        ({"wire": {"up": "fp16"}}, "wire.up", "8 bytes each; use 'fp32'"),
        ({"wire": {"up": "compeft"}}, "wire.up", "8 bytes each; use 'fp32'"),
        ({"scenario": {"garbage": {"client-0": "nan"}}}, "scenario.garbage", "nobody can read"),
        ({"scenario": {"poison": {"client-0": -1.0}}}, "scenario.poison", "nobody can read"),
        ({"round": {"norm_bound": None}}, "round.norm_bound", "nothing bounds them"),
        ({"round": {"norm_bound": 1e15}}, "round.norm_bound", "binary places"),
        ({"data": {"clients": 2}}, "data.clients", "2 clients take part in a round"),
        (
            {"federation": {"select": {"name": "random", "fraction": 0.25}}, "data": {"clients": 8}},
            "federation.select",
            "2 clients take part in a round",
        ),
    ],
)
def test_secure_aggregation_refuses_what_looks_at_single_clients(sections, key, why):
    found = refusals(privacy=SECURE, **sections)
    (conflict,) = [conflict for conflict in found if key in conflict.keys and "privacy" in conflict.keys[0]]
    assert conflict.keys == ("privacy.secure_aggregation", key)
    assert why in conflict.why
    assert_real(conflict.keys)


def test_secure_aggregation_among_three_warns_that_none_may_drop_out():
    few = {"data": {"clients": 3}, "wire": {"up": "fp32"}, "privacy": SECURE}
    (conflict,) = [each for each in check(config(**few)) if each.verdict == "warn" and "data.clients" in each.keys]
    assert "none may drop out" in conflict.why
    assert not any("data.clients" in each.keys for each in check(config(**{**few, "data": {"clients": 4}})))


def test_secure_aggregation_goes_with_differential_privacy():
    private = {**SECURE, "clip": 0.5, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5, "max_examples": 100}
    assert refusals(privacy=private, federation={"preset": "ffa"}) == []
    assert refusals(privacy=private, federation={"preset": "ffa"}, round={"norm_bound": None}) == []


@pytest.mark.parametrize(
    ("privacy", "key"),
    [
        (SECURE, "privacy.secure_aggregation"),
        ({"clip": 0.5, "noise": 4.0, "epsilon": 30.0, "delta": 1e-5}, "privacy.clip"),
    ],
)
def test_probes_are_refused_where_the_server_may_learn_nothing_of_one_client(privacy, key):
    (conflict,) = [each for each in refusals(privacy=privacy, evaluate={"probes": ["load"]}) if key in each.keys]
    assert conflict.keys == ("evaluate.probes", key)
    assert "every client tells the server" in conflict.why
    assert_real(conflict.keys)
    assert refusals(evaluate={"probes": ["load"]}) == []


def test_a_cap_on_examples_needs_something_to_be_private():
    config(privacy={**SECURE, "max_examples": 10})
    with pytest.raises(ConfigError, match="clip, noise, epsilon, delta as well"):
        config(privacy={"max_examples": 10})
    with pytest.raises(ConfigError, match="privacy needs noise"):
        config(privacy={**SECURE, "clip": 1.0, "epsilon": 1.0, "delta": 1e-5})


def test_a_threshold_is_two_thirds_or_more():
    with pytest.raises(ConfigError, match=r"privacy\.threshold"):
        config(privacy={**SECURE, "threshold": 0.66})


def test_an_objective_that_trains_clients_one_by_one_is_told_where_that_undoes_a_setting(monkeypatch):
    settings = config(engine={"together": 4})
    assert check(settings) == []
    monkeypatch.setattr(registry.get("objective", settings.train.objective.name).target, "alone", True)
    (conflict,) = check(settings)
    assert (conflict.verdict, conflict.keys) == ("warn", ("engine.together", "train.objective"))
    assert check(config()) == []  # where it is left to us, nobody asked for it


def test_rows_without_a_task_are_told_to_a_scorer_that_routes_by_it():
    told = config(molora={"preset": "poly", "scorer": {"name": "task_table", "tasks": 3}})
    (conflict,) = check(told)
    assert (conflict.verdict, conflict.keys) == ("warn", ("molora.scorer", "data.columns"))
    assert check(config(molora={"preset": "poly"})) == []  # one task: nothing depends on it
    assert check(told.model_copy(update={"data": told.data.model_copy(update={"columns": {"task": "ward"}})})) == []


def test_a_blend_needs_experts_that_are_always_on():
    (conflict,) = refusals(molora={"blend": "scalar"})
    assert conflict.keys == ("molora.blend", "molora.shared")
    assert check(config(molora={"blend": "scalar", "shared": 1})) == []


def test_routes_by_domain_need_domains_and_a_selector_that_leaves_them():
    molora = {"preset": "context_peft"}
    (conflict,) = refusals(molora=molora)
    assert conflict.keys == ("molora.scorer", "data.columns")
    data = {"columns": {"domain": "d"}, "domains": ("a", "b")}
    assert check(config(molora=molora, data=data)) == []
    (conflict,) = refusals(molora=molora | {"selector": "dense"}, data=data)
    assert conflict.keys == ("molora.scorer", "molora.selector")
    assert "use selector 'given'" in conflict.why


@pytest.mark.parametrize(
    ("task", "train", "keys"),
    [
        ({"kind": "causal-lm"}, {"objective": "logit_adjust"}, ("train.objective", "task.kind")),
        ({"kind": "causal-lm", "class_weights": "balanced"}, {}, ("task.class_weights", "task.kind")),
    ],
)
def test_what_goes_by_classes_is_refused_where_there_are_none(task, train, keys):
    (conflict,) = refusals(task=task, train=train)
    assert conflict.keys == keys
    assert_real(conflict.keys)
    assert refusals(task={**task, "kind": "classification"}, train=train) == []


@pytest.mark.parametrize(
    ("train", "key", "why"),
    [
        ({"batch_size": 1}, "train.batch_size", "change nothing"),
        ({"objective": "logit_adjust"}, "train.objective", "favoured"),
    ],
)
def test_class_weights_that_do_nothing_or_too_much_are_told(train, key, why):
    (conflict,) = check(config(task={"class_weights": "balanced"}, train=train))
    assert (conflict.verdict, conflict.keys) == ("warn", ("task.class_weights", key))
    assert why in conflict.why
    assert not check(config(train=train))


@pytest.mark.parametrize(
    ("sections", "keys", "why"),
    [
        ({"task": {"kind": "causal-lm"}}, ("personal.head", "task.kind"), "no head of ours"),
        ({"task": {"kind": "strange"}}, ("personal.head", "task.kind"), "use 'anchored'"),
        ({"train": {"objective": "strange"}}, ("personal.head", "train.objective"), "'sft'"),
    ],
)
def test_a_head_is_computed_only_where_there_is_a_best_one(monkeypatch, sections, keys, why):
    computed = {"personal": {"head": "convex"}}
    if sections.get("task") == {"kind": "strange"}:
        monkeypatch.setattr(registry.get("task", "classification").target, "convex", False)
        sections = {}
    if "train" in sections:
        monkeypatch.setattr(registry.get("objective", "logit_adjust").target, "convex", False)
        sections = {"train": {"objective": "logit_adjust"}}
    (conflict,) = refusals(**sections, **computed)
    assert conflict.keys == keys
    assert why in conflict.why
    assert_real(conflict.keys)
    assert refusals(**sections) == []


def test_who_computes_a_head_that_the_policy_claims_is_told():
    (conflict,) = check(config(personal={"head": "convex"}, federation={"policy": "share_a"}))
    assert (conflict.verdict, conflict.keys) == ("warn", ("personal.head", "federation.policy"))
    assert check(config(personal={"head": "convex"})) == []
    assert check(config(personal={"head": "convex"}, train={"objective": "dft"})) == []  # then by the likelihood


EVERY = ["shared_model", "fitted_model", "own_adapter", "trained_alone"]


@pytest.mark.parametrize(
    ("sections", "keys", "why"),
    [
        ({"personal": {"candidates": EVERY[:2]}}, ("personal.candidates", "personal.holdout"), "set personal.holdout"),
        (
            {"personal": {"candidates": EVERY, "holdout": 0.2, "gate": "personal"}},
            ("personal.candidates", "personal.gate"),
            "no model that all share",
        ),
        (
            {"personal": {"candidates": EVERY, "holdout": 0.2, "head": "personal"}},
            ("personal.candidates", "personal.head"),
            "no model that all share",
        ),
        (
            {"personal": {"candidates": ["frozen_base", "shared_model"], "holdout": 0.2, "head": "global"}},
            ("personal.candidates", "personal.head"),
            "with head 'global' no owner has one of its own",
        ),
        (
            {"personal": {"candidates": ["frozen_base"]}, "federation": {"preset": "fedpeft"}},
            ("personal.candidates", "federation.policy"),
            "policy 'fedpeft' decides what becomes of the head, so no owner has one of its own",
        ),
        (
            {"personal": {"candidates": EVERY, "holdout": 0.2}, "federation": {"preset": "fedsa"}},
            ("personal.candidates", "federation.policy"),
            "policy 'share_a' leaves the head to every owner, so there is no model that all share",
        ),
        (
            {"personal": {"candidates": EVERY, "holdout": 0.2, "gate": "global"}, "federation": {"preset": "flora"}},
            ("personal.candidates", "federation.lower"),
            "candidate 'trained_alone' is without; leave it out",
        ),
    ],
)
def test_candidates_need_rows_that_no_round_sees_and_a_model_that_all_share(sections, keys, why):
    (conflict,) = refusals(**sections)
    assert conflict.keys == keys
    assert why in conflict.why
    assert_real(conflict.keys)
    personal = {"candidates": EVERY[:3], "holdout": 0.2, "gate": "global"}
    preset = {} if "federation.policy" in keys else sections.get("federation", {})
    assert refusals(**{**sections, "personal": personal, "federation": preset}) == []


@pytest.mark.parametrize("preset", ["fedsa", "local", "fedpeft"])
def test_a_head_that_a_policy_decides_is_none_to_fit_to_the_frozen_base(preset):
    personal = {"gate": "global", "head": "convex", "candidates": ["frozen_base"]}
    found = refusals(personal=personal, federation={"preset": preset})
    assert {each.keys for each in found} == {("personal.candidates", "federation.policy")}
    assert "candidate 'frozen_base' has no other; leave it out" in found[-1].why
    assert refusals(personal=personal) == []
    assert refusals(personal={**personal, "candidates": ["fitted_model"]}, federation={"preset": "fedpeft"}) == []


def test_where_a_policy_claims_what_an_owner_keeps_all_share_it():
    personal, claimed = {"candidates": ["fitted_model"], "gate": "personal"}, {"preset": "fedpeft"}
    assert refusals(personal=personal)
    assert refusals(personal=personal, federation=claimed) == []


def test_where_there_is_nothing_to_choose_no_rows_are_needed_for_it():
    assert refusals(personal={"candidates": ["frozen_base"]}) == []


def test_a_candidate_is_named_once():
    with pytest.raises(ConfigError, match=r"'shared_model'"):
        config(personal={"candidates": ["shared_model", "shared_model"], "holdout": 0.2})
