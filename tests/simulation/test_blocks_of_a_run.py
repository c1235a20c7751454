"""Experts beside blocks in a federation: all that is shared moves, nothing else leaves, and the adapter comes back."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_world
import torch
from verbs import ask, verb

from molehill.errors import ModelError
from molehill.wire.store import load_tree
from molehill_export.as_one import alone, as_lora, as_peft, fold
from molehill_export.commands.export import export
from molehill_simulation.loaded import load
from molehill_simulation.simulate import simulate
from molehill_simulation.source import open_source

TEXTS = ["the scene was very good", "it was a dull page and so poor"]
KINDS = {
    "beside": {"topology": "beside", "expert": {"name": "bottleneck", "source": "input"}},
    "chain": {"topology": "chain", "shared": 1},
    "product": {"topology": "product", "shared": 1, "blend": "by_token"},
    "multi_head": {"topology": {"name": "multi_head", "heads": 2}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_world.save_base(tmp_path_factory.mktemp("blocks") / "base", "bert")


@pytest.mark.parametrize("molora", KINDS.values(), ids=KINDS)
def test_all_that_is_shared_moves_and_nothing_else_leaves(molora, base, tmp_path):
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(120))
    config = tiny_world.config(
        base, source, data={"clients": 2}, molora={"targets": "all-linear", "selector": "dense", **molora}
    )
    simulate(config, tmp_path / "run")
    (start, _), (end, _) = (load_tree(tmp_path / "run" / f"{name}.safetensors") for name in ("initial", "final"))
    shared = {key for key in start.layout if not key.residual}
    assert shared == set(end.layout)
    assert {key.site for key in shared} >= {"encoder.layer.0", "head"}
    assert [key.name for key in shared if np.array_equal(start[key], end[key])] == []
    with load(tmp_path / "run") as model:
        asked = [each.probabilities for each in model.predict(TEXTS)]
    with load(tmp_path / "run" / "adapter", base=str(base)) as model:
        assert [each.probabilities for each in model.predict(TEXTS)] == asked
    ask(verb(export), tmp_path / "run", "--out", tmp_path / "bundle")


def test_no_lora_of_a_linear_is_that(base, tmp_path):
    source = tiny_world.write_rows(tmp_path / "rows.jsonl", tiny_world.rows(60))
    config = tiny_world.config(
        base, source, run={"rounds": 1}, data={"clients": 2}, molora={"targets": "all-linear", "topology": "beside"}
    )
    simulate(config, tmp_path / "run")
    model = open_source(tmp_path / "run").model
    for way in (as_lora, as_peft, fold):
        with pytest.raises(ModelError, match=r"beside a whole block are no change of a linear.*Export a bundle"):
            way(model, alone(model, "e0"))
