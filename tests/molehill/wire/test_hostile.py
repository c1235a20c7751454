"""What a forged message may cost: sizes, counts and codecs are judged before anything is decoded."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill import registry
from molehill.config import MethodRef
from molehill.errors import MessageError
from molehill.wire import positions
from molehill.wire.keys import Key
from molehill.wire.message import Delta, _checksum, decode_delta, decode_tree, encode_delta, encode_tree
from molehill.wire.packing import compress
from molehill.wire.tree import Layout, Tree
from molehill_protos.v1 import delta_pb2, tree_pb2

N = 200_000
LAYOUT = Layout({Key("s", "e0", "A"): (N // 2, 1), Key("s", "e0", "B"): (1, N // 2)})
LIMIT = 2**28
VARIANTS = [
    ("fp32", {}),
    ("fp16", {"zstd": True}),
    ("bf16", {"zstd": True}),
    ("int8", {"zstd": True}),
    ("int4", {"group": 8, "zstd": True}),
    *[("compeft", {"density": density, "positions": way}) for way in ("mask", "gap", "golomb") for density in (0.2, 1)],
]


@contextmanager
def at_most(megabytes):
    """Fail when the block takes more memory than that."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] / 2**20 <= megabytes
    finally:
        tracemalloc.stop()


def delta_with(payload, codec, params, **fields):
    """A delta whose checksums fit, whatever is in it."""
    real = MethodRef(name="fp32")
    message = delta_pb2.Delta.FromString(encode_delta(Delta("r", 1, "c", "b", Tree(LAYOUT), 5, {}), real))
    blob = tree_pb2.TreeBlob.FromString(encode_tree(Tree(LAYOUT), real))
    blob.codec, blob.params, blob.payload = codec, json.dumps(params, sort_keys=True, separators=(",", ":")), payload
    blob.sha256 = _checksum(blob)
    message.tree.CopyFrom(blob)
    for name, value in fields.items():
        setattr(message, name, value)
    return message.SerializeToString(deterministic=True)


