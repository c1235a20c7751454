"""Experts by their places among a router's logits: the graph chooses those that training's router chooses."""

from __future__ import annotations

import json

import edge_export
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from molehill.cli import app
from molehill.errors import AnswerError
from molehill_edge import Bundle, InsecureLocal
from molehill_edge.gates import PLACES

# relative error at most: that of a mixture of all experts in the same bits, see test_export_parity
LIMITS = {"fp32": 1e-8, "int8": 0.08, "int4": 0.5}


def _first(opened, ids, mask, places):
    """Weights of the first router."""
    given = {"input_ids": ids.numpy(), "attention_mask": mask.long().numpy(), PLACES: np.array(places)}
    return opened.run(["route.0"], {**given, **edge_export.no_past(opened, len(ids))})[0]


@pytest.mark.parametrize(
    ("architecture", "selector", "schemes"),
    [("llama", {"name": "top_k", "k": 2}, ("fp32", "int8", "int4")), ("bert", "dense", ("fp32", "int8", "int4"))],
)
def test_places_choose_as_in_training(architecture, selector, schemes):
    keys = {"targets": "all-linear", "experts": 4, "rank": 4, "scope": "layer", "selector": selector}
    model, section = edge_export.adapted(architecture, **keys)
    ids, mask = edge_export.batch(architecture, rows=3)
    own = edge_export.original(model, ids, mask)
    for scheme in schemes:
        limit = LIMITS[scheme]
        plain = edge_export.session(model, section, architecture, scheme)
        opened = edge_export.session(model, section, architecture, scheme, by_places=True)
        assert PLACES not in {each.name for each in plain.get_overridable_initializers()}
        unasked = edge_export.exported(opened, ids, mask)
        assert (unasked == edge_export.exported(plain, ids, mask)).all()
        assert edge_export.error(own, unasked) < limit
        for places in ((0, 1), (2, 3), (1, 4)):
            for group in model.routers.values():
                group.overrides.ranks = places
            wanted = edge_export.original(model, ids, mask)
            for group in model.routers.values():
                group.overrides.ranks = None
            found = edge_export.exported(opened, ids, mask, **{PLACES: np.array(places)})
            assert edge_export.error(wanted, found) < limit, (scheme, places)
            assert np.abs(found - unasked).max() > 1e-2
            shares = _first(opened, ids, mask, (0, 4))  # a router of the first layer reads what no choice changes
            chosen = np.argsort(np.argsort(-shares, kind="stable"))
            left = np.where((chosen >= places[0]) & (chosen < places[1]), shares, 0)
            found = _first(opened, ids, mask, places)
            assert found == pytest.approx(left / left.sum(-1, keepdims=True), abs=1e-5)


def test_equal_logits_keep_their_order():
    model, section = edge_export.adapted("llama", targets="all-linear", experts=4, rank=4, scope="layer")
    with torch.no_grad():
        for group in model.routers.values():
            for parameter in group.router.scorer.parameters():
                parameter.zero_()
    opened = edge_export.session(model, section, "llama", by_places=True)
    feed = {"input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64), PLACES: np.array([1, 2])}
    (weights,) = opened.run(["route.0"], {**feed, **edge_export.no_past(opened, 1)})
    assert weights.tolist() == [[[0.0, 1.0, 0.0, 0.0]] * 3]


def test_a_bundle_has_them_when_asked_to(tmp_path):
    keys = {"targets": "all-linear", "experts": 4, "rank": 4, "selector": "top_k"}
    edge_export.write(tmp_path / "plain", "llama", "int8", adapter=tmp_path / "adapter", **keys)
    words = ["export", tmp_path / "adapter", "--out", tmp_path / "asked", "--router-ranks", "--force"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    for name, has in (("plain", False), ("asked", True)):
        words = ["edge", "info", str(tmp_path / name), "--insecure-local"]
        assert json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["router_ranks"] is has
        assert ("(router_ranks)" in CliRunner().invoke(app, words).stdout) is has
    weak = {"strategy": "self_contrast", "params": {"beta": 9.0}, "max_new_tokens": 8}
    with Bundle.open(tmp_path / "asked", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        own = bundle.generate("the scene", max_new_tokens=8)
        assert bundle.generate("the scene", **weak).text != own.text
    with Bundle.open(tmp_path / "plain", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        assert bundle.generate("the scene", max_new_tokens=8) == own  # it changes nothing unless it is used
        with pytest.raises(AnswerError, match="Export it with --router-ranks"):
            bundle.generate("the scene", **weak)
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "adapter"), "--gguf", "x", "--router-ranks"])
    assert refused.exit_code == 2
    assert "--router-ranks: a LoRA for llama.cpp has no such thing" in " ".join(refused.stderr.split())
