"""The messages of the data plane: a self-describing tree, and the delta a client sends, in the open or masked.

Decoding trusts nothing: sizes are checked before memory is taken, and whatever is wrong ends in a `MessageError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from molehill import registry
from molehill.errors import ConfigError, MessageError
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.packing import compress, expand
from molehill.wire.tree import Array, Layout, Shape, Tree
from molehill_protos.v1 import delta_pb2, masked_pb2, tree_pb2

FORMAT = 1
_MAX_DIMS = 4
_MAX_DIM = 2**24
_MAX_NUMBERS = 2**31
_MAX_TENSORS = 2**16
_MAX_TABLE = 4 * 2**20  # bytes of a table of names, expanded
_MAX_PARAMS = 1024  # characters
_MAX_TEXT = 256  # characters of a run, client or digest
_MAX_COUNT = 2**53
_FOREIGN = "The sender may run another version, or the bytes are damaged."

M = TypeVar("M", bound=Message)


class CodecRef(Protocol):
    """A codec by registered name, with its parameters (as in a configuration)."""

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class

    @property
    def params(self) -> Mapping[str, Any]: ...  # noqa: D102 - see the class


@dataclass(frozen=True)
class Delta:
    """What changed on a client in a round, and what the server weighs it by.

    Attributes:
        run: Name of the run.
        round: Round number.
        client: Id of the client.
        base: Digest of the base weights.
        tree: Trained minus received.
        examples: Rows the client trains on, at least 1.
        tokens: Tokens routed (gate mass) by ``(site, expert)``.
        codec: Name of the codec it came in; empty before it is sent.
    """

    run: str
    round: int
    client: str
    base: str
    tree: Tree
    examples: int
    tokens: Mapping[tuple[str, str], float] = field(default_factory=dict)
    codec: str = ""


@dataclass(frozen=True, eq=False)
class Masked:
    """What a client sends in place of a delta under secure aggregation; see `molehill.secure`.

    Attributes:
        run: Name of the run.
        round: Round number.
        attempt: Attempt at the round.
        client: Id of the client.
        base: Digest of the base weights.
        layout: Digest of the layout of the shared tensors.
        numbers: Modulo 2^64, ``[n]``.
    """

    run: str
    round: int
    attempt: int
    client: str
    base: str
    layout: str
    numbers: NDArray[np.uint64]


def digest(blob: bytes | memoryview) -> str:
    """SHA-256 (hex): the address of a blob in an exchange."""
    return hashlib.sha256(blob).hexdigest()


def encode_tree(tree: Tree, codec: CodecRef, memory: dict[Key, Array] | None = None) -> bytes:
    """Encode a tree with its names and shapes.

    Args:
        tree: What to send.
        codec: How.
        memory: Error feedback; see `Codec.encode`.

    Raises:
        ConfigError: Unknown codec or parameter.
        MessageError: A value is not finite, or a name or shape is outside the limits of the format.
    """
    return _tree_blob(tree, codec, memory).SerializeToString(deterministic=True)


def decode_tree(blob: bytes | memoryview, max_bytes: int, expect: Layout | None = None) -> Tree:
    """Decode what `encode_tree` wrote.

    Args:
        blob: The message.
        max_bytes: Most bytes of the message, and of the tree as float32.
        expect: The layout it must have; None accepts any.

    Raises:
        MessageError: Too large, damaged, foreign, not finite or of another layout.
    """
    return _read_tree(_parse(tree_pb2.TreeBlob, blob, max_bytes), max_bytes, expect)


def encode_delta(delta: Delta, codec: CodecRef, memory: dict[Key, Array] | None = None) -> bytes:
    """Encode a delta.

    Args:
        delta: What to send.
        codec: How.
        memory: Error feedback; see `Codec.encode`.

    Raises:
        ConfigError: Unknown codec or parameter.
        MessageError: A value is not finite, or a field is outside the limits of the format.
    """
    _require_sane(delta)
    table = delta_pb2.TokenTable(
        experts=[
            delta_pb2.ExpertTokens(site=site, expert=expert, tokens=delta.tokens[site, expert])
            for site, expert in sorted(delta.tokens)
        ]
    )
    return delta_pb2.Delta(
        format=FORMAT,
        run=delta.run,
        round=delta.round,
        client=delta.client,
        base=delta.base,
        layout=delta.tree.layout.digest,
        examples=delta.examples,
        tokens=_write_table(table),
        tree=_tree_blob(delta.tree, codec, memory),
    ).SerializeToString(deterministic=True)


def decode_delta(blob: bytes | memoryview, max_bytes: int, expect: Layout | None = None) -> Delta:
    """Decode what `encode_delta` wrote.

    Args:
        blob: The message.
        max_bytes: Most bytes of the message, and of its tree as float32.
        expect: The layout its tree must have; None accepts any.

    Raises:
        MessageError: Too large, damaged, foreign, not finite or of another layout.
    """
    message = _parse(delta_pb2.Delta, blob, max_bytes)
    tree = _read_tree(message.tree, max_bytes, expect)
    if message.layout != tree.layout.digest:
        raise MessageError("the layout's digest is not that of its tensors", mend=_FOREIGN)
    experts = [(row.site, row.expert, row.tokens) for row in _read_table(delta_pb2.TokenTable, message.tokens).experts]
    _require_ascending([f"{site}/{expert}" for site, expert, _ in experts], [(s, e) for s, e, _ in experts])
    delta = Delta(
        run=message.run,
        round=message.round,
        client=message.client,
        base=message.base,
        tree=tree,
        examples=message.examples,
        tokens={(site, expert): tokens for site, expert, tokens in experts},
        codec=message.tree.codec,
    )
    _require_sane(delta)
    return delta


def encode_masked(masked: Masked) -> bytes:
    """Encode masked numbers. They look random, so nothing makes them shorter.

    Raises:
        MessageError: A field is outside the limits of the format.
    """
    _require_sender(masked)
    return masked_pb2.Masked(
        format=FORMAT,
        run=masked.run,
        round=masked.round,
        attempt=masked.attempt,
        client=masked.client,
        base=masked.base,
        layout=masked.layout,
        numbers=masked.numbers.astype("<u8", copy=False).tobytes(),
    ).SerializeToString(deterministic=True)


def decode_masked(blob: bytes | memoryview, max_bytes: int, size: int) -> Masked:
    """Decode what `encode_masked` wrote.

    Args:
        blob: The message.
        max_bytes: Most bytes of it.
        size: How many numbers it must hold.

    Raises:
        MessageError: Too large, damaged, foreign, or of another length.
    """
    message = _parse(masked_pb2.Masked, blob, max_bytes)
    if len(message.numbers) != 8 * size:
        raise MessageError(f"{len(message.numbers)} bytes of masked numbers, {8 * size} were asked for", mend=_FOREIGN)
    masked = Masked(
        run=message.run,
        round=message.round,
        attempt=message.attempt,
        client=message.client,
        base=message.base,
        layout=message.layout,
        numbers=np.frombuffer(message.numbers, "<u8"),
    )
    _require_sender(masked)
    return masked


def _tree_blob(tree: Tree, codec: CodecRef, memory: dict[Key, Array] | None) -> tree_pb2.TreeBlob:
    params = registry.parse_params("codec", codec.name, codec.params)
    coder: Codec = registry.build("codec", codec.name, codec.params)
    for key, shape in tree.layout.items():
        Key.parse(key.name)
        _require_shape(key.name, shape)
    _require_size(tree.layout.size, _MAX_NUMBERS * 4)
    table = tree_pb2.TensorTable(
        tensors=[tree_pb2.Tensor(name=key.name, shape=shape) for key, shape in tree.layout.items()]
    )
    blob = tree_pb2.TreeBlob(
        format=FORMAT,
        codec=codec.name,
        params=json.dumps(dataclasses.asdict(params), sort_keys=True, separators=(",", ":")),
        tensors=_write_table(table),
        payload=coder.encode(tree, memory),
    )
    blob.sha256 = _checksum(blob)
    return blob


def _read_tree(blob: tree_pb2.TreeBlob, max_bytes: int, expect: Layout | None) -> Tree:
    if blob.format != FORMAT:
        raise MessageError(f"tree has format {blob.format}, this version reads {FORMAT}", mend=_FOREIGN)
    if blob.sha256 != _checksum(blob):
        raise MessageError("the checksum does not fit", mend="The bytes were damaged on the way; send again.")
    layout = _layout(_read_table(tree_pb2.TensorTable, blob.tensors), max_bytes)
    if expect is not None and layout != expect:
        raise _mismatch(layout, expect)
    try:
        if len(blob.params) > _MAX_PARAMS:
            raise MessageError(f"codec parameters of {len(blob.params)} characters", mend=_FOREIGN)
        params = json.loads(blob.params)
        if not isinstance(params, dict):
            raise MessageError("codec parameters are no JSON object", mend=_FOREIGN)
        coder: Codec = registry.build("codec", blob.codec, params)
    except (ConfigError, ValueError, RecursionError) as error:
        raise MessageError(f"unusable codec {blob.codec[:40]!r}: {error}", mend=_FOREIGN) from None
    return coder.decode(blob.payload, layout)


def _checksum(blob: tree_pb2.TreeBlob) -> bytes:
    """SHA-256 over codec, params, tensors and payload, each preceded by its length."""
    total = hashlib.sha256()
    for part in (blob.codec.encode(), blob.params.encode(), blob.tensors, blob.payload):
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()


def _layout(table: tree_pb2.TensorTable, max_bytes: int) -> Layout:
    if len(table.tensors) > _MAX_TENSORS:
        raise MessageError(f"{len(table.tensors)} tensors, at most {_MAX_TENSORS} fit a message")
    shapes: dict[Key, Shape] = {}
    total = 0
    for tensor in table.tensors:
        shape = tuple(tensor.shape)
        _require_shape(tensor.name, shape)
        total += math.prod(shape)
        shapes[Key.parse(tensor.name)] = shape
    _require_size(total, max_bytes)
    _require_ascending([tensor.name for tensor in table.tensors], [Key.parse(t.name) for t in table.tensors])
    return Layout(shapes)


def _require_shape(name: str, shape: Shape) -> None:
    if len(shape) > _MAX_DIMS or not all(1 <= n <= _MAX_DIM for n in shape):
        text = "x".join(map(str, shape[: _MAX_DIMS + 1]))
        raise MessageError(
            f"shape {text} is outside the format",
            where=name[:80],
            mend=f"{_MAX_DIMS} dimensions, each 1 to {_MAX_DIM}.",
        )


def _require_size(numbers: int, max_bytes: int) -> None:
    if 4 * numbers > max_bytes:
        raise MessageError(
            f"a tree of {numbers} numbers takes {4 * numbers} bytes, the limit is {max_bytes}",
            mend="Raise wire.max_bytes if the sender is right.",
        )


def _require_ascending(names: list[str], keys: list[Any]) -> None:
    for name, before, after in zip(names[1:], keys, keys[1:], strict=False):
        if before >= after:
            what = "appears twice" if before == after else "is out of order"
            raise MessageError(f"the name {what}", where=name[:80], mend=_FOREIGN)


def _require_sender(message: Delta | Masked) -> None:
    for name, text in (("run", message.run), ("client", message.client), ("base", message.base)):
        if not (0 < len(text) <= _MAX_TEXT and text.isprintable()):
            raise MessageError(f"{name} {text[:40]!r} is not 1 to {_MAX_TEXT} printable characters")
    if not 0 <= message.round < 2**32:
        raise MessageError(f"round {message.round} is out of range")


def _require_sane(delta: Delta) -> None:
    _require_sender(delta)
    if not 1 <= delta.examples <= _MAX_COUNT:
        raise MessageError(f"{delta.examples} examples", mend="A client sends a delta of at least one.")
    for (site, expert), tokens in delta.tokens.items():
        Key.parse(f"{site}/{expert}/tokens")
        if not 0 <= tokens <= _MAX_COUNT:  # NaN fails too
            raise MessageError(f"{tokens} tokens", where=f"{site}/{expert}", mend="Tokens are a count.")


def _mismatch(found: Layout, expect: Layout) -> MessageError:
    """Name the first tensor in which two layouts differ."""

    def differences() -> Iterator[tuple[Key, str]]:
        for key in sorted({*found, *expect}):
            if key not in expect:
                yield key, "nobody asked for this tensor"
            elif key not in found:
                yield key, "the tensor is missing"
            elif found[key] != expect[key]:
                yield key, f"shape {list(found[key])} where {list(expect[key])} was asked for"

    key, what = next(differences())
    return MessageError(what, where=key.name, mend="Sender and receiver must use the same plan.")


def _parse(kind: type[M], blob: bytes | memoryview, max_bytes: int) -> M:
    """Parse a message that must be exactly what we would write: no unknown field, nothing twice, nothing trailing."""
    if len(blob) > max_bytes:
        raise MessageError(
            f"message of {len(blob)} bytes, the limit is {max_bytes}",
            mend="Raise wire.max_bytes if the sender is right.",
        )
    message = kind()
    try:
        message.ParseFromString(bytes(blob))
    except DecodeError:
        raise MessageError("not a message, or cut short", mend=_FOREIGN) from None
    message.DiscardUnknownFields()
    if message.SerializeToString(deterministic=True) != blob:
        raise MessageError("message with unknown, repeated or trailing fields", mend=_FOREIGN)
    declared = getattr(message, "format", FORMAT)
    if declared != FORMAT:
        raise MessageError(f"message has format {declared}, this version reads {FORMAT}", mend=_FOREIGN)
    return message


def _write_table(table: Message) -> bytes:
    data = table.SerializeToString(deterministic=True)
    if len(data) > _MAX_TABLE:
        raise MessageError(f"names of {len(data)} bytes, at most {_MAX_TABLE} fit a message", mend="Use shorter names.")
    return compress(data)


def _read_table(kind: type[M], data: bytes) -> M:
    return _parse(kind, expand(data, _MAX_TABLE), _MAX_TABLE)
