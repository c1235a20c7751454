"""Fitting a gate to a few texts, on the device."""

from __future__ import annotations

from dataclasses import replace

import edge_graphs
import numpy as np
import pytest

from molehill.errors import BundleError, MolehillError
from molehill_edge import gates
from molehill_edge.bundle import Bundle
from molehill_edge.trust import InsecureLocal

TRUST = InsecureLocal(lambda _: None)
HIDDEN = np.tile(np.array([-0.6, 2.7, -0.9, 0], np.float32), 2)  # the taste of an owner: dogs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bundles")
    edge_graphs.classifier(path / "classifier")
    edge_graphs.causal(path / "causal")
    return path


@pytest.fixture
def bundle(folder):
    with Bundle.open(folder / "classifier", trust=TRUST, threads=1) as opened:
        yield opened


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(edge_graphs.WORDS, rng.integers(2, 8))) for _ in range(n)]


def labelled(bundle, n, seed=0):
    """Texts, and the labels that the owner would give."""
    given = texts(n, seed)
    owner = bundle.with_gate(replace(bundle.gate, bias=HIDDEN))
    return given, [prediction.label for prediction in owner.classify(given)]


def accuracy(view, given, labels):
    return np.mean([each.label == label for each, label in zip(view.classify(given), labels, strict=True)])


def test_labelled_texts_raise_accuracy_on_others(bundle):
    found = bundle.personalise(*labelled(bundle, 60), seed=3)
    assert found.kept
    assert found.after.loss < found.before.loss
    assert found.after.accuracy >= found.before.accuracy
    assert found.fitted + found.held_out == 60
    assert found.evaluations <= 80
    other = labelled(bundle, 300, seed=99)
    assert accuracy(bundle.with_gate(found.gate), *other) > accuracy(bundle, *other) + 0.05


def test_equal_seeds_give_equal_gates(bundle):
    given = labelled(bundle, 24)
    one, other, third = (bundle.personalise(*given, seed=seed, budget=40) for seed in (1, 1, 2))
    assert (one.before, one.after, one.kept, one.evaluations) == (
        other.before, other.after, other.kept, other.evaluations,
    )  # fmt: skip
    assert np.array_equal(one.gate.bias, other.gate.bias)
    assert one.before != third.before  # other texts are held out


def test_what_does_not_help_is_not_kept(bundle):
    rng = np.random.default_rng(0)
    kept = []
    for seed in range(6):
        given = texts(12, seed)
        found = bundle.personalise(given, list(rng.choice(edge_graphs.LABELS, 12)), seed=seed, budget=60)
        kept.append(found.kept)
        if found.kept:
            assert found.after.loss <= found.before.loss
        else:
            assert found.gate is bundle.gate
            assert found.after.loss > found.before.loss or found.after.accuracy < found.before.accuracy
    assert not all(kept)


def test_texts_without_labels(bundle):
    found = bundle.personalise(texts(40), seed=0)
    assert found.before.accuracy is None
    assert found.after.loss <= found.before.loss or not found.kept
    assert found.evaluations <= 80


def test_texts_for_a_causal_lm(folder):
    with Bundle.open(folder / "causal", trust=TRUST, threads=1) as bundle:
        owner = bundle.with_gate(replace(bundle.gate, bias=HIDDEN * 2))
        given = [owner.generate(text, raw=True, max_new_tokens=40).text for text in texts(12)]
        found = bundle.personalise([text for text in given if len(text) > 8] + texts(4), seed=1, budget=40)
        assert found.before.accuracy is None
        assert found.after.loss <= found.before.loss or not found.kept
        with pytest.raises(BundleError, match="takes texts without labels"):
            bundle.personalise(texts(6), ["good"] * 6)
        with pytest.raises(BundleError, match="no text has more than one token"):
            bundle.personalise(list("abcd"))


def test_the_gate_is_written_and_taken(bundle, tmp_path):
    found = bundle.personalise(*labelled(bundle, 60), seed=3)
    gates.write(tmp_path / "me.gate.safetensors", found.gate, bundle.manifest)
    given = texts(20, seed=5)
    wanted = bundle.with_gate(found.gate).classify(given)
    bundle.swap_gate(tmp_path / "me.gate.safetensors")
    assert bundle.classify(given) == wanted
    assert bundle.gate.name == "global, personalised"


def test_an_added_expert_is_part_of_the_personal_gate(bundle, tmp_path):
    bundle.add_expert(edge_graphs.write_expert(tmp_path / "owls", bundle.manifest))
    found = bundle.personalise(*labelled(bundle, 60), seed=3)
    assert found.kept
    row = bundle.gate_tensors()["layers.0.up/-/gate.weight"][3]
    assert np.array_equal(found.gate.tensors["layers.0.up/-/gate.weight"][3], row)


def test_equal_texts_are_not_on_both_sides(bundle):
    given, labels = labelled(bundle, 8)
    found = bundle.personalise(given * 5, labels * 5, budget=10)
    assert found.held_out % 5 == 0
    assert found.fitted % 5 == 0


@pytest.mark.parametrize(
    ("given", "labels", "what"),
    [
        (["fine"] * 9, None, "1 different texts, where at least 4 are needed"),
        (["fine", "great"], ["good"], "2 texts but 1 labels"),
        (texts(6), ["nice"] * 6, "no label 'nice'.*bad, good, odd"),
    ],
)
def test_texts_that_do_not_do(bundle, given, labels, what):
    with pytest.raises(MolehillError, match=what):
        bundle.personalise(given, labels)


def test_a_budget_of_one(bundle):
    found = bundle.personalise(*labelled(bundle, 12), budget=1)
    assert not found.kept
    assert found.evaluations == 1
