"""A page that trusts a repository, in a real browser: updates, and what is older is refused."""

from __future__ import annotations

import shutil
import time

import edge_graphs
import pytest

from molehill.errors import BundleError, TrustError
from molehill_export.keys import Keys
from molehill_export.repository import Repository
from molehill_web import site


@pytest.fixture
def owner(tmp_path, libraries):
    """Keys, a repository that shows version 1 of a bundle, and a page in it."""
    keys = Keys.create(tmp_path / "keys", b"secret")
    edge_graphs.classifier(tmp_path / "one", tokenizer=edge_graphs.pieces_tokenizer())
    edge_graphs.classifier(tmp_path / "two", seed=1, tokenizer=edge_graphs.pieces_tokenizer(), version=2)
    Repository(tmp_path / "repo", keys).publish(tmp_path / "one")
    made = site.of_repository("tiny-classifier", tmp_path / "repo", tmp_path / "keys/root.json", tmp_path / "repo/page")
    assert (made.signed, made.serve, made.manifest.version) == (True, (tmp_path / "repo").resolve(), 1)
    return tmp_path, Repository(tmp_path / "repo", keys)


def test_a_page_follows_its_repository(owner, browser, served):
    folder, repository = owner
    shutil.copytree(folder / "repo", folder / "old")
    server, page = served(folder / "repo"), browser.page()
    assert page.open(f"{server.url}page/") == "ready", page.text("#status")
    assert page.text("#chips").split() == ["version", "1", "signed", "works", "offline"]
    assert page.there("#said", text="Version 1 is the newest.")
    repository.publish(folder / "two")
    page.click("#update")
    assert page.there("#said", text="Version 2 is here: load the page again to use it.")
    assert page.reload() == "ready"
    assert "version 2" in page.text("#chips")
    server.folder = folder / "old"
    server.stop()
    server.start()
    page.click("#update")
    assert "refused a state that is older than the known one" in page.there("#said", text="refused")
    assert page.reload() == "ready"
    assert "version 2" in page.text("#chips")
    assert page.there("#said", text="Version 2 stays in use.")
    server.stop()
    assert page.reload() == "ready"
    assert page.there("#network") == "no network"


def test_a_bundle_that_has_expired_gives_way_to_a_newer_one(owner, browser, served):
    """A day later, by the page's clock."""
    folder, repository = owner
    manifest = edge_graphs.classifier(folder / "three", tokenizer=edge_graphs.pieces_tokenizer(), version=3)
    manifest.expires = int(time.time()) + 3600
    edge_graphs.sign(folder / "three", manifest)
    repository.publish(folder / "three")
    server, page = served(folder / "repo"), browser.page()
    assert page.open(f"{server.url}page/") == "ready", page.text("#status")
    later = "Date.now = ((now) => () => now() + 7200e3)(Date.now)"
    page.call("Page.addScriptToEvaluateOnNewDocument", source=later)
    assert page.reload() == "refused"
    assert "the bundle expired on" in page.text("#status")
    server.stop()
    assert page.reload() == "refused"
    assert page.text("#status").endswith("its owner must give a newer version. the server cannot be reached.")
    server.start()
    edge_graphs.classifier(folder / "four", tokenizer=edge_graphs.pieces_tokenizer(), version=4)
    repository.publish(folder / "four")
    assert page.reload() == "ready", page.text("#status")
    assert "version 4" in page.text("#chips")


def test_a_repository_that_does_not_vouch_for_the_bundle_is_refused(owner):
    folder, _ = owner
    theirs = Keys.create(folder / "theirs", b"secret").folder / "root.json"
    with pytest.raises(TrustError, match="refused what is not signed by the keys of its owner"):
        site.of_repository("tiny-classifier", folder / "repo", theirs, folder / "page")
    with pytest.raises(BundleError, match="the repository has no bundle other"):
        site.of_repository("other", folder / "repo", folder / "keys/root.json", folder / "page")
    assert not (folder / "page").exists()
