"""Passes of a model on a host: caches, settings of routers, and many rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import torch

from molehill.decoding.interfaces import BASE, OWN, Setting
from molehill.decoding.sampling import Sampling
from molehill.decoding.stream import Asked, Reader
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses, only, write

PROMPT = [5, 9, 14, 3, 22]
READER = Reader(lambda ids: " ".join(map(str, ids)), frozenset({1}), 48)
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def _model(architecture="llama", **molora):
    keys = {"experts": 4, "rank": 4, "selector": {"name": "top_k", "k": 2}, **molora}
    return tiny_models.separate(tiny_models.shake(tiny_models.adapted(architecture, **keys)), 4.0)


def _alone(model, ids):
    """Logits after some tokens, without a cache."""
    with torch.no_grad():
        return model.base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().numpy()


@ARCHITECTURES
@pytest.mark.parametrize("scope", ["site", "layer", "model"])
def test_a_cache_changes_nothing(architecture, scope):
    model = _model(architecture, scope=scope)
    passes = TorchPasses(model)
    for ids in (PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8, 30], [*PROMPT, 7, 4], PROMPT[:2], [2, *PROMPT]):
        assert np.abs(passes.logits(ids) - _alone(model, ids)).max() < 2e-4
    assert passes.kept([2, *PROMPT, 9]) == 6
    passes.forget()
    assert passes.kept([2, *PROMPT, 9]) == 0


def test_settings_are_those_of_their_lane_and_leave_nothing_behind():
    model = _model()
    passes, own = TorchPasses(model), _alone(model, PROMPT)
    longer, third = [*PROMPT, 7], Setting(ranks=(2, 3))
    assert np.abs(passes.logits(PROMPT, third, "weak") - own).max() > 1e-2
    assert np.abs(passes.logits(PROMPT) - own).max() < 2e-4
    fresh = TorchPasses(model).logits(longer, third)
    assert np.abs(passes.logits(longer, third, "weak") - fresh).max() < 2e-4
    assert np.abs(passes.logits(longer) - _alone(model, longer)).max() < 2e-4
    model.state.enabled = False
    base = _alone(model, PROMPT)
    model.state.enabled = True
    assert np.abs(passes.logits(PROMPT, BASE, "base") - base).max() < 2e-4
    assert np.abs(base - own).max() > 1e-2


def test_ranks_are_places_among_the_logits():
    model = _model()
    passes = TorchPasses(model)
    assert np.abs(passes.logits(PROMPT, Setting(ranks=(0, 2))) - passes.logits(PROMPT, OWN, "own")).max() < 2e-4
    one = [passes.logits(PROMPT, Setting(ranks=(i, i + 1)), f"{i}").copy() for i in range(4)]
    assert min(np.abs(a - b).max() for i, a in enumerate(one) for b in one[:i]) > 1e-3
    assert np.isfinite(one).all()
    with pytest.raises(AnswerError, match="no router has an expert at place 5"):
        passes.logits(PROMPT, Setting(ranks=(4, 5)))
    two = passes.only(["e0", "e2"]).mask
    both = passes.logits(PROMPT, Setting(mask=two, ranks=(0, 2)), "two").copy()
    assert np.abs(passes.logits(PROMPT, Setting(mask=two), "same") - both).max() < 2e-4
    with pytest.raises(AnswerError, match="no router has an expert at place 3"):  # and none that is masked
        passes.logits(PROMPT, Setting(mask=two, ranks=(2, 3)))


def test_only_one_expert_is_that_expert():
    model = _model(selector="dense")
    passes = TorchPasses(model)
    assert passes.experts == ("e0", "e1", "e2", "e3")
    found = passes.logits(PROMPT, passes.only(["e2"])).copy()
    bias = Setting(bias=tuple([0.0, 0.0, 1e4, 0.0] * (passes.size // 4)))
    assert np.abs(passes.logits(PROMPT, bias, "bias") - found).max() < 2e-3
    with pytest.raises(AnswerError, match="no expert 'e9' to choose"):
        passes.only(["e9"])
    with pytest.raises(AnswerError, match="the routers have"):
        passes.logits(PROMPT, Setting(bias=(1.0,)))


def test_losses_are_minus_log_probabilities():
    model = _model()
    passes = TorchPasses(model)
    wanted = [-torch.tensor(_alone(model, PROMPT[:n])).log_softmax(-1)[PROMPT[n]].item() for n in range(1, len(PROMPT))]
    assert passes.losses(PROMPT) == pytest.approx(wanted, abs=1e-4)
    assert passes.losses(PROMPT[:1]).shape == (0,)


def test_a_condition_depends_on_the_base_alone():
    model = _model()
    before = TorchPasses(model).condition(PROMPT)
    tiny_models.shake(model, seed=9)
    assert (TorchPasses(model).condition(PROMPT) == before).all()
    assert np.abs(TorchPasses(model).condition(PROMPT[::-1]) - before).max() > 1e-3


def test_a_classifier_gives_classes_and_no_losses():
    model = _model("bert")
    passes = TorchPasses(model)
    assert not passes.writes
    assert passes.logits(PROMPT).shape == (passes.answers,)
    assert passes.condition(PROMPT).shape == (tiny_models.WIDTH,)
    with pytest.raises(AnswerError, match="a classifier gives tokens no probability"):
        passes.losses(PROMPT)


def _answers(model, prompts, **keys):
    return [each.tokens for each in write(model, prompts, READER, Asked(max_new_tokens=9), **keys)]


@ARCHITECTURES
def test_rows_of_one_pass_are_what_they_are_alone(architecture):
    model = _model(architecture, scope="layer")
    prompts = [PROMPT, PROMPT[:2], [8], PROMPT[::-1], [*PROMPT, *PROMPT]]
    together = _answers(model, prompts)
    passes = TorchPasses(model)
    for prompt, found in zip(prompts, together, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 9 and (token := int(passes.logits(ids).argmax())) not in READER.ends:
            ids.append(token)
        assert found == ids[len(prompt) :]


def test_rows_of_one_pass_may_ask_different_experts():
    """S47: an adapter for every row of a batch; a row without any is the base."""
    model = _model()
    settings = [only(model, ["e0"]), only(model, ["e3"]), OWN, BASE, only(model, ["e1", "e2"]), BASE]
    mixed = _answers(model, [PROMPT] * 6, settings=settings)
    assert mixed == [_answers(model, [PROMPT], settings=[each])[0] for each in settings]
    assert len({tuple(each) for each in mixed}) >= 4
    assert mixed[3] == mixed[5]


def test_draws_depend_on_the_seed_and_the_row_alone():
    model = _model()
    asked = Asked(max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=3))
    prompts = [PROMPT, PROMPT, [8]]
    first = list(write(model, prompts, READER, asked))
    assert first == list(write(model, prompts, READER, asked, at_once=1))
    assert first[0] != first[1]


def test_a_router_that_looks_ahead_does_not_write():
    model = _model()
    next(iter(model.routers.values())).router.selector = type("Late", (), {"causal": False})()
    with pytest.raises(AnswerError, match="selector Late looks at later tokens"):
        TorchPasses(model)
    with pytest.raises(AnswerError, match="looks at later tokens"):
        _answers(model, [PROMPT])
    with pytest.raises(AnswerError, match="where 48 fit together"):
        _answers(_model(), [[2] * 48])
