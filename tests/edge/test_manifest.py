"""What a manifest must say before anything else of a bundle is touched."""

from __future__ import annotations

import hashlib
import os

import pytest
from edge_bundles import FILES, make_bundle, manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.errors import BundleError
from molehill_edge import manifest as manifests
from molehill_protos.v1.bundle_pb2 import File, Form, Generation, Golden, Manifest, Quantisation, Runtime, Slot, Task

GENERATION = {"eos": [2], "layers": 2, "heads": 2, "head_dim": 4, "vocabulary": 32}


def read(made, **options):
    return manifests.read(made.SerializeToString(deterministic=True), "here", **options)


def refused(made, what, **options):
    with pytest.raises(BundleError) as caught:
        read(made, **options)
    assert what in str(caught.value)
    assert str(caught.value).startswith("here: ")
    assert caught.value.exit_code == 13
    assert caught.value.mend


def causal(**fields):
    generation = Generation(**(GENERATION | fields))
    return Task(kind="causal-lm", max_length=64, generation=generation)


def test_a_good_one_is_read():
    made = manifest()
    assert read(made) == made
    made = manifest(task=causal(), quantisation=Quantisation(base="int4", head="int8", experts="int4", block=32))
    assert read(made) == made
    made = manifest(
        {"base.bin": b"", "model.onnx": b"", "tokenizer.json": b""}, sites=[], routers=[], gate=[], slots=[]
    )
    assert read(made) == made


def test_the_layout_digest_leaves_out_who_sits_in_a_slot():
    digest = manifest().layout
    assert manifest(slots=[Slot(id="x"), Slot(), Slot(), Slot(id="y", shared=True)]).layout == digest
    assert manifest(slots=[Slot(id="x"), Slot(), Slot(), Slot(id="y")]).layout != digest


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"format": 2}, "has format 2, and this version of molehill reads up to 1"),
        ({"format": 0}, "format 0 does not exist"),
        ({"id": ""}, "'' cannot be the id of a bundle"),
        ({"id": "../up"}, "'../up' cannot be the id of a bundle"),
        ({"id": ".."}, "'..' cannot be the id of a bundle"),
        ({"id": "a\n"}, "cannot be the id of a bundle"),
        ({"id": "a" * 129}, "cannot be the id of a bundle"),
        ({"version": 0}, "it has no version"),
        ({"created": -1}, "a date before 1970"),
        ({"layout": b"0" * 32}, "the layout digest"),
        ({"task": Task(kind="vision", max_length=1)}, "'vision' is not a task"),
        ({"task": Task(kind="classification", max_length=1, pooling="cls")}, "it has no labels"),
        (
            {"task": Task(kind="classification", max_length=1, pooling="cls", labels=["a", "a"])},
            "a label is listed twice",
        ),
        ({"task": Task(kind="classification", max_length=0, pooling="cls", labels=["a"])}, "an input of 0 tokens"),
        ({"task": Task(kind="classification", max_length=1, pooling="max", labels=["a"])}, "not a way of pooling"),
        ({"task": Task(kind="causal-lm", max_length=1)}, "it does not say how to generate"),
        ({"task": causal(layers=0)}, "0 layers"),
        ({"task": causal(eos=[32])}, "token 32 is not in its vocabulary"),
        ({"task": causal(template=True)}, "it has no chat template"),
        ({"task": causal(template=True, chat_template="x" * 70_000)}, "a chat template of more than 65536 characters"),
        ({"quantisation": Quantisation(base="int2", experts="int8")}, "'int2' is not a precision"),
        ({"quantisation": Quantisation(base="int4", experts="int8", block=12)}, "12 weights sharing a scale"),
        ({"slots": [Slot(id="a"), Slot(id="a"), Slot(), Slot()]}, "an expert sits twice"),
        ({"slots": [Slot(id="a/b"), Slot(), Slot(), Slot()]}, "'a/b' cannot be the id of an expert"),
        ({"slots": [Slot(), Slot(), Slot()]}, "site 'layer.0.q' has slot 3, and there are 3"),
        ({"runtime": Runtime(onnxruntime="99.1")}, "the bundle needs onnxruntime 99.1 or newer, and "),
        ({"runtime": Runtime(onnxruntime="new")}, "'new' is not a version of onnxruntime"),
        ({"golden": [Golden()]}, "a golden input of 0 tokens"),
        ({"golden": [Golden(input_ids=[1], best=2, logits=[0.0])]}, "golden answer 2 of 2"),
        ({"golden": [Golden(input_ids=[1], best=1, logits=[float("nan")])]}, "a golden answer that is not a number"),
        ({"golden": [Golden()] * 65}, "65 golden inputs, more than 64"),
        ({"files": [File(path=f"gates/{n:03}.safetensors") for n in range(257)]}, "257 files, more than 256"),
    ],
)
def test_what_is_refused(fields, what):
    refused(manifest(**fields), what)


