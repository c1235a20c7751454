"""What every strategy promises, on a decoder and a classifier, on a host and on a device."""

from __future__ import annotations

import contextlib

import edge_export
import numpy as np
import pytest
import torch

from molehill import catalogue
from molehill.decoding import options
from molehill.decoding.interfaces import BASE, Example, Learns
from molehill.errors import AnswerError
from molehill.molora.decode import TorchPasses
from molehill_edge import Bundle, InsecureLocal

PROMPT, OTHER = [5, 9, 14, 3, 22], [11, 8, 30]
MOLORA = {
    "targets": "all-linear", "experts": 4, "rank": 4, "scope": "layer", "selector": {"name": "top_k", "k": 2},
}  # fmt: skip
KINDS = ("llama", "bert")
METHODS = [method.name for method in catalogue.methods("decoding")]
STEPS = 4


def _examples(classes):
    """Rows with an answer, an expert and a subject each."""
    random = np.random.default_rng(0)
    return [
        Example(
            tuple(random.integers(5, 40, 4).tolist()),
            (n % 3,) if classes else tuple(random.integers(5, 40, 2).tolist()),
            {"expert": f"e{n % 4}", "subject": "ab"[n % 2]},
        )
        for n in range(12)
    ]


@pytest.fixture(scope="module")
def models():
    return {kind: edge_export.adapted(kind, **MOLORA)[0] for kind in KINDS}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    with contextlib.ExitStack() as held:
        found = {}
        for kind in KINDS:
            edge_export.write(folder / kind, kind, "fp32", router_ranks=True, **MOLORA)
            bundle = Bundle.open(folder / kind, trust=InsecureLocal(lambda _: None), threads=1)
            found[kind] = held.enter_context(bundle)
        yield found


def _host(model, asks=()):
    """Passes of a model; other models are its base, where a strategy asks some."""
    return TorchPasses(model, others={name: _Base(TorchPasses(model)) for name in asks})


class _Base:
    """The base without experts, as a model of its own."""

    def __init__(self, passes):
        self._passes = passes

    def __getattr__(self, name):
        return getattr(self._passes, name)

    def logits(self, ids, setting=BASE, lane=""):
        return self._passes.logits(ids, BASE, lane)


def _made(name, passes, **values):
    """A strategy that has learnt what there is to learn and can begin; an AnswerError where it is for other models."""
    strategy = options.build("decoding", name, values)
    options.require_fits(strategy, name, passes)
    if isinstance(strategy, Learns):
        strategy.learn(passes, _examples(not passes.writes))
    strategy.begin(passes, PROMPT)
    return strategy


def _built(name, passes, **values):
    """The same; skips where it is for other models."""
    try:
        return _made(name, passes, **values)
    except AnswerError as error:
        pytest.skip(str(error))


def _said(strategy, passes, prompt, ids=None):
    """Scores step by step, each token the likeliest, or those of ``ids``: ``[steps, V]``, and the tokens."""
    scores, so_far, found = strategy.begin(passes, prompt), list(prompt), []
    for step in range(STEPS if passes.writes else 1):
        found.append(np.array(scores(so_far), np.float64))
        so_far.append(int(found[-1].argmax()) if ids is None else ids[step])
    return np.stack(found), so_far[len(prompt) :]


def _same(one, two, limit):
    """Equal up to rounding, and -inf in the same places."""
    finite = np.isfinite(one)
    return bool((finite == np.isfinite(two)).all() and np.abs(one[finite] - two[finite]).max() < limit)


def every(test):
    """Run a test with every strategy and every kind of model."""
    return pytest.mark.parametrize("kind", KINDS)(pytest.mark.parametrize("name", METHODS)(test))


@pytest.mark.parametrize("name", METHODS)
def test_there_is_a_model_for_it(models, name):
    strategy = catalogue.get("decoding", name).target
    assert not (strategy.asks and strategy.on_device)  # a bundle is one model
    found = []
    for model in models.values():
        with contextlib.suppress(AnswerError):
            found.append(_made(name, _host(model, strategy.asks)))
    assert found


@every
def test_scores_are_numbers_or_nothing_and_the_same_each_time(models, name, kind):
    passes = _host(models[kind], catalogue.get("decoding", name).target.asks)
    strategy = _built(name, passes)
    prompt = list(PROMPT)
    first, tokens = _said(strategy, passes, prompt)
    assert prompt == PROMPT
    assert first.shape == (len(first), passes.answers)
    assert np.isfinite(first).any(-1).all()
    assert not (np.isnan(first) | (first == np.inf)).any()
    _said(strategy, passes, OTHER)
    again, same = _said(strategy, passes, PROMPT)
    assert tokens == same
    assert _same(first, again, 1e-4)
    fresh, _ = _said(
        _built(name, passes), _host(models[kind], catalogue.get("decoding", name).target.asks), PROMPT, tokens
    )
    assert _same(first, fresh, 1e-4)


@every
def test_nothing_is_left_in_the_model(models, name, kind):
    model = models[kind]
    groups = list(model.routers.values())
    kept, enabled = [group.overrides for group in groups], model.state.enabled
    before = TorchPasses(model).logits(PROMPT).copy()
    flat = model.flat.clone()
    passes = _host(model, catalogue.get("decoding", name).target.asks)
    strategy = _built(name, passes)
    _said(strategy, passes, PROMPT)
    strategy.begin(passes, PROMPT)(OTHER)  # an answer that nobody goes on with
    assert [group.overrides for group in groups] == kept
    assert model.state.enabled == enabled
    assert torch.equal(model.flat, flat)
    assert (TorchPasses(model).logits(PROMPT) == before).all()


@every
def test_neutral_parameters_are_the_model_itself(models, name, kind):
    neutral = catalogue.get("decoding", name).target.neutral
    if neutral is None:
        pytest.skip("no parameters make it neutral")
    passes = _host(models[kind])
    found, tokens = _said(_built(name, passes, **neutral), passes, PROMPT)
    own = TorchPasses(models[kind])
    wanted = np.stack([own.logits([*PROMPT, *tokens[:step]]).copy() for step in range(len(found))])
    assert _same(found, wanted, 1e-4)


@every
def test_a_device_says_what_a_host_says(models, bundles, name, kind):
    host, bundle = _host(models[kind], catalogue.get("decoding", name).target.asks), bundles[kind]
    strategy = options.build("decoding", name)
    if not strategy.on_device:
        with pytest.raises(AnswerError, match=f"strategy {name} is host_only"):
            bundle.strategy(name)
        return
    here, device = _built(name, host), bundle.passes()
    try:
        there = _made(name, device)
    except AnswerError:  # a host alone has what it learns by; without rows it asks for no more than a device has
        here, there = (options.build("decoding", name) for _ in range(2))
    assert device.experts == host.experts
    assert (device.size, device.answers, device.writes) == (host.size, host.answers, host.writes)
    wanted, tokens = _said(here, host, PROMPT)
    found, _ = _said(there, device, PROMPT, tokens)
    assert _same(wanted, found, 1e-3)
