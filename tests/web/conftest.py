from __future__ import annotations

import chromium
import page_libraries
import pytest


@pytest.fixture(scope="session")
def libraries():
    """The libraries of the page are there."""
    if reason := page_libraries.lacking():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def browser(libraries):
    """One browser for all pages, which are at addresses of their own."""
    if chromium.PROGRAM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    with chromium.browser() as opened:
        yield opened
        assert opened.errors == []


@pytest.fixture
def served():
    """Serves folders until the test ends."""
    servers = []

    def serve(folder):
        servers.append(chromium.Server(folder))
        return servers[-1]

    yield serve
    for server in servers:
        server.stop()
