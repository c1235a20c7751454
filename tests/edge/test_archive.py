"""A bundle in one file, and what a hostile one may try."""

from __future__ import annotations

import io
import stat
import struct
import zipfile

import pytest
from edge_bundles import FILES, make_bundle, manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.errors import BundleError
from molehill_edge import archive
from molehill_edge import manifest as manifests
from molehill_edge.trust import InsecureLocal

MANIFEST = manifest().SerializeToString(deterministic=True)
ENTRIES = [("manifest.pb", MANIFEST), *sorted(FILES.items())]


@pytest.fixture
def packed(tmp_path):
    path = tmp_path / "reviews.molehill"
    archive.pack(make_bundle(tmp_path / "bundle"), path)
    return path


def refused(tmp_path, data, what):
    """The archive of these bytes is refused, and nothing of it is left."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    path = tmp_path / "bad.molehill"
    path.write_bytes(data)
    with pytest.raises(BundleError) as caught:
        archive.unpack(path, home / "out")
    assert what in str(caught.value)
    assert "bad.molehill" in str(caught.value)
    assert list(home.iterdir()) == []


def zipped(entries, change=lambda entry: None, compress=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as made:
        for name, data in entries:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compress
            change(entry)
            made.writestr(entry, data)
    return out.getvalue()


def test_a_list_of_files_that_is_too_long_is_not_read(tmp_path):
    """Before zipfile takes all of it into memory."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    many = entry * 60_000
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(many), 1)
    for count, what in ((60_000, "holds 60000 files"), (3, "has a list of files of 2820000 bytes")):
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(many), 0, 0)
        refused(tmp_path, many + end, what)
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(many), 0)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 47, 0, 0)
        refused(tmp_path, many + end64 + locator + end, what)
        refused(tmp_path, many + end64 + b" " + locator + end, "damaged, or not an archive")
        refused(tmp_path, many + end64 + locator + end[:-2] + b"\1\0 ", "damaged, or not an archive")


