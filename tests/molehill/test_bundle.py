from __future__ import annotations

import io
import zipfile

import pytest

from molehill import bundle
from molehill_client.deploy.node import build

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern")  # Flower's own


def packed(entries, compression=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return out.getvalue()


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


@pytest.fixture(scope="module")
def own():
    return build()


def test_a_bundle_holds_no_code(own):
    assert [name for name, _ in entries_of(own) if not name.startswith(".info/")] == [bundle.NAME]


def test_the_same_files_are_the_same_bundle_however_packed(own):
    assert bundle.same(own, build())
    assert bundle.same(packed(entries_of(own), zipfile.ZIP_DEFLATED), own)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_anything_else_is_another_bundle(own):
    entries = entries_of(own)
    code = ("evil.py", b"print('hello')")
    assert not bundle.same(packed([*entries, code]), own)
    assert not bundle.same(packed([(name, data.replace(b"molehill_", b"molehi11_")) for name, data in entries]), own)
    assert not bundle.same(packed([*entries, entries[0]]), own)
    assert not bundle.same(packed(entries[::-1]), own)
    assert not bundle.same(own[:-1], own)
    assert not bundle.same(b"", own)
    assert not bundle.same(own[: len(own) // 2], own)