def wide_golomb(count=N, bits=31):
    """ComPEFT with Golomb codes of as many bits as the format has, all of them gaps of 0."""
    head = struct.pack("<Q", count) + np.ones(2, "<f4").tobytes() + bytes(-(-count // 8))
    codes = bytes(-(-count * bits // 8)) + np.packbits(np.ones(count, np.uint8)).tobytes()
    return head + bytes([2]) + struct.pack("<B", bits) + codes


COMPEFT = {"alpha": 1.0, "density": 1.0, "over": "tensor", "positions": "golomb", "scale": "mean"}


def test_golomb_codes_wider_than_the_gaps_can_be_are_refused_and_take_nothing():
    blob = delta_with(wide_golomb(), "compeft", COMPEFT)
    with at_most(6), pytest.raises(MessageError, match="Golomb codes with 31 bits"):  # the message alone is one
        decode_delta(blob, LIMIT, LAYOUT)


@pytest.mark.parametrize("way", ["mask", "gap", "golomb"])
@pytest.mark.parametrize("density", [0.01, 0.5, 1.0])
def test_decoding_positions_takes_little_beside_the_numbers(way, density):
    """Blocks of gaps and one flag a number; all at once they were 70 bytes a number."""
    n = 2_000_000
    mask = np.random.default_rng(0).random(n) < density
    coded = memoryview(positions.encode(mask, way))
    with at_most(5 * n / 2**20 + 8):
        got = positions.decode(coded, int(mask.sum()), n)
    assert np.array_equal(got, mask)


def test_a_codec_that_was_not_asked_for_is_never_decoded(monkeypatch):
    asked = MethodRef(name="compeft", density=0.1)
    for codec in ("fp32", "compeft"):
        target = registry.build("codec", codec, {}).__class__
        monkeypatch.setattr(target, "decode", lambda *_: pytest.fail("decoded"))
    for name, params, why in (
        ("fp32", {}, "its delta comes in codec 'fp32', not 'compeft'"),
        ("x" * 100_000, {}, "its delta comes in codec 'x+', not 'compeft'"),
        ("compeft", COMPEFT, r"its delta comes in codec 'compeft' with .*\"density\":1.0.*, not .*\"density\":0.1"),
    ):
        with pytest.raises(MessageError, match=why):
            decode_delta(delta_with(bytes(4 * N), name, params), LIMIT, LAYOUT, asked)
        with pytest.raises(MessageError, match="comes in codec"):
            decode_tree(encode_tree(Tree(LAYOUT), MethodRef(name="fp16")), LIMIT, LAYOUT, asked)


def test_more_numbers_than_the_density_allows_are_refused():
    payload = wide_golomb(count=N // 2, bits=1)
    with pytest.raises(MessageError, match=f"cannot hold {N // 2} of {N} numbers"):
        decode_delta(delta_with(payload, "compeft", {**COMPEFT, "density": 0.2}), LIMIT, LAYOUT)


@pytest.mark.parametrize("row", [b"\x0a\0", b"\x0a\x07\x0a\x05a/e/A"])
def test_a_few_bytes_that_expand_to_millions_of_rows_are_refused_at_once(row):
    table = compress(row * (2**22 // len(row)))
    assert len(table) < 1000
    began = time.process_time()
    with at_most(12), pytest.raises(MessageError, match="more rows than asked for: at most 65536"):
        decode_delta(delta_with(bytes(4 * N), "fp32", {}, tokens=table), LIMIT, LAYOUT)
    with pytest.raises(MessageError, match="more rows than asked for: at most 3 "):
        decode_delta(delta_with(bytes(4 * N), "fp32", {}, tokens=table), LIMIT, LAYOUT, None, 3)
    blob = tree_pb2.TreeBlob.FromString(encode_tree(Tree(LAYOUT), MethodRef(name="fp32")))
    blob.tensors = table
    blob.sha256 = _checksum(blob)
    with pytest.raises(MessageError, match="more rows than asked for: at most 258"):
        decode_tree(blob.SerializeToString(deterministic=True), LIMIT, LAYOUT)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("name", "params"), VARIANTS, ids=str)
@given(data=st.data())
@settings(max_examples=8)
def test_no_forged_payload_takes_memory_beyond_its_layout(name, params, data):
    """At most 40 bytes a number and the payload, whatever it says."""
    codec = registry.build("codec", name, params)
    honest = bytearray(codec.encode(Tree(LAYOUT, np.linspace(-1, 2, N, dtype=np.float32))))
    bomb = compress(bytes(data.draw(st.sampled_from([N // 8, N, 2 * N, 5 * N, 2**26]))))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=4)):
        honest[place % len(honest)] = value
    head = bytes(honest[: data.draw(st.integers(0, 20))])
    for forged in (
        bytes(honest),
        head + bomb,
        bytes(honest) + bomb,
        wide_golomb(bits=data.draw(st.integers(0, 255)) % 32),
    ):
        with at_most((40 * N + 2 * len(forged)) / 2**20 + 6), suppress(MessageError):
            codec.decode(memoryview(forged), LAYOUT)


CHILD = """
import resource, sys
from pathlib import Path
from molehill.errors import MessageError
from molehill.wire.message import decode_delta
from molehill.wire.keys import Key
from molehill.wire.tree import Layout
n = int(sys.argv[2])
layout = Layout({Key("s", "e0", "A"): (n // 2, 1), Key("s", "e0", "B"): (1, n // 2)})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
blobs = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]
before = peak()
for blob in blobs:
    try:
        decode_delta(blob, 2**28, layout)
    except MessageError as error:
        print(str(error)[:60], file=sys.stderr)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted in KiB only there")
def test_the_process_that_decodes_stays_small(tmp_path):
    """What numpy does not count counts here too: protobuf and zstd."""
    rows = compress(b"\x0a\0" * 2**21)
    for number, blob in enumerate(
        [
            delta_with(wide_golomb(), "compeft", COMPEFT),
            delta_with(bytes(4 * N), "fp32", {}, tokens=rows),
            delta_with(bytes(8) + bytes(4 * N), "fp32", {}),
            delta_with(b"\0\0" + compress(bytes(2**27)), "fp16", {"zstd": True}),
        ]
    ):
        (tmp_path / f"{number}.bin").write_bytes(blob)
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(N)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))  # noqa: E731 - it is that short
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 40