def test_an_archive_of_many_gigabytes(tmp_path, monkeypatch):
    """Its numbers lie in other records; here they do from the first byte on."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    archive.pack(make_bundle(tmp_path / "bundle"), tmp_path / "a.molehill")
    monkeypatch.undo()
    assert b"PK\6\7" in (tmp_path / "a.molehill").read_bytes()[-42:]
    archive.unpack(tmp_path / "a.molehill", tmp_path / "out")
    manifests.check_files(tmp_path / "out", manifest())


def test_the_longest_list_of_files_fits(tmp_path):
    paths = [f"gates/{'x' * 124}{i:04}.safetensors" for i in range(manifests.MAX_FILES - len(FILES))]
    archive.pack(make_bundle(tmp_path / "bundle", dict.fromkeys(paths, b"gate")), tmp_path / "a.molehill")
    archive.unpack(tmp_path / "a.molehill", tmp_path / "out")


def test_there_and_back(tmp_path, packed):
    made = archive.unpack(packed, tmp_path / "out" / "bundle")
    assert made == manifest()
    found = {str(p.relative_to(tmp_path / "out/bundle")) for p in (tmp_path / "out/bundle").rglob("*") if p.is_file()}
    assert found == {"manifest.pb", *FILES}
    manifests.check_files(tmp_path / "out/bundle", made)


def test_equal_bundles_give_equal_bytes(tmp_path, packed):
    again = make_bundle(tmp_path / "again")
    (again / "note.txt").write_text("not part of the bundle")
    for path in again.rglob("*"):
        path.chmod(0o700)
    archive.pack(again, tmp_path / "again.molehill")
    assert (tmp_path / "again.molehill").read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(packed) as opened:
        assert opened.namelist() == [name for name, _ in ENTRIES]
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in opened.infolist()} == {zipfile.ZIP_STORED}


def test_a_damaged_bundle_is_not_packed(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    for data, what in ((b"Base" * 500, "its SHA-256 differs"), (b"", "is not of its length")):
        (folder / "base.bin").write_bytes(data)
        with pytest.raises(BundleError, match=what):
            archive.pack(folder, tmp_path / "a.molehill")
    (folder / "base.bin").unlink()
    with pytest.raises(BundleError, match="cannot pack the bundle: No such file"):
        archive.pack(folder, tmp_path / "a.molehill")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_is_used(tmp_path, packed):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(BundleError, match="cannot unpack the archive: Directory not empty"):
        archive.unpack(packed, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "out", "reviews.molehill"]


def test_no_archive(tmp_path):
    with pytest.raises(BundleError, match="cannot unpack the archive: No such file"):
        archive.unpack(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "gates/../../evil", "gates\\..\\evil", "C:/evil", "model.onnx/", "Model.onnx", "note.txt"],
)
def test_an_entry_that_the_manifest_does_not_list(tmp_path, name):
    refused(tmp_path, zipped([*ENTRIES, (name, b"evil")]), "holds a file that its manifest does not list")


def symlink(entry):
    if entry.filename == "base.bin":
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def encrypted(data):
    """The flag of an encrypted entry, in the central directory."""
    data = bytearray(data)
    start = data.index(b"PK\x01\x02")
    data[start + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (zipped([]), "holds nothing"),
        (zipped(ENTRIES[1:]), "does not begin with manifest.pb"),
        (zipped([*ENTRIES[1:], ENTRIES[0]]), "does not begin with manifest.pb"),
        (zipped(ENTRIES[:-1]), "lacks tokenizer.json"),
        (zipped([ENTRIES[0], *reversed(ENTRIES[1:])]), "in another order"),
        (zipped(ENTRIES, compress=zipfile.ZIP_DEFLATED), "holds a compressed file"),
        (zipped([*ENTRIES, ("bomb", bytes(1 << 20))], compress=zipfile.ZIP_BZIP2), "holds a compressed file"),
        (zipped(ENTRIES, change=symlink), "holds something other than a file, 'base.bin'"),
        (encrypted(zipped(ENTRIES)), "holds an encrypted file, 'manifest.pb'"),
        (zipped([ENTRIES[0], ("base.bin", b"Base" * 500), *ENTRIES[2:]]), "its SHA-256 differs"),
        (zipped([ENTRIES[0], ("base.bin", b"base" * 501), *ENTRIES[2:]]), "with another length"),
        (zipped([("manifest.pb", bytes((16 << 20) + 1))]), "manifest.pb that is too large"),
        (zipped([("manifest.pb", b"\xff"), *ENTRIES[1:]]), "the manifest is damaged"),
        (zipped([(f"f{n}", b"") for n in range(258)]), "holds 258 files"),
        (zipped(ENTRIES)[:-60], "damaged, or not an archive"),
        (zipped(ENTRIES)[200:], "damaged, or not an archive"),
        (b"", "damaged, or not an archive"),
        (MANIFEST, "damaged, or not an archive"),
    ],
)
def test_what_is_refused(tmp_path, data, what):
    refused(tmp_path, data, what)


@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's, to who writes such an archive
def test_a_file_twice(tmp_path):
    refused(tmp_path, zipped([*ENTRIES, ENTRIES[1]]), "holds a file twice")


def test_entries_that_share_their_bytes(tmp_path):
    """A bomb without compression: many entries of the central directory name one place of the file."""
    data = zipped([ENTRIES[0], ("base.bin", bytes(100_000))])
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    second = data.index(b"PK\x01\x02", at + 4)
    central = data[at:second] + data[second:end] * 20
    tail = bytearray(data[end:])
    tail[8:10] = tail[10:12] = (21).to_bytes(2, "little")
    tail[12:16] = len(central).to_bytes(4, "little")
    refused(tmp_path, data[:at] + central + bytes(tail), "holds files that overlap")


GOOD = zipped(ENTRIES)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=5),
    st.integers(0, len(GOOD)),
    st.binary(max_size=6),
    st.booleans(),
)
def test_a_mutated_archive(tmp_path_factory, changes, cut, inserted, truncate):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    home = tmp_path_factory.mktemp("fuzz")
    (home / "a").write_bytes(bytes(data[:cut]) + inserted + (b"" if truncate else bytes(data[cut:])))
    try:
        made = archive.unpack(home / "a", home / "out")
    except BundleError:
        assert [path.name for path in home.iterdir()] == ["a"]
    else:
        manifests.check_files(home / "out", made)


def test_without_a_signature_only_with_a_warning(tmp_path, packed, caplog):
    warned = []
    local = InsecureLocal(warned.append)
    with local.admit(tmp_path / "bundle") as admitted:
        assert admitted.folder == tmp_path / "bundle"
    assert (tmp_path / "bundle" / "model.onnx").is_file()
    with local.admit(str(packed)) as admitted:
        assert admitted.manifest.id == "reviews"
        assert (admitted.folder / "model.onnx").read_bytes() == FILES["model.onnx"]
    assert not admitted.folder.parent.exists()
    assert len(warned) == 1
    assert "without any signature" in warned[0]
    assert not caplog.records
    InsecureLocal().admit(tmp_path / "bundle")
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_an_archive_that_nobody_closes_goes_all_the_same(packed):
    admitted = InsecureLocal(str).admit(packed)
    folder = admitted.folder
    assert folder.exists()
    del admitted
    assert not folder.parent.exists()


def test_without_a_signature_the_rest_is_checked(tmp_path, packed, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "bundle" / "base.bin").write_bytes(b"Base" * 500)
    local = InsecureLocal(str)
    with pytest.raises(BundleError, match="its SHA-256 differs"):
        local.admit(tmp_path / "bundle")
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(BundleError, match="damaged"):
        local.admit(packed)
    with pytest.raises(BundleError, match="there is no bundle here"):
        local.admit(tmp_path / "nothing")
    assert list((tmp_path / "temporary").iterdir()) == []
