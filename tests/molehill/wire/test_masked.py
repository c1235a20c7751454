"""The message of secure aggregation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from molehill.errors import MessageError
from molehill.wire.message import Masked, decode_masked, encode_masked
from molehill_protos.v1 import masked_pb2

LIMIT = 2**16
MASKED = Masked("run", 3, 1, "books-0", "ab" * 32, "cd" * 32, np.array([0, 1, 2**63, 2**64 - 1], np.uint64))


def test_it_comes_back():
    got = decode_masked(encode_masked(MASKED), LIMIT, 4)
    for field in dataclasses.fields(Masked):
        assert np.array_equal(getattr(got, field.name), getattr(MASKED, field.name))


def test_it_is_eight_bytes_a_number_and_a_short_head():
    many = dataclasses.replace(MASKED, numbers=np.zeros(5000, np.uint64))
    assert len(encode_masked(many)) < 8 * 5000 + 200


@pytest.mark.parametrize("size", [0, 3, 5])
def test_another_length_is_refused(size):
    with pytest.raises(MessageError, match=f"32 bytes of masked numbers, {8 * size} were asked for"):
        decode_masked(encode_masked(MASKED), LIMIT, size)


def test_sizes_and_forms_are_refused():
    blob = encode_masked(MASKED)
    with pytest.raises(MessageError, match="the limit is 100"):
        decode_masked(blob, 100, 4)
    message = masked_pb2.Masked.FromString(blob)
    message.format = 2
    with pytest.raises(MessageError, match="format 2"):
        decode_masked(message.SerializeToString(deterministic=True), LIMIT, 4)
    with pytest.raises(MessageError, match="unknown, repeated or trailing"):
        decode_masked(blob + blob, LIMIT, 4)
    for change in ({"client": ""}, {"run": "\n"}, {"base": "x" * 300}):
        with pytest.raises(MessageError, match="printable characters"):
            encode_masked(dataclasses.replace(MASKED, **change))


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data):
    with pytest.raises(MessageError):
        decode_masked(data, LIMIT, 4)


def test_every_truncation_is_refused():
    blob = encode_masked(MASKED)
    for length in range(len(blob)):
        with pytest.raises(MessageError):
            decode_masked(blob[:length], LIMIT, 4)
