"""The adapter folder of a finished run is the model that was measured, for Molehill and for plain peft."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_world import events

from molehill.config import load
from molehill.molora.adapter import load_adapter, read_manifest
from molehill.molora.build import wrap
from molehill.molora.head import Head
from molehill.tasks.base_model import load_base
from molehill.tasks.batches import eval_batches
from molehill.tasks.metrics import ScoreSum
from molehill_simulation.world import open_world

RUNS = {
    "fedit": {},
    "fedex": {"federation": {"preset": "fedex"}},
    "flora": {"federation": {"preset": "flora"}},
    "ia3": {"molora": {"preset": "mov", "targets": ["key", "intermediate.dense"]}},
    "shared": {"molora": {"shared": 1}},
}


def fresh(out):
    """A model built from nothing but the folder and the base it names."""
    config = load(out / "config.toml")
    manifest = read_manifest(out / "adapter")
    base = load_base(config.base, config.task)
    head = Head(base.model.config.hidden_size, len(manifest.labels), manifest.pooling, anchored=False)
    model = wrap(base.model, manifest.molora, head=head, seed=99)
    load_adapter(out / "adapter", model, base_digest=base.info.digest)
    return model.eval()


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_model_has_the_global_scores_of_the_run(finished, name):
    _, out = finished(train={"steps": 6, "lr": 3e-2}, **RUNS[name])
    model = fresh(out)
    world = open_world(load(out / "config.toml"))
    evaluations = {event["client"]: event for event in events(out, "evaluation")}
    losses = set()
    for owner in world.owners:
        score = ScoreSum(classes=3)
        with torch.no_grad():
            for batch in eval_batches(world.task.encode(owner.test), 64, world.task, 0):
                forward = model(batch.input_ids, batch.attention_mask, batch.labels)
                score.add(forward)
        found, told = score.scores(), evaluations[owner.name]["stages"]["global"]
        assert (found.n, found.accuracy) == (told["n"], told["accuracy"])
        assert found.loss == pytest.approx(told["loss"], rel=1e-4)
        losses.add(round(found.loss, 3))
    assert len(losses) > 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["fedit", "fedex", "ia3"])
def test_an_expert_of_a_run_loads_in_plain_peft(finished, bert, name):
    _, out = finished(train={"steps": 6, "lr": 3e-2}, **RUNS[name])
    model = fresh(out)
    ids = torch.arange(5, 17).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    plain = transformers.AutoModel.from_pretrained(bert, add_pooling_layer=False)
    with torch.no_grad():
        base = plain(ids).last_hidden_state
    for index, expert in enumerate(model.experts):
        for group in model.routers.values():
            group.overrides.expert_mask = torch.arange(len(model.experts)) == index
        loaded = peft.PeftModel.from_pretrained(
            transformers.AutoModel.from_pretrained(bert, add_pooling_layer=False), out / "adapter" / "experts" / expert
        )
        with torch.no_grad():
            want = loaded(ids).last_hidden_state
            found = model.hidden(ids, mask)
        assert (want - base).abs().max() > 1e-3
        np.testing.assert_allclose(found.numpy(), want.numpy(), atol=2e-5)
