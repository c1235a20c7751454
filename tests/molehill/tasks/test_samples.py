"""The sample is really downloaded through pip, once, and verified on every read."""

from __future__ import annotations

from collections import Counter

import pytest

from molehill.cache import cache_folder
from molehill.errors import DataError
from molehill.tasks import samples
from molehill.tasks.rows import GROUP
from molehill.tasks.samples import read_sample


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache, monkeypatch):
    monkeypatch.setenv("MOLEHILL_CACHE", str(cache))


def test_reviews():
    rows = read_sample("sample:reviews")
    assert Counter(rows["domain"]) == {"amazon": 3708, "movie": 10605, "nyt": 5190, "tweets": 4200}
    assert set(rows["label"]) == {"negative", "neutral", "positive"}
    assert all(text.strip() == text and text for text in rows["text"])
    groups = Counter(rows[GROUP])
    assert len([group for group in groups if group.startswith("amazon/")]) == 300
    assert len([group for group in groups if group.startswith("tweets/")]) == 4200
    assert Counter(zip(rows["domain"], rows["label"], strict=True))["nyt", "neutral"] == 2220
    by_place = dict(zip(rows.where, rows["label"], strict=True))
    # The third line of the editorials' file rates 0.15, the first of the films' 2.27.
    assert by_place["sample:reviews:nyt:2"] == "neutral"
    assert by_place["sample:reviews:movie:1"] == "positive"


def test_second_read_needs_no_network(cache, monkeypatch):
    read_sample("sample:reviews")
    monkeypatch.setattr(samples.sys, "executable", "/nonexistent/python")
    assert len(read_sample("sample:reviews")) == 23703
    assert [path.name for path in (cache / "samples").iterdir()] == ["vaderSentiment-2.5.tar.gz"]


def test_a_damaged_file_is_fetched_anew(cache):
    read_sample("sample:reviews")
    (cache / "samples" / "vaderSentiment-2.5.tar.gz").write_bytes(b"damaged")
    assert len(read_sample("sample:reviews")) == 23703


def test_no_cache_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, (tmp_path / "nowhere").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "nowhere").as_uri())
    with pytest.raises(DataError, match=r"sample:reviews: the sample cannot be downloaded: .*access to PyPI"):
        read_sample("sample:reviews")
    assert not list((tmp_path / "samples").iterdir())


def test_cache_folder_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("MOLEHILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be cached"):
        read_sample("sample:reviews")


def test_cache_folder_is_the_users(monkeypatch):
    monkeypatch.delenv("MOLEHILL_CACHE")
    assert cache_folder().name == "molehill"
