"""A page on a graphics card, here one of software: what comes out wrong there is computed on the processor."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager

import chromium
import edge_export
import edge_graphs
import numpy as np
import pytest

from molehill_edge import Bundle
from molehill_edge import manifest as manifests
from molehill_edge.trust import InsecureLocal
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
pytestmark = pytest.mark.skipif(
    not os.environ.get("MOLEHILL_NIGHTLY"), reason="software takes half a minute for it: make nightly"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphics") / "bundle"
    edge_export.write(folder, "bytes", "fp32", targets="all-linear", experts=4, rank=4, scope="layer")
    with Bundle.open(folder, trust=TRUST, threads=1) as opened:
        yield folder, opened


@pytest.fixture(scope="module")
def browser(libraries):
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with chromium.browser(graphics=True) as opened:
        yield opened


@contextmanager
def _page(browser, bundle, place):
    with TRUST.admit(bundle) as admitted:
        site.of_bundle(admitted, place)
    server, page = chromium.Server(place), browser.page()
    assert page.open(server.url) == "ready", page.text("#status")
    if not page.do("navigator.gpu?.requestAdapter().then(Boolean)"):
        pytest.skip("this Chromium has no graphics card of software")
    yield page
    server.stop()


def test_long_texts_come_out_as_in_python(browser, bundle, tmp_path):
    """Attention of onnxruntime-web 1.30 is wrong there from 32 tokens on, which short golden inputs did not show."""
    folder, opened = bundle
    with _page(browser, folder, tmp_path / "site") as page:
        for tokens in (20, 40):
            ids = [5 + 37 * i % 250 for i in range(tokens)]
            found = page.do(f"molehill.engine.logits({ids}).then((logits) => [...logits])")
            wanted = opened.read(opened.cache(), ids)
            np.testing.assert_allclose(found, wanted, atol=1e-3 * np.std(wanted))


def test_short_golden_inputs_do_not_suffice(browser, bundle, tmp_path):
    """Such as bundles of earlier versions have."""
    folder, opened = bundle
    shutil.copytree(folder, tmp_path / "bundle")
    manifest, _ = manifests.load(folder)
    short = [list(each.input_ids[:20]) for each in manifest.golden]
    del manifest.golden[:]
    for ids in short:
        logits = opened.read(opened.cache(), ids)
        manifest.golden.add(input_ids=ids, logits=logits[:32], best=int(logits.argmax()))
    edge_graphs.sign(tmp_path / "bundle", manifest)
    with _page(browser, tmp_path / "bundle", tmp_path / "site") as page:
        assert page.do("molehill.computes").startswith("on the processor")
