"""The inputs by which a device, or a page, tells whether a bundle answers as it did where it was made."""

from __future__ import annotations

import edge_export
import numpy as np
import pytest

from molehill.outputs import READINGS, About
from molehill_edge import Bundle, InsecureLocal, golden
from molehill_export import parity

# How far the best is ahead, by tokens.
LEADS = {60: 0.001, 40: 3, 30: 2, 20: 0.002, 10: 1, 200: 9, 128: 0.1, 112: 5, 96: 1, 80: 2, 64: 8, 48: 7, 32: 0}


def _lengths(tokens, classes):
    """Lengths of the golden inputs for texts of so many tokens, when the best is ahead by `LEADS`."""

    def runner(ids):
        logits = np.zeros((len(ids), classes), np.float32)
        logits[-1, classes // 2] = LEADS[len(ids)]
        return logits, []

    texts = [list(range(length)) for length in tokens]
    original = parity.Originals(texts, [runner(ids) for ids in texts], [], np.zeros(0), READINGS["causal-lm"])
    _, found = parity.compare(original, runner, About())
    assert {each.best for each in found} == {classes // 2}
    return [len(each.input_ids) for each in found]


def test_they_are_no_near_ties_and_one_is_long():
    assert _lengths((60, 40, 30, 20, 10, 200), 50) == [40, 30, 10, 20, 112]
    assert _lengths((60, 40, 80), 50) == [40, 60, 64]  # of 80, 64, 48 and 32
    assert _lengths((30, 20, 10), 1) == [20, 10, 30]
    assert _lengths((10,), 50) == [10]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_bundle_has_them(scheme, tmp_path):
    edge_export.write(tmp_path / "bundle", "bytes", scheme, targets="all-linear", experts=4, rank=4, scope="layer")
    with Bundle.open(tmp_path / "bundle", trust=InsecureLocal(lambda _: None), threads=1) as bundle:
        lengths = [len(each.input_ids) for each in bundle.manifest.golden]
        found = golden.check(bundle)
    assert [length > 64 for length in lengths] == [False, False, False, False, True]
    assert (found.inputs, found.agreement) == (5, 1)
    assert found.error < 1e-6
