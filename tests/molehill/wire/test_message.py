from __future__ import annotations

import dataclasses
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.config import MethodRef
from molehill.errors import ConfigError, MessageError
from molehill.wire import message
from molehill.wire.keys import Key
from molehill.wire.message import Delta, decode_delta, decode_tree, digest, encode_delta, encode_tree
from molehill.wire.packing import compress
from molehill.wire.tree import Layout, Tree
from molehill_protos.v1 import delta_pb2, tree_pb2

LIMIT = 2**20
FP32, INT4 = MethodRef(name="fp32"), MethodRef(name="int4")


def delta_of(tree: Tree) -> Delta:
    return Delta("run", 3, "books-0", "ab" * 32, tree, 200, {("layer.0.query", "e0"): 1234.5, ("head", "-"): 0.0})


def table(*rows: tuple[str, tuple[int, ...]]) -> bytes:
    tensors = [tree_pb2.Tensor(name=name, shape=shape) for name, shape in rows]
    return compress(tree_pb2.TensorTable(tensors=tensors).SerializeToString())


def forged(small: Tree, **fields: Any) -> bytes:
    """A message of which some fields were replaced, with a checksum that fits."""
    blob = tree_pb2.TreeBlob.FromString(encode_tree(small, FP32))
    for name, value in fields.items():
        setattr(blob, name, value)
    if "sha256" not in fields:
        blob.sha256 = message._checksum(blob)
    return blob.SerializeToString(deterministic=True)


def test_a_tree_comes_back_with_its_names(small: Tree) -> None:
    got = decode_tree(encode_tree(small, FP32), LIMIT, small.layout)
    assert got.digest == small.digest
    assert decode_tree(memoryview(encode_tree(small, INT4)), LIMIT).layout == small.layout


def test_an_empty_tree_is_a_message() -> None:
    for name in ("fp32", "fp16", "bf16", "int8", "int4", "compeft"):
        assert len(decode_tree(encode_tree(Tree(Layout({})), MethodRef(name=name)), LIMIT)) == 0


def test_a_delta_comes_back(small: Tree) -> None:
    delta = delta_of(small)
    got = decode_delta(encode_delta(delta, FP32), LIMIT, small.layout)
    assert got.codec == "fp32"
    assert dataclasses.replace(got, tree=small, codec="") == delta
    assert got.tree.digest == small.digest


def test_memory_reaches_the_codec(small: Tree) -> None:
    memory: dict = {}
    encode_delta(delta_of(small), MethodRef(name="compeft"), memory)
    assert set(memory) == set(small)


def test_the_same_content_gives_the_same_bytes_and_parameters_travel(small: Tree) -> None:
    codec = MethodRef.model_validate({"name": "int4", "group": 8, "zstd": False})
    one = encode_tree(small, codec)
    assert digest(one) == digest(encode_tree(Tree.of(dict(reversed(list(small.items())))), codec))
    assert np.allclose(decode_tree(one, LIMIT).flat, small.flat, atol=0.08)


def test_names_cost_little(heavy: Tree) -> None:
    blob = tree_pb2.TreeBlob.FromString(encode_tree(heavy, INT4))
    assert blob.ByteSize() - len(blob.payload) < 16 * len(heavy) + 200


def test_unknown_codecs_and_parameters_are_refused_at_both_ends(small: Tree) -> None:
    with pytest.raises(ConfigError):
        encode_tree(small, MethodRef(name="fp31"))
    for fields in (
        {"codec": "fp31"},
        {"codec": "int4", "params": '{"group": 1e999}'},
        {"codec": "int4", "params": '{"colour": 1}'},
        {"params": "[]"},
        {"params": "["},
        {"params": "[" * 1000},
        {"params": "{" + " " * 2000 + "}"},
    ):
        with pytest.raises(MessageError, match="codec"):
            decode_tree(forged(small, **fields), LIMIT)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([("a/e0/A", (2**24, 2**24, 2**24, 2**24))], "the limit is"),
        ([("a/e0/A", (2**20,))], "the limit is"),
        ([("a/e0/A", (2**24 + 1,))], "outside the format"),
        ([("a/e0/A", (0,))], "outside the format"),
        ([("a/e0/A", (1, 1, 1, 1, 1))], "outside the format"),
        ([("a/e0/A", (1,) * 100_000)], "outside the format"),
        ([("a/e0/A", (1,)), ("a/e0/A", (1,))], "appears twice"),
        ([("b/e0/A", (1,)), ("a/e0/A", (1,))], "out of order"),
        ([("../e0/A", (1,))], "bad tensor name"),
        ([("a/e0", (1,))], "bad tensor name"),
        ([("", ())] * 70_000, "at most 65536"),
        ([("a/e0/A", (5,))], "its layout needs 20"),
    ],
)
def test_hostile_tables_are_refused_before_memory_is_taken(rows: list, why: str, small: Tree) -> None:
    with pytest.raises(MessageError, match=why):
        decode_tree(forged(small, tensors=table(*rows)), LIMIT)


