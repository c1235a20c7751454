"""The messages of the data plane: a self-describing tree, and the delta a client sends, in the open or masked.

Decoding trusts nothing: sizes are checked before memory is taken, and whatever is wrong ends in a `MessageError`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from molehill import registry
from molehill.errors import ConfigError, MessageError
from molehill.wire.codecs import Codec
from molehill.wire.keys import Key
from molehill.wire.parsing import FOREIGN, FORMAT, MAX_ROWS, parse, read_table, write_table
from molehill.wire.shapes import read_layout, require_ascending, write_layout
from molehill.wire.tree import Array, Layout, Tree
from molehill_protos.v1 import delta_pb2, masked_pb2, tree_pb2

_MAX_PARAMS = 1024  # characters
_MAX_TEXT = 256  # characters of a run, client or digest
_MAX_COUNT = 2**53
_HEAD = 8192  # bytes of a message beside names and numbers
_ROW = 32  # bytes of a row of a table beside its name


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


def largest_delta(layout: Layout, model: Layout) -> int:
    """Most bytes of a delta, whatever its codec: none takes more than float32 does.

    Args:
        layout: Of what is sent.
        model: Of the shared model; tokens are counted for its experts.
    """
    pairs = {f"{key.site}/{key.expert}" for key in model}
    names = sum(len(key.name) + _ROW for key in layout) + sum(len(pair) + _ROW for pair in pairs)
    return 4 * layout.size + names + _HEAD


def largest_masked(size: int) -> int:
    """Most bytes of a masked vector of ``size`` numbers."""
    return 8 * size + _HEAD


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


def decode_tree(
    blob: bytes | memoryview, max_bytes: int, expect: Layout | None = None, codec: CodecRef | None = None
) -> Tree:
    """Decode what `encode_tree` wrote.

    Args:
        blob: The message.
        max_bytes: Most bytes of the message, and of the tree as float32.
        expect: The layout it must have; None accepts any.
        codec: The codec it must come in, with these parameters; None accepts any.

    Raises:
        MessageError: Too large, damaged, foreign, not finite, of another layout or in another codec.
    """
    message = parse(tree_pb2.TreeBlob, blob, max_bytes)
    _require_codec(message, codec, "the tree")
    return _read_tree(message, max_bytes, expect)


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
        tokens=write_table(table),
        tree=_tree_blob(delta.tree, codec, memory),
    ).SerializeToString(deterministic=True)


def decode_delta(
    blob: bytes | memoryview,
    max_bytes: int,
    expect: Layout | None = None,
    codec: CodecRef | None = None,
    pairs: int = MAX_ROWS,
) -> Delta:
    """Decode what `encode_delta` wrote.

    Args:
        blob: The message.
        max_bytes: Most bytes of the message, and of its tree as float32.
        expect: The layout its tree must have; None accepts any.
        codec: The codec it must come in, with these parameters; None accepts any.
        pairs: Most experts, over all sites, whose tokens it may count.

    Raises:
        MessageError: Too large, damaged, foreign, not finite, of another layout or in another codec.
    """
    message = parse(delta_pb2.Delta, blob, max_bytes)
    _require_codec(message.tree, codec, "its delta")  # before anything is expanded
    tree = _read_tree(message.tree, max_bytes, expect)
    if message.layout != tree.layout.digest:
        raise MessageError("the layout's digest is not that of its tensors", mend=FOREIGN)
    table = read_table(delta_pb2.TokenTable, message.tokens, pairs)
    experts = [(row.site, row.expert, row.tokens) for row in table.experts]
    require_ascending([f"{site}/{expert}" for site, expert, _ in experts], [(s, e) for s, e, _ in experts])
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
    message = parse(masked_pb2.Masked, blob, max_bytes)
    if len(message.numbers) != 8 * size:
        raise MessageError(f"{len(message.numbers)} bytes of masked numbers, {8 * size} were asked for", mend=FOREIGN)
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
    coder: Codec = registry.build("codec", codec.name, codec.params)
    blob = tree_pb2.TreeBlob(
        format=FORMAT,
        codec=codec.name,
        params=_params(codec),
        tensors=write_layout(tree.layout),
        payload=coder.encode(tree, memory),
    )
    blob.sha256 = _checksum(blob)
    return blob


def _require_codec(blob: tree_pb2.TreeBlob, codec: CodecRef | None, what: str) -> None:
    if codec is None:
        return
    if blob.codec != codec.name:
        raise MessageError(f"{what} comes in codec {blob.codec[:40]!r}, not {codec.name!r}")
    if blob.params != (asked := _params(codec)):
        raise MessageError(f"{what} comes in codec {codec.name!r} with {blob.params[:200]}, not {asked}")


def _params(codec: CodecRef) -> str:
    """All parameters of a codec, as they travel."""
    params = registry.parse_params("codec", codec.name, codec.params)
    return json.dumps(dataclasses.asdict(params), sort_keys=True, separators=(",", ":"))


def _read_tree(blob: tree_pb2.TreeBlob, max_bytes: int, expect: Layout | None) -> Tree:
    if blob.format != FORMAT:
        raise MessageError(f"tree has format {blob.format}, this version reads {FORMAT}", mend=FOREIGN)
    if blob.sha256 != _checksum(blob):
        raise MessageError("the checksum does not fit", mend="The bytes were damaged on the way; send again.")
    layout = read_layout(blob.tensors, max_bytes, expect)
    try:
        if len(blob.codec) > _MAX_TEXT or len(blob.params) > _MAX_PARAMS:
            text = f"codec of {len(blob.codec)} and parameters of {len(blob.params)} characters"
            raise MessageError(text, mend=FOREIGN)
        params = json.loads(blob.params)
        if not isinstance(params, dict):
            raise MessageError("codec parameters are no JSON object", mend=FOREIGN)
        coder: Codec = registry.build("codec", blob.codec, params)
    except (ConfigError, ValueError, RecursionError) as error:
        raise MessageError(f"unusable codec {blob.codec[:40]!r}: {error}", mend=FOREIGN) from None
    return coder.decode(blob.payload, layout)


def _checksum(blob: tree_pb2.TreeBlob) -> bytes:
    """SHA-256 over codec, params, tensors and payload, each preceded by its length."""
    total = hashlib.sha256()
    for part in (blob.codec.encode(), blob.params.encode(), blob.tensors, blob.payload):
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()


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
