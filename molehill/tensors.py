"""Files of named tensors in the safetensors format, with the same bytes for the same contents.

The safetensors library writes the same format, but its metadata in an order that changes from run to run; and what
the operating system refuses it, a full disk for example, it does not raise as an `OSError`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molehill import files

Array = NDArray[Any]
_ALIGN = 64
_TYPES = {"float32": "F32", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def pack(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """A file's contents, and the offset of every tensor in it."""
    head, starts = _head(tensors, metadata)
    return b"".join([head, *(_bytes(tensors[name]) for name in starts)]), _offsets(head, starts)


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a file, whole or not at all; returns the offset of every tensor in it.

    Raises:
        OSError: The disk is full, or fails.
    """
    head, starts = _head(tensors, metadata)
    files.write(path, (part for each in ((head,), (_bytes(tensors[name]) for name in starts)) for part in each))
    return _offsets(head, starts)


def _head(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """All that stands before the tensors, and where each begins after it; wider types first, so all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    starts = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        value = tensors[name]
        starts[name] = at
        header[name] = {
            "dtype": _TYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]
        }  # fmt: skip
        at += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text, starts


def _offsets(head: bytes, starts: Mapping[str, int]) -> dict[str, int]:
    return {name: len(head) + start for name, start in starts.items()}


def _bytes(tensor: Array) -> bytes:
    return np.ascontiguousarray(tensor).tobytes()
