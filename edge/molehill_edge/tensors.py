"""Files of named tensors in the safetensors format, with the same bytes for the same contents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from molehill import files
from molehill.errors import BundleError

Array = NDArray[Any]
_ALIGN = 64
_TYPES = {"float32": "F32", "int8": "I8", "uint8": "U8", "bool": "BOOL"}


def pack(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's contents, wider types first so that all are aligned, and the offset of every tensor in it.

    The safetensors library writes the same format, but its metadata in an order that changes from run to run.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    starts = {}
    for name in names:
        value = tensors[name]
        starts[name] = at
        header[name] = {
            "dtype": _TYPES[value.dtype.name], "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]
        }  # fmt: skip
        at += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    head = len(text).to_bytes(8, "little") + text
    data = b"".join(np.ascontiguousarray(tensors[name]).tobytes() for name in names)
    return head + data, {name: len(head) + start for name, start in starts.items()}


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a file, whole or not at all; returns the offset of every tensor in it."""
    data, offsets = pack(tensors, metadata)
    files.write(path, data)
    return offsets


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        BundleError: It cannot be read, or is damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise BundleError(f"not a valid safetensors file: {error}", where=str(path)) from None