def test_zstd_bombs_are_refused(small: Tree) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**27))
    assert len(bomb) < 2**14
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100))
    lying = bytearray(compress(bytes(1000)))
    lying[5:7] = struct.pack("<H", 500 - 256)  # the content size of a frame from 256 to 65791 bytes
    small_table = compress(tree_pb2.TensorTable().SerializeToString())
    for data in (bomb, unsized, bytes(lying), zlib.compress(bytes(10)), b"", small_table + b"\0"):
        with pytest.raises(MessageError):
            decode_tree(forged(small, tensors=data), LIMIT)
        for codec in ("fp16", "int8", "int4"):
            params = '{"zstd":true}'
            for payload in (data, b"\0\0" + data):
                with pytest.raises(MessageError):
                    decode_tree(forged(small, codec=codec, params=params, payload=payload), LIMIT)


def test_damage_is_told_by_the_checksum(small: Tree) -> None:
    for fields in ({"codec": "bf16"}, {"params": "{ }"}, {"tensors": b""}, {"payload": b""}):
        with pytest.raises(MessageError, match="checksum"):
            decode_tree(forged(small, **fields, sha256=bytes(32)), LIMIT)


def test_size_limits_hold_for_the_message_and_for_what_it_expands_to(small: Tree) -> None:
    with pytest.raises(MessageError, match="limit"):
        decode_tree(encode_tree(small, FP32), 60)
    zeros = Tree(Layout({Key("s", "e0", "A"): (1000, 1000)}))
    blob = encode_tree(zeros, INT4)
    assert len(blob) < 1000
    with pytest.raises(MessageError, match="takes 4000000 bytes, the limit is 1048576"):
        decode_tree(blob, LIMIT)


def test_other_formats_and_unknown_fields_are_refused(small: Tree) -> None:
    with pytest.raises(MessageError, match="format 2"):
        decode_tree(forged(small, format=2), LIMIT)
    blob = encode_tree(small, FP32)
    for tail in (b"\x78\x01", b"\x08\x01", b"\0", blob):  # an unknown field, one that repeats, rubbish, all of it again
        with pytest.raises(MessageError):
            decode_tree(blob + tail, LIMIT)


def test_values_that_are_not_finite_are_refused(small: Tree) -> None:
    flat = small.flat.copy()
    flat[-1] = np.nan
    with pytest.raises(MessageError, match=r"layer\.0\.query/e0/B"):
        decode_tree(forged(small, payload=flat.tobytes()), LIMIT)
    small.flat[0] = np.inf
    with pytest.raises(MessageError, match=r"head/-/head\.bias"):
        encode_tree(small, FP32)


@pytest.mark.parametrize("cut", ["missing", "foreign", "shape"])
def test_another_layout_than_expected_is_explained(cut: str, small: Tree) -> None:
    key = Key("layer.0.query", "e0", "B")
    shapes = dict(small.layout)
    if cut == "missing":
        shapes[Key("layer.1.query", "e0", "B")] = (2, 2)
    elif cut == "foreign":
        del shapes[key]
    else:
        shapes[key] = (4, 1)
    why = {"missing": "layer.1.query/e0/B: the tensor is missing", "foreign": f"{key.name}: nobody asked for",
           "shape": rf"{key.name}: shape \[2, 2\] where \[4, 1\]"}  # fmt: skip
    with pytest.raises(MessageError, match=why[cut]):
        decode_tree(encode_tree(small, FP32), LIMIT, Layout(shapes))
    with pytest.raises(MessageError, match=why[cut]):
        decode_delta(encode_delta(delta_of(small), FP32), LIMIT, Layout(shapes))