@pytest.mark.parametrize(
    "path",
    [
        "../model.onnx",
        "/etc/passwd",
        "gates/../../x.safetensors",
        "gates/..safetensors",
        "gates/.safetensors",
        "gates/a/b.safetensors",
        "gates\\a.safetensors",
        "gates/a.bin",
        "./model.onnx",
        "C:model.onnx",
        "manifest.pb",
        "model.onnx\0",
        "run.sh",
        "",
    ],
)
def test_a_path_that_no_bundle_has(path):
    made = manifest()
    made.files.append(File(path=path, sha256=bytes(32)))
    refused(made, "is not a file that a bundle may hold")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: m.files.append(m.files[0]), "a file is listed twice"),
        (lambda m: m.files.append(File(path="gates/LAB-1.safetensors", sha256=bytes(32))), "a file is listed twice"),
        (lambda m: m.files.reverse(), "its files are not in order"),
        (lambda m: m.files.pop(0), "base.bin not listed"),
        (lambda m: m.files.pop(2), "gate.safetensors not listed"),
        (lambda m: setattr(m.files[0], "sha256", b"short"), "base.bin has no SHA-256"),
        (lambda m: setattr(m.files[0], "length", 1 << 60), "base.bin has more than 64 GiB"),
        (lambda m: setattr(m.base, "digest", "AB" * 32), "the digest of the base model is not SHA-256"),
        (lambda m: setattr(m.base, "id", ""), "the base model has no id"),
        (lambda m: m.sites.append(m.sites[0]), "a site is listed twice"),
        (lambda m: setattr(m.sites[0], "name", ""), "a site without a name"),
        (lambda m: m.sites[0].ranks.pop(), "has 4 slots and 3 ranks"),
        (lambda m: m.sites[0].slots.__setitem__(1, 0), "has a slot twice"),
        (lambda m: m.sites[0].ranks.__setitem__(1, 0), "has an impossible rank"),
        (lambda m: m.sites[1].ranks.__setitem__(1, 2), "has vectors of a rank other than 1"),
        (lambda m: setattr(m.sites[0], "form", 0), "has no known form"),
        (lambda m: setattr(m.sites[0], "form", 99), "has no known form"),
        (lambda m: setattr(m.sites[0], "form", Form.GEMM_INT4), "has no block of 4-bit weights"),
        (lambda m: setattr(m.sites[0], "a", ""), "has not the tensors of its form"),
        (lambda m: setattr(m.sites[0], "d_out", 0), "has no size"),
        (lambda m: setattr(m.sites[0], "d_in", 1 << 30), "is too large"),
        (lambda m: setattr(m.sites[0], "a_start", 1 << 31), "begins too late"),
        (lambda m: m.sites[0].ClearField("slots"), "has no slots"),
        (lambda m: m.routers[0].slots.append(4), "router 'layer.0.q' has slot 4, and there are 4"),
        (lambda m: setattr(m.routers[0], "name", ""), "a router without a name"),
        (lambda m: m.gate.append(m.gate[0]), "a gate tensor is listed twice"),
        (lambda m: setattr(m.gate[0], "name", ""), "a gate tensor without a name"),
        (lambda m: setattr(m.gate[0], "router", 1), "belongs to router 1"),
        (lambda m: setattr(m.gate[0], "router", -2), "belongs to router -2"),
        (lambda m: setattr(m.gate[0], "router", -1), "has experts and no router"),
        (lambda m: setattr(m.gate[0], "expert_axis", 2), "has axis 2"),
        (lambda m: setattr(m.gate[0], "expert_axis", 1), "is made for 8 experts, and its router has 3"),
        (lambda m: m.gate[1].shape.__setitem__(0, 0), "has an impossible shape"),
        (lambda m: m.gate[1].shape.extend([1 << 20, 1 << 20]), "is too large"),
        (lambda m: m.gate[1].shape.extend([1] * 8), "9 axes in"),
    ],
)
def test_what_is_refused_in_a_part(change, what):
    made = manifest()
    change(made)
    made.layout = manifests.layout_digest(made)
    refused(made, what)


