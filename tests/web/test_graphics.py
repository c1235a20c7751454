"""A page on a graphics card, here one of software: what comes out wrong there is computed on the processor."""

from __future__ import annotations

import os

import chromium
import edge_export
import numpy as np
import pytest

from molehill_edge import Bundle
from molehill_edge.trust import InsecureLocal
from molehill_web import site

TRUST = InsecureLocal(lambda _: None)
pytestmark = pytest.mark.skipif(
    not os.environ.get("MOLEHILL_NIGHTLY"), reason="software takes half a minute for it: make nightly"
)


@pytest.mark.parametrize("tokens", [20, 40])
def test_long_texts_come_out_as_in_python(tokens, opened):
    """Attention of onnxruntime-web 1.30 is wrong there from 32 tokens on, which short golden inputs did not show."""
    page, bundle = opened
    ids = [5 + 37 * i % 250 for i in range(tokens)]
    found = page.do(f"molehill.engine.logits({ids}).then((logits) => [...logits])")
    wanted = bundle.read(bundle.cache(), ids)
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.std(wanted))


@pytest.fixture(scope="module")
def opened(tmp_path_factory, libraries):
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("graphics")
    edge_export.write(folder / "bundle", "bytes", "fp32", targets="all-linear", experts=4, rank=4, scope="layer")
    with TRUST.admit(folder / "bundle") as admitted:
        site.of_bundle(admitted, folder / "site")
    server = chromium.Server(folder / "site")
    with chromium.browser(graphics=True) as browser, Bundle.open(folder / "bundle", trust=TRUST, threads=1) as bundle:
        page = browser.page()
        assert page.open(server.url) == "ready", page.text("#status")
        if not page.do("navigator.gpu?.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no graphics card of software")
        yield page, bundle
    server.stop()
