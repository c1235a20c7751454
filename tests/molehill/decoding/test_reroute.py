"""Router biases that move while a text is written: never to where it is less likely, and gone after it."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

from molehill.decoding import options
from molehill.decoding.interfaces import OWN, Setting
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses

PROMPT = [5, 9, 14, 3, 22, 7, 7, 31]
WAYS = pytest.mark.parametrize("by", ["spsa", "gradient"])


@pytest.fixture
def model():
    made = tiny_models.adapted("llama", experts=4, rank=4, scope="layer", selector={"name": "top_k", "k": 2})
    return tiny_models.separate(tiny_models.shake(made), 4.0)


def _strategy(**params):
    return options.build("decoding", "reroute", params)


def _write(passes, strategy, tokens):
    ids, scores = list(PROMPT), strategy.begin(passes, PROMPT)
    for _ in range(tokens):
        ids.append(int(scores(ids).argmax()))
    return ids


class Noted:
    """Passes that note under which settings they were asked for logits."""

    def __init__(self, passes):
        self._passes, self.asked = passes, []

    def __getattr__(self, name):
        return getattr(self._passes, name)

    def logits(self, ids, setting=OWN, lane=""):
        self.asked.append((len(ids), setting))
        return self._passes.logits(ids, setting, lane)


def _loss(passes, ids, setting):
    return float(passes.losses(ids, setting).mean())


@WAYS
def test_a_text_never_becomes_less_likely_and_does_become_likelier(model, by):
    passes, losses = TorchPasses(model), [_loss(TorchPasses(model), PROMPT, OWN)]
    for steps in (1, 2, 4, 6, 9):  # of the same directions
        setting = _strategy(by=by, steps=steps).moved(passes, PROMPT, OWN, np.random.default_rng(0))
        losses.append(_loss(passes, PROMPT, setting))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


@WAYS
def test_biases_move_before_the_answer_and_every_so_many_tokens(model, by):
    passes = Noted(TorchPasses(model))
    ids = _write(passes, _strategy(by=by, every=3, steps=8), 7)
    settings = [setting for _, setting in passes.asked]
    assert settings[0] != OWN
    for start in (0, 3, 6):
        assert len(set(settings[start : start + 3])) == 1
    assert len(set(settings)) > 1
    for length, setting in passes.asked[::3]:
        assert _loss(passes, ids[:length], setting) <= _loss(passes, ids[:length], OWN)


@WAYS
def test_no_steps_are_the_model_itself(model, by):
    passes = TorchPasses(model)
    scores = _strategy(by=by, steps=0).begin(passes, PROMPT)
    assert (scores(PROMPT) == TorchPasses(model).logits(PROMPT)).all()


@WAYS
def test_nothing_is_left_after_a_text(model, by):
    passes = TorchPasses(model)
    before = passes.logits(PROMPT).copy()
    strategy = _strategy(by=by, every=2)
    first = _write(passes, strategy, 5)
    assert (TorchPasses(model).logits(PROMPT) == before).all()
    assert all(group.overrides.bias is None for group in model.routers.values())
    assert model.flat.grad is None or not model.flat.grad.any()
    assert _write(passes, strategy, 5) == first  # the next text begins anew


def test_a_slope_is_what_differences_are(model):
    passes = TorchPasses(model)
    bias = np.linspace(-0.3, 0.4, passes.size)
    slope = passes.slope(PROMPT, Setting(bias=tuple(bias)))
    for i in range(0, passes.size, 3):
        step = np.zeros(passes.size)
        step[i] = 1e-2
        up, down = (_loss(passes, PROMPT, Setting(bias=tuple(bias + sign * step))) for sign in (1, -1))
        assert slope[i] == pytest.approx((up - down) / 2e-2, abs=2e-3)
    assert np.abs(slope).max() > 1e-2
    model.use_uniform_gate(uniform=True)  # no router has a say
    assert not passes.slope(PROMPT, OWN).any()
    assert _strategy(by="gradient").moved(passes, PROMPT, OWN, np.random.default_rng(0)) is OWN


class Valley:
    """Passes without gradients, whose text is likeliest where the bias is some vector."""

    experts, size, answers, writes = ("e0", "e1", "e2"), 3, 2, True
    lowest = np.array([1.0, -2.0, 0.5])

    def logits(self, ids, setting=OWN, lane=""):
        return np.zeros(2, np.float32)

    def losses(self, ids, setting=OWN):
        bias = np.zeros(3) if setting.bias is None else np.array(setting.bias)
        return np.full(len(ids) - 1, ((bias - self.lowest) ** 2).sum(), np.float32)


def test_forward_passes_alone_find_the_way():
    setting = _strategy(steps=80, size=1.0).moved(Valley(), PROMPT, OWN, np.random.default_rng(3))
    assert np.abs(np.array(setting.bias) - Valley.lowest).max() < 0.3


def test_it_goes_back_to_the_own_routers_where_they_are_better():
    far = Setting(bias=(9.0, 9.0, 9.0))
    setting = _strategy(steps=1, size=1e-3).moved(Valley(), PROMPT, far, np.random.default_rng(0))
    assert setting is OWN or max(map(abs, setting.bias)) <= 1e-3


def test_what_cannot_be_moved():
    with pytest.raises(AnswerError, match="only a host has gradients"):
        _strategy(by="gradient").begin(Valley(), PROMPT)
    assert _strategy().moved(Valley(), PROMPT[:1], OWN, np.random.default_rng(0)) is OWN
    with pytest.raises(AnswerError, match="'newton' is not one of spsa, gradient"):
        _strategy(by="newton")
