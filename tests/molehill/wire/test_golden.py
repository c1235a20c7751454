"""Bytes of format 1, as first written: later versions must go on reading them, and write them without a new format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import zstandard

from molehill import registry
from molehill.config import MethodRef
from molehill.wire.message import Delta, decode_delta, encode_delta
from molehill.wire.tree import Tree

SAME_ZSTD = zstandard.ZSTD_VERSION == (1, 5, 7)  # another version may compress the same content to other bytes

FP32 = (
    "0000003f000080bf0000803e000080bf721c47bfe4380ebfabaaaabe398ee3bd398ee33dabaaaa3ee4380e3f721c473f0000"
    "803f6f12833a6f1203bb000000006f12833b"
)
PAYLOADS: list[tuple[str, dict[str, Any], str]] = [
    ("fp32", {}, FP32),
    ("fp16", {}, "f2ff000000003972551c1c557239001919001970f46cf4f2f0ede7676d7072744cd00054"),
    ("bf16", {}, "00808080470eabe4e4ab0e4780830300833fbf3ebfbfbfbebd3d3e3f3f3f3abb003b"),
    ("int8", {}, "ebff080821747454408120819db9d6f20e2a47637f20c1007f"),
    ("int4", {"zstd": False}, "efff9292ae7474549492cbfe2154270c07"),
    ("int4", {}, "efff28b52ffd200f7900009292ae7474549492cbfe2154270c07"),
    ("compeft", {"positions": "mask"}, "03000000000000000000803f0000803f00000000c00028b52ffd2003190000500800"),
    ("compeft", {"positions": "gap"}, "03000000000000000000803f0000803f00000000c00128b52ffd2003190000010108"),
    ("compeft", {"positions": "golomb"}, "03000000000000000000803f0000803f00000000c00201c0c2"),
]
INT8 = [0.50394, -1.0, 0.25197, -1.0, -0.77953, -0.55906, -0.33071, -0.11024, 0.11024, 0.33071, 0.55906, 0.77953, 1.0]
INT4 = [0.57143, -1.0, 0.28571, -1.0, -0.71429, -0.57143, -0.28571, -0.14286, 0.14286, 0.28571, 0.57143, 0.71429, 1.0]
TERNARY = [0.0, -1.0, 0.0, -1.0, 0, 0, 0, 0, 0, 0, 0, 0, 1.0]
DELTA = (
    "0801120372756e18032207626f6f6b732d302a40616261626162616261626162616261626162616261626162616261626162"
    "6162616261626162616261626162616261626162616261626162616261626162616232406339656461623632613436363032"
    "6330656263626462323630363861313364356630333239333235666161313731316362346234643764346535336461343837"
    "38c801423228b52ffd20294901000a090a046865616412012d0a1c0a0d6c617965722e302e71756572791202653019000000"
    "00004a93404aa70108011204696e74341a187b2267726f7570223a36342c227a737464223a747275657d224528b52ffd204b"
    "e5010024030a150a10686561642f2d2f2e626961731201030a180a126c617965722e302e71756572792f65302f4112020205"
    "42120202020200eaf94f56f1022a1aefff28b52ffd200f7900009292ae7474549492cbfe2154270c07322063fd073d5a93f8"
    "b07a96595331c866d1ef56f30f8ab17ff7242a13e693cb5688"
)


@pytest.mark.parametrize(("name", "params", "text"), PAYLOADS)
def test_payloads(name: str, params: dict[str, Any], text: str, small: Tree) -> None:
    codec = registry.build("codec", name, params)
    got = codec.decode(bytes.fromhex(text), small.layout).flat
    coarse = {"int8": INT8, "int4": INT4, "compeft": TERNARY}.get(name)
    if coarse is None:
        assert np.allclose(got, small.flat, rtol=2**-8)
    else:
        assert np.allclose(got[:13], coarse, rtol=1e-3)
    if SAME_ZSTD:
        assert codec.encode(small).hex() == text


def test_delta(small: Tree) -> None:
    delta = Delta("run", 3, "books-0", "ab" * 32, small, 200, {("layer.0.query", "e0"): 1234.5, ("head", "-"): 0.0})
    got = decode_delta(bytes.fromhex(DELTA), 10_000, small.layout)
    assert (got.run, got.round, got.client, got.base, got.examples) == ("run", 3, "books-0", "ab" * 32, 200)
    assert got.tokens == delta.tokens
    assert np.allclose(got.tree.flat[:13], INT4, rtol=1e-3)
    if SAME_ZSTD:
        assert encode_delta(delta, MethodRef(name="int4")).hex() == DELTA
