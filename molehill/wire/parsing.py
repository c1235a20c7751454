"""Reads protobuf messages that nobody vouches for: sizes and counts are judged before memory is taken."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from molehill.errors import MessageError
from molehill.wire.packing import compress, expand

FORMAT = 1
FOREIGN = "The sender may run another version, or the bytes are damaged."
MAX_ROWS = 2**16
_MAX_TABLE = 4 * 2**20  # bytes of a table of names, expanded
_ROW = 0x0A  # the tag of field 1 with a length, which is all that a table has

M = TypeVar("M", bound=Message)


def parse(kind: type[M], blob: bytes | memoryview, max_bytes: int) -> M:
    """Parse a message that must be exactly what we would write: no unknown field, nothing twice, nothing trailing.

    Args:
        kind: The message.
        blob: Its bytes.
        max_bytes: Most of them.

    Raises:
        MessageError: Too large, damaged, foreign or of another format.
    """
    if len(blob) > max_bytes:
        raise MessageError(
            f"message of {len(blob)} bytes, the limit is {max_bytes}",
            mend="Raise wire.max_bytes if the sender is right.",
        )
    message = kind()
    try:
        message.ParseFromString(bytes(blob))
    except DecodeError:
        raise MessageError("not a message, or cut short", mend=FOREIGN) from None
    message.DiscardUnknownFields()
    if message.SerializeToString(deterministic=True) != blob:
        raise MessageError("message with unknown, repeated or trailing fields", mend=FOREIGN)
    declared = getattr(message, "format", FORMAT)
    if declared != FORMAT:
        raise MessageError(f"message has format {declared}, this version reads {FORMAT}", mend=FOREIGN)
    return message


def write_table(table: Message) -> bytes:
    """A table of names, compressed.

    Raises:
        MessageError: It is too long to be read again.
    """
    data = table.SerializeToString(deterministic=True)
    if len(data) > _MAX_TABLE:
        raise MessageError(f"names of {len(data)} bytes, at most {_MAX_TABLE} fit a message", mend="Use shorter names.")
    return compress(data)


def read_table(kind: type[M], data: bytes, rows: int = MAX_ROWS) -> M:
    """Undo `write_table`. Rows are counted before any is made: a few hundred bytes can expand to millions.

    Args:
        kind: The table, a message whose only field repeats.
        data: What `write_table` wrote.
        rows: Most rows.

    Raises:
        MessageError: Damaged, or with more rows.
    """
    content = expand(data, _MAX_TABLE)
    _require_rows(content, rows)
    return parse(kind, content, _MAX_TABLE)


def _require_rows(table: bytes, most: int) -> None:
    at = found = 0
    while at < len(table) and table[at] == _ROW:  # what is anything else is for `parse` to refuse
        found += 1
        if found > most:
            raise MessageError(f"a table with more rows than asked for: at most {most} fit", mend=FOREIGN)
        size = shift = 0
        for byte in table[at + 1 : at + 6]:
            at += 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        at += 1 + size