@pytest.mark.parametrize(
    "change",
    [{"run": ""}, {"client": "a\nb"}, {"client": "x" * 300}, {"base": ""}, {"round": -1}, {"round": 2**32},
     {"examples": 0}, {"examples": 2**60}, {"tokens": {("a", "e0"): float("nan")}}, {"tokens": {("a", "e0"): -1.0}},
     {"tokens": {("a", "e0"): float("inf")}}, {"tokens": {("a/b", "e0"): 1.0}}, {"tokens": {("a", ""): 1.0}}],
)  # fmt: skip
def test_a_delta_outside_the_format_is_never_written(change: dict[str, Any], small: Tree) -> None:
    with pytest.raises(MessageError):
        encode_delta(dataclasses.replace(delta_of(small), **change), FP32)


def test_a_shape_or_name_outside_the_format_is_never_written() -> None:
    for key, shape in ((Key("a", "e0", "A"), (0, 3)), (Key("a", "e0", "A"), (1,) * 5), (Key("a b", "e0", "A"), (1,))):
        with pytest.raises(MessageError):
            encode_tree(Tree(Layout({key: shape})), FP32)


def test_forged_deltas_are_refused(small: Tree) -> None:
    blob = encode_delta(delta_of(small), FP32)
    rows = [delta_pb2.ExpertTokens(site="a", expert="e0", tokens=1.0)] * 2
    twice = compress(delta_pb2.TokenTable(experts=rows).SerializeToString())
    negative = delta_pb2.TokenTable(experts=[delta_pb2.ExpertTokens(site="a", expert="e0", tokens=-1.0)])
    for name, value in (
        ("layout", "00"),
        ("tokens", b""),
        ("tokens", twice),
        ("tokens", compress(negative.SerializeToString())),
        ("examples", 0),
        ("format", 9),
        ("client", "\x07"),
        ("base", ""),
    ):
        bad = delta_pb2.Delta.FromString(blob)
        setattr(bad, name, value)
        with pytest.raises(MessageError):
            decode_delta(bad.SerializeToString(deterministic=True), LIMIT)
    with pytest.raises(MessageError):
        decode_tree(blob, LIMIT)
    with pytest.raises(MessageError):
        decode_delta(encode_tree(small, FP32), LIMIT)


@pytest.mark.parametrize("name", ["fp32", "int4", "compeft"])
def test_every_truncation_is_refused(name: str, small: Tree) -> None:
    codec = MethodRef(name=name)
    for blob, decode in (
        (encode_tree(small, codec), decode_tree),
        (encode_delta(delta_of(small), codec), decode_delta),
    ):
        for end in range(len(blob)):
            with pytest.raises(MessageError):
                decode(blob[:end], LIMIT)


def test_every_flipped_bit_of_a_tree_is_refused(small: Tree) -> None:
    blob = encode_tree(small, INT4)
    for bit in range(8 * len(blob)):
        bad = bytearray(blob)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(MessageError):
            decode_tree(bytes(bad), LIMIT)


@given(data=st.binary(max_size=300))
@settings(max_examples=200)
def test_random_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_tree, decode_delta):
        with pytest.raises(MessageError):
            decode(data, LIMIT)


_TREE = Tree(Layout({Key("s", "e0", "A"): (3, 5)}), np.linspace(-1, 1, 15, dtype=np.float32))


@given(data=st.data())
@settings(max_examples=200)
def test_damaged_deltas_end_in_a_message_error_or_a_sound_delta(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["fp16", "int8", "int4", "compeft"]))
    blob = bytearray(encode_delta(Delta("r", 1, "c", "b", _TREE, 5, {("s", "e0"): 2.0}), MethodRef(name=name)))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode_delta(bytes(blob), LIMIT, _TREE.layout)
    except MessageError:
        return
    assert got.examples >= 1
    assert np.isfinite(got.tree.flat).all()
