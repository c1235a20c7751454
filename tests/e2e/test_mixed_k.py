"""Clients with different numbers of experts per token, which are shared; gates stay with clients."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
import torch

from molehill.errors import ConfigError
from molehill.wire.store import load_tree
from molehill_edge import Bundle, InsecureLocal
from molehill_export.export import Options, export
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

WHOLE = {"name": "top_k", "renorm": "none"}  # or a lone expert's weight is 1 whatever the gate says


@pytest.fixture(scope="module")
def out(bert, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mixed_k")
    source = tiny_world.write_rows(folder / "rows.jsonl", tiny_world.rows(120))
    config = tiny_world.config(
        bert, source,
        molora={"experts": 4, "expert": "bottleneck", "targets": ["output.dense"], "selector": WHOLE},
        personal={"gate": "personal", "steps": 0},
        federation={"policy": {"name": "mixed_k", "ks": [1, 3]}},
        wire={"up": "fp32", "down": "fp32"},
        engine={"together": 3},
    )  # fmt: skip
    simulate(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def source(out):
    return open_source(out)


def chosen(model):
    """How many experts every token has, over all sites; one number where all have the same."""
    model.state.collect = True
    tokens = torch.arange(4, 16).view(2, 6)
    model.eval()(tokens, torch.ones_like(tokens), torch.zeros(2, dtype=torch.int64))
    counts = {n for record in model.state.records for n in (record.route.weights > 0).sum(-1).flatten().tolist()}
    model.state.collect = False
    return counts


def test_every_client_has_the_number_it_can_afford_and_keeps_it(out, source):
    assert {name: state.k for name, state in tiny_world.states(out).items() if name.endswith("/2")} == {
        "client-1/2": 1, "client-2/2": 3, "client-3/2": 1,
    }  # fmt: skip
    for name, k in {"client-1": 1, "client-2": 3, "client-3": 1}.items():
        with source.gate(name) as model:
            assert chosen(model) == {k}
    assert chosen(source.model) == {2}


def test_experts_are_shared_and_gates_stay(out):
    final, start = (load_tree(out / name)[0] for name in ("final.safetensors", "initial.safetensors"))
    experts = {key for key in final if key.kind == "dense"}
    assert {key.expert for key in experts} == {"e0", "e1", "e2", "e3"}
    assert any(not np.array_equal(final[key], start[key]) for key in experts)
    states = [state.tree for name, state in tiny_world.states(out).items() if name.endswith("/2")]
    assert all({key.kind for key in tree} >= {"gate"} and not {*tree} & experts for tree in states)
    gates = [key for key in states[0] if key.kind == "gate"]
    assert all(np.array_equal(final[key], start[key]) for key in gates)
    assert len({tuple(np.concatenate([tree[key].ravel() for key in gates])) for tree in states}) == 3
    assert not any(event["quarantined"] for event in tiny_world.events(out, "round"))


def logits(model, ids):
    """Of one text, ``[C]``."""
    tokens = torch.tensor([ids])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    model.eval()
    model.state.announce(mask)
    with torch.no_grad():
        return model.head(model.head.pool(model.hidden(tokens, mask), mask))[0].numpy()


def test_a_bundle_of_one_client_has_the_number_of_that_client(source, tmp_path):
    export(source, tmp_path / "b", Options(scheme="fp32", gates=("client-2",), force=True))
    with Bundle.open(tmp_path / "b", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        ids = bundle.encode("the scene was very good")
        (found,) = bundle.logits([ids])
    with source.gate("client-2") as model:
        three = logits(model, ids)
        model.use_k(None)
        two = logits(model, ids)
    np.testing.assert_allclose(found, three, atol=1e-5)
    assert np.abs(two - three).max() > 1e-3


def test_a_bundle_has_one_number_of_experts(source, tmp_path):
    with pytest.raises(ConfigError, match="client-2 has another number of experts per token than client-1"):
        export(source, tmp_path / "b", Options(gates=("client-1", "client-2")))
