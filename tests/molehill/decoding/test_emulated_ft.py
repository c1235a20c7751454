"""A large model steered by what training changed in a small one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny_models

from molehill.decoding import options
from molehill.decoding.interfaces import BASE, OWN, log_softmax
from molehill.errors import AnswerError
from molehill.molora.build import bare
from molehill.molora.decode import TorchPasses

PROMPT = [5, 9, 14, 3, 22]


def _scores(passes, prompt=PROMPT, **params):
    return options.build("decoding", "emulated_ft", params).begin(passes, prompt)


def _small():
    return tiny_models.shake(tiny_models.adapted("llama", experts=3, rank=4, selector="dense"))


def _large(seed=7):
    return TorchPasses(bare(tiny_models.base("llama", seed=seed, layers=3)))


def _close(one, two):
    return np.abs(log_softmax(one) - log_softmax(two)).max() < 1e-4


def test_a_base_without_an_adapter_is_itself():
    passes = TorchPasses(bare(base := tiny_models.base("gpt2")))
    assert (passes.experts, passes.size, passes.writes, passes.answers) == ((), 0, True, tiny_models.VOCAB)
    ids = list(PROMPT)
    for token in (4, 8, 30):
        wanted = base(input_ids=passes._row(ids), use_cache=False).logits[0, -1].numpy()
        assert np.abs(passes.logits(ids) - wanted).max() < 2e-4
        assert np.abs(passes.logits(ids, BASE, "base") - wanted).max() < 2e-4
        ids.append(token)


def test_a_small_model_that_learnt_nothing_leaves_the_large_one_as_it_is():
    small = TorchPasses(tiny_models.adapted("llama", experts=3, rank=4), others={"large": _large()})  # B is 0
    ids, scores = list(PROMPT), _scores(small, beta=3.0, top_p=1.0)
    for _ in range(3):
        wanted = _large().logits(ids)
        assert _close(scores(ids), wanted)
        assert _scores(small)(ids).argmax() == wanted.argmax()
        ids.append(int(wanted.argmax()))


def test_no_beta_is_the_large_model():
    passes = TorchPasses(_small(), others={"large": _large()})
    assert _close(_scores(passes, beta=0.0, top_p=1.0)(PROMPT), _large().logits(PROMPT))


def test_a_large_model_that_is_the_small_one_gives_the_tuned():
    """What tells it from an ensemble: what both bases know counts once."""
    model = _small()
    passes = TorchPasses(model, others={"large": _large(seed=0)})  # the base of the small one has two layers
    same = TorchPasses(model, others={"large": TorchPasses(bare(tiny_models.base("llama")))})
    tuned = TorchPasses(model).logits(PROMPT)
    assert _close(_scores(same, top_p=1.0)(PROMPT), tuned)
    assert not _close(_scores(passes, top_p=1.0)(PROMPT), tuned)


class Table:
    """Passes over a tiny vocabulary: random logits for every text."""

    experts, size, writes = (), 0, True

    def __init__(self, seed, answers=3, others=()):
        self.seed, self.answers, self.others = seed, answers, dict(others)

    def logits(self, ids, setting=OWN, lane=""):
        key = [self.seed, setting.base, len(ids), *ids]
        return np.random.default_rng(key).normal(size=self.answers).astype(np.float32) * 2


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_probabilities_of_all_texts_are_those_of_the_equation(beta):
    passes = Table(1, others={"large": Table(2)})
    scores = _scores(passes, [0], beta=beta, top_p=1.0)
    total = 0.0
    for answer in itertools.product(range(3), repeat=3):
        ours, wanted = 0.0, 1.0
        for n, token in enumerate(answer):
            ids = [0, *answer[:n]]
            ours += log_softmax(scores(ids))[token]
            large, tuned, small = (
                np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum()
                for z in (passes.others["large"].logits(ids), passes.logits(ids), passes.logits(ids, BASE))
            )
            p = large * (tuned / small) ** beta
            wanted *= p[token] / p.sum()
        assert np.exp(ours) == pytest.approx(wanted)
        total += wanted
    assert total == pytest.approx(1)


def test_only_what_the_large_model_finds_likely_can_be_chosen():
    passes = Table(1, 6, {"large": Table(2, 6)})
    large = np.exp(log_softmax(passes.others["large"].logits([0])))
    for top_p in (0.05, 0.5, 0.9, 0.99, 1.0):
        allowed = np.isfinite(_scores(passes, [0], top_p=top_p)([0]))
        order = np.argsort(-large)
        most = allowed.sum()
        assert allowed[order[:most]].all()
        assert large[allowed].sum() >= top_p - 1e-9
        assert most == 1 or large[order[: most - 1]].sum() < top_p


@pytest.mark.parametrize("answers", [4, 9])
def test_logits_of_no_token_are_left_out(answers):
    passes = Table(1, 6, {"large": Table(2, answers)})
    found = _scores(passes, [0], top_p=1.0)([0])
    assert found.shape == (6,)
    assert np.isfinite(found).tolist() == [i < answers for i in range(6)]


def test_without_a_large_model():
    for passes in (TorchPasses(_small()), object()):
        with pytest.raises(AnswerError, match=r"no large model beside this one.*--large MODEL"):
            _scores(passes)