def test_it_expires():
    made = manifest(expires=2_000_000_000)
    assert read(made, now=1_999_999_999.5)
    refused(made, "the bundle expired on 2033-05-18", now=2_000_000_000)
    refused(manifest(expires=1_700_000_000), "the bundle expired on 2023-11-14")
    refused(manifest(expires=(1 << 63) - 1), "the bundle expired on 9999-12-31", now=float(1 << 63))
    assert read(manifest(), now=1e18)


def test_a_manifest_that_is_too_large_is_not_parsed():
    with pytest.raises(BundleError, match="more than 2 MiB"):
        manifests.read(bytes((16 << 20) + 1), "here")


GOOD = manifest(golden=[Golden(input_ids=[1, 2], best=1, logits=[0.5, 1.5])], expires=4_000_000_000).SerializeToString(
    deterministic=True
)


def read_or_refused(data):
    try:
        made = manifests.read(data, "here", now=0)
    except BundleError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 600
    else:
        assert isinstance(made, Manifest)
        assert all(manifests.known_path(file.path) for file in made.files)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes(data):
    read_or_refused(data)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(GOOD)),
    st.binary(max_size=8),
    st.booleans(),
)
def test_a_mutated_manifest(changes, cut, inserted, truncate):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    read_or_refused(bytes(data[:cut]) + inserted + (b"" if truncate else bytes(data[cut:])))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_numbers_at_random_in_the_right_places(data):
    number = st.sampled_from([0, 1, 2, 3, 4, 8, 1 << 20, (1 << 32) - 1])
    made = manifest()
    site, tensor = made.sites[0], made.gate[0]
    for owner, name in [
        (site, "d_in"),
        (site, "d_out"),
        (site, "a_start"),
        (made.task, "max_length"),
        (made, "format"),
    ]:
        if data.draw(st.booleans()):
            setattr(owner, name, data.draw(number))
    for numbers in (site.slots, site.ranks, made.routers[0].slots, tensor.shape):
        if data.draw(st.booleans()):
            del numbers[:]
            numbers.extend(data.draw(st.lists(number, max_size=5)))
    tensor.router, tensor.expert_axis = data.draw(st.integers(-3, 3)), data.draw(st.integers(-3, 3))
    made.layout = manifests.layout_digest(made)
    read_or_refused(made.SerializeToString())


def test_the_files_are_those_of_the_manifest(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    (folder / "note.txt").write_text("more")
    made, data = manifests.load(folder)
    assert hashlib.sha256(data).digest() == hashlib.sha256((folder / "manifest.pb").read_bytes()).digest()
    manifests.check_files(folder, made)


def missing(path):
    path.unlink()


def longer(path):
    path.write_bytes(path.read_bytes() + b"x")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def a_folder(path):
    path.unlink()
    path.mkdir()


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [missing, longer, flipped, linked, a_folder, a_pipe])
@pytest.mark.parametrize("name", ["base.bin", "gates/lab-1.safetensors"])
def test_a_file_that_is_another(tmp_path, name, change):
    folder = make_bundle(tmp_path / "bundle")
    made, _ = manifests.load(folder)
    change(folder / name)
    with pytest.raises(BundleError, match=name):
        manifests.check_files(folder, made)


def test_a_folder_that_is_a_link(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    made, _ = manifests.load(folder)
    (folder / "gates").rename(tmp_path / "elsewhere")
    (folder / "gates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="a folder of the bundle is a link"):
        manifests.check_files(folder, made)


@pytest.mark.parametrize("change", [missing, linked, a_folder, a_pipe])
def test_no_manifest(tmp_path, change):
    folder = make_bundle(tmp_path / "bundle")
    change(folder / "manifest.pb")
    with pytest.raises(BundleError, match=r"there is no bundle here|cannot read the manifest"):
        manifests.load(folder)


def test_every_file_of_the_helper_is_known():
    assert all(manifests.known_path(path) for path in FILES)


def test_a_bundle_behind_a_link(tmp_path):
    made = make_bundle(tmp_path / "bundle")
    (tmp_path / "link").symlink_to(made)
    manifests.check_files(tmp_path / "link", manifests.load(tmp_path / "link")[0])
