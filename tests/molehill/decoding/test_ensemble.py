"""Experts asked alone: how much each counts, and that their logits are averaged and not their weights."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

from molehill.decoding import options
from molehill.decoding.interfaces import OWN, Example, Setting
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses

PROMPT = [5, 9, 14, 3, 22]
TEXTS = {"e0": [[4, 4, 5], [4, 5, 4, 4]], "e1": [[20, 21], [21, 20, 20]], "e2": [[33, 30, 33], [30, 33]]}
ROWS = [Example(tuple(ids), (1,), {"expert": name}) for name, texts in TEXTS.items() for ids in texts]
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "bert"])


def _model(architecture="llama"):
    made = tiny_models.adapted(architecture, experts=3, rank=4, scope="layer", selector="dense")
    return tiny_models.separate(tiny_models.shake(made), 4.0)


def _strategy(**params):
    return options.build("decoding", "ensemble", params)


def _alone(model, name):
    passes = TorchPasses(model)
    return passes.logits(PROMPT, OWN if name == "own" else passes.only([name])).astype(np.float64)


@ARCHITECTURES
def test_all_alike_without_rows(architecture):
    model = _model(architecture)
    passes = TorchPasses(model)
    wanted = np.mean([_alone(model, name) for name in ("own", "e0", "e1", "e2")], 0)
    assert np.abs(_strategy().begin(passes, PROMPT)(PROMPT) - wanted).max() < 1e-4
    experts = np.mean([_alone(model, name) for name in passes.experts], 0)
    assert np.abs(_strategy(own=False).begin(passes, PROMPT)(PROMPT) - experts).max() < 1e-4
    assert np.abs(experts - wanted).max() > 1e-3


@ARCHITECTURES
def test_all_weight_on_one_is_that_expert(architecture):
    model = _model(architecture)
    passes = TorchPasses(model)
    strategy = _strategy(rows="rows", temperature=1e-4)
    strategy.learn(passes, ROWS)
    for place, (name, texts) in enumerate(TEXTS.items(), 1):
        assert strategy.weights(passes, texts[0])[place] == 1
        scores = strategy.begin(passes, texts[0])
        assert np.abs(scores(PROMPT) - _alone(model, name)).max() < 1e-4


@ARCHITECTURES
def test_averaging_logits_is_not_averaging_weights(architecture):
    model = _model(architecture)
    passes = TorchPasses(model)
    scores = _strategy(own=False).begin(passes, PROMPT)(PROMPT)
    model.use_uniform_gate(uniform=True)
    mixed = TorchPasses(model).logits(PROMPT)
    assert np.abs(scores - mixed).max() > 1e-2


def test_caches_of_a_lane_each_change_nothing():
    model = _model()
    passes, strategy = TorchPasses(model), _strategy(rows="rows")
    strategy.learn(passes, ROWS)
    scores, ids = strategy.begin(passes, PROMPT), list(PROMPT)
    for _ in range(4):
        found = scores(ids)
        fresh = strategy.begin(TorchPasses(model), PROMPT)(ids)
        assert np.abs(found - fresh).max() < 1e-3
        ids.append(int(found.argmax()))


class Plane:
    """Passes of two experts, where a text is like the vector of its first token."""

    experts, size, answers, writes = ("left", "up"), 2, 2, True
    vectors = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [1.0, 1.0]])

    def only(self, experts):
        return Setting(mask=tuple(name in experts for name in self.experts))

    def condition(self, ids):
        return self.vectors[ids[0]].astype(np.float32) * (1 + ids[0])  # its length is of no matter

    def logits(self, ids, setting=OWN, lane=""):
        return np.zeros(2, np.float32) if setting.mask is None else np.array(setting.mask, np.float32)


PLANE_ROWS = [Example((i,), (), {"expert": "left" if i < 2 else "up"}) for i in range(4)]


def test_weights_are_the_softmax_of_standardised_cosines():
    strategy = _strategy(rows="rows", own=False, temperature=0.7)
    strategy.learn(Plane(), PLANE_ROWS)
    unit = Plane.vectors / np.linalg.norm(Plane.vectors, axis=1, keepdims=True)
    centroids = np.stack([unit[:2].mean(0), unit[2:4].mean(0)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    cosines = unit[:4] @ centroids.T
    for i in range(5):
        z = np.exp((unit[i] @ centroids.T - cosines.mean(0)) / cosines.std(0) / 0.7)
        assert strategy.weights(Plane(), [i]) == pytest.approx(z / z.sum())
        assert strategy.begin(Plane(), [i])([i]) == pytest.approx(z / z.sum())
    assert strategy.weights(Plane(), [4]) == pytest.approx([0.5, 0.5])  # between both


def test_one_row_tells_nothing_apart():
    one = Plane()
    one.experts = ("left",)
    strategy = _strategy(rows="rows")
    strategy.learn(one, PLANE_ROWS[:1])
    assert strategy.weights(one, [3]) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("rows", "params", "what"),
    [
        (PLANE_ROWS, {"column": "who"}, "row 1 has no column 'who'"),
        ([*PLANE_ROWS, Example((1,), (), {"expert": "down"})], {}, "there is no expert 'down'"),
        (PLANE_ROWS[:2], {}, "no row is for the expert up"),
        ([], {}, "no row is for the expert left"),
    ],
)
def test_rows_that_do_not_fit(rows, params, what):
    with pytest.raises(AnswerError, match=what):
        _strategy(rows="rows", **params).learn(Plane(), rows)


def test_only_hosts_tell_what_a_text_is_like():
    with pytest.raises(AnswerError, match="only a host"):
        _strategy(rows="rows").learn(object(), PLANE_ROWS)


def test_an_expert_that_the_gate_rules_out_cannot_be_asked():
    model = _model()
    passes = TorchPasses(model, within=TorchPasses(model).only(["e0"]))
    with pytest.raises(AnswerError, match="a router would be left without experts"):
        _strategy().begin(passes, PROMPT)(PROMPT)
    assert all(group.overrides.expert_mask is None for group in model.routers.values())
    assert torch.is_grad_enabled()
