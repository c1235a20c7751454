"""The experts that a picker scores best answer a prompt, by themselves or as one."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from number_passes import HostPasses, NumberPasses, sure

from molehill.decoding import options
from molehill.decoding.interfaces import Example, Learns, Setting
from molehill.decoding.stream import Asked, Reader
from molehill.errors import AnswerError, ConfigError
from molehill.molora.decode import TorchPasses, applied, only, write

PROMPT = [5, 9, 14, 3, 22]


def _model(**molora):
    keys = {"experts": 4, "rank": 4, "selector": {"name": "top_k", "k": 2}, **molora}
    return tiny_models.separate(tiny_models.shake(tiny_models.adapted("llama", **keys)), 4.0)


def pick(**keys):
    return options.build("decoding", "pick", keys)


def words(*tokens):
    """An expert that knows some tokens of eight."""
    return lambda ids: sum(sure(token, 8) for token in tokens)


DISJOINT = {"e0": words(0, 1), "e1": words(2, 3), "e2": words(4, 5), "e3": words(6, 7)}


@pytest.mark.parametrize("tokens", [(0, 1, 0, 1), (2, 3, 3), (5, 4, 4, 5), (7, 6)])
def test_the_least_surprised_expert_answers(tokens):
    """S94: on disjoint vocabularies the choice is that of who knows."""
    passes = NumberPasses(DISJOINT, writes=True)
    scores = pick().begin(passes, tokens)
    del passes.asked[:]
    assert scores(tokens).argmax() in tokens
    assert passes.asked == [(f"e{tokens[0] // 2}",)]


def test_of_equal_experts_the_first_answers():
    passes = NumberPasses(dict.fromkeys(["e0", "e1", "e2"], words(3)), writes=True)
    pick().begin(passes, [3, 3])([3, 3])
    assert passes.asked[-1] == ("e0",)


def test_perplexity_of_a_model_and_the_expert_alone():
    model = _model()
    passes = TorchPasses(model)
    losses = [passes.losses(PROMPT, passes.only([name])).mean() for name in passes.experts]
    best = passes.experts[int(np.argmin(losses))]
    picker = options.build("picker", "ppl")
    assert picker.scores(passes, PROMPT) == pytest.approx(np.exp(-np.array(losses)), rel=1e-5)
    found = pick().begin(passes, PROMPT)([*PROMPT, 7])
    assert np.abs(found - TorchPasses(model).logits([*PROMPT, 7], passes.only([best]))).max() < 2e-4
    # the paper's weights: the softmax of the best of 1 / perplexity
    setting = pick(k=2).setting(passes, PROMPT)
    first, second = np.argsort(losses)[:2]
    shares = np.exp(np.exp(-np.array(losses))) * np.isin(range(4), (first, second))
    assert setting.weights == pytest.approx(np.tile(shares / shares.sum(), passes.size // 4), rel=1e-5)


def test_a_neutral_pick_is_the_model_itself():
    model, neutral = _model(), pick(**type(pick()).neutral)
    passes = TorchPasses(model)
    own = passes.logits(PROMPT).copy()
    assert np.abs(neutral.begin(passes, PROMPT)(PROMPT) - own).max() < 2e-4
    assert np.abs(pick(k=4, weigh="router").begin(passes, PROMPT)(PROMPT) - own).max() < 2e-4
    assert np.abs(pick().begin(passes, PROMPT)(PROMPT) - own).max() > 1e-3
    assert np.abs(passes.logits(PROMPT) - own).max() < 2e-4  # nothing is left behind
    one = NumberPasses({"e0": words(3)}, writes=True)
    assert (pick().begin(one, [3, 3])([3, 3]) == one.logits([3, 3])).all()


@pytest.mark.parametrize("by", ["centroid", "classifier", "kshot", "tree"])
def test_all_experts_by_the_router_are_the_model_whoever_picks(by):
    row = Example((1, 2), (0,), {"expert": "e0"})
    passes = HostPasses(DISJOINT)
    strategy = pick(by=by, rows="a", k=0, weigh="router")
    strategy.learn(passes, [row])
    assert (strategy.begin(passes, [1, 2])([1, 2]) == passes.logits([1, 2])).all()
    one = HostPasses({"e0": words(3)})
    alone = pick(by=by, rows="a")
    alone.learn(one, [row])
    assert (alone.begin(one, [1, 2])([1, 2]) == one.logits([1, 2])).all()


def test_two_by_the_router_are_not_two_by_weights():
    passes = TorchPasses(_model())
    logits = {weigh: pick(k=2, weigh=weigh).begin(passes, PROMPT)(PROMPT) for weigh in ("router", "softmax", "mean")}
    told = [each.copy() for each in logits.values()]
    assert min(np.abs(a - b).max() for i, a in enumerate(told) for b in told[:i]) > 1e-4
    assert pick(k=2, weigh="mean").setting(passes, PROMPT).weights.count(0.5) == passes.size // 2


def test_weights_stand_in_for_the_router():
    model = _model(selector="dense")
    passes, whole = TorchPasses(model), 4
    even = passes.logits(PROMPT, Setting(weights=(0.25,) * passes.size), "even").copy()
    model.use_uniform_gate(uniform=True)
    assert np.abs(TorchPasses(model).logits(PROMPT) - even).max() < 2e-4
    model.use_uniform_gate(uniform=False)
    assert np.abs(passes.logits(PROMPT) - even).max() > 1e-3
    one = Setting(weights=tuple([0.0, 0.0, 1.0, 0.0] * (passes.size // whole)))
    alone = passes.logits(PROMPT, one, "one").copy()
    assert np.abs(passes.logits(PROMPT, passes.only(["e2"]), "only") - alone).max() < 2e-4
    # what a caller holds the model to stays: the others' part is nothing
    held = TorchPasses(model, within=only(model, ["e2"]))
    mixed = Setting(weights=tuple([0.5, 0.0, 1.0, 0.5] * (passes.size // whole)))
    assert np.abs(held.logits(PROMPT, mixed) - alone).max() < 2e-4
    with pytest.raises(AnswerError, match="a setting has 1 numbers"):
        passes.logits(PROMPT, Setting(weights=(1.0,)))


def test_rows_of_a_batch_may_have_weights():
    model = _model()
    reader, asked = Reader(str, frozenset({1}), 48), Asked(max_new_tokens=5)
    size = TorchPasses(model).size
    settings = [Setting(weights=(1.0, 0.0, 0.0, 0.0) * (size // 4)), Setting(), Setting(weights=(0.25,) * size)]
    found = [each.tokens for each in write(model, [PROMPT] * 3, reader, asked, settings)]
    assert found == [next(write(model, [PROMPT], reader, asked, [each])).tokens for each in settings]
    with pytest.raises(AnswerError, match="the same places and weights"), applied(model, settings):
        pass


def test_other_keys_are_those_of_the_picker():
    with pytest.raises(AnswerError, match="unknown key 'kappa' for picker ppl"):
        pick(kappa=2)
    with pytest.raises(AnswerError, match="picker tree, key 'kappa' must be at least 1"):
        pick(by="tree", rows="a", kappa=0)
    with pytest.raises(ConfigError, match="unknown picker 'best'"):
        pick(by="best")
    with pytest.raises(AnswerError, match="'first' is not one of"):
        pick(weigh="first")


def test_what_cannot_be_picked():
    with pytest.raises(AnswerError, match=r"picker tree learns from rows. Add --set rows=FILE"):
        pick(by="tree")
    with pytest.raises(AnswerError, match="picker ppl learns from no rows"):
        pick(rows="a.jsonl")
    passes = NumberPasses(DISJOINT, writes=True)
    with pytest.raises(AnswerError, match="there are 4 experts, not 5"):
        pick(k=5).begin(passes, PROMPT)
    with pytest.raises(AnswerError, match="a single token has no perplexity"):
        pick().begin(passes, [3])
    with pytest.raises(AnswerError, match="has learnt from no rows yet"):
        pick(by="tree", rows="a").begin(passes, PROMPT)
    with pytest.raises(AnswerError, match="there are no rows to learn from"):
        pick(by="tree", rows="a").learn(passes, [])


def test_devices_pick_by_what_they_have():
    told = {
        by: pick(by=by, rows="" if by == "ppl" else "a") for by in ("ppl", "centroid", "classifier", "kshot", "tree")
    }
    assert [by for by, each in told.items() if each.on_device] == ["ppl"]
    assert all(isinstance(each, Learns) for each in told.values())
    row = Example((1, 2), (0,), {"expert": "e0", "value": "1"})
    for by in ("centroid", "classifier", "tree"):
        with pytest.raises(AnswerError, match="known only where the model was trained"):
            told[by].learn(NumberPasses(DISJOINT), [row])
        told[by].learn(HostPasses(DISJOINT), [row])
