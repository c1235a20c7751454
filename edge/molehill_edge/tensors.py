"""Files of named tensors in the safetensors format: see `molehill.tensors` for how they are written."""

from __future__ import annotations

from pathlib import Path

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from molehill import files
from molehill.errors import BundleError
from molehill.tensors import Array, pack, write

__all__ = ["pack", "parse", "read", "write"]


def read(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of a file.

    Raises:
        BundleError: It cannot be read, or is damaged.
    """
    try:
        with safe_open(path, "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  (not a mapping)
    except OSError as error:
        raise BundleError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (SafetensorError, TypeError, ValueError) as error:
        raise BundleError(f"not a valid safetensors file: {error}", where=str(path)) from None


def parse(data: bytes, where: str) -> tuple[dict[str, Array], dict[str, str]]:
    """Tensors and metadata of the bytes of a file.

    Args:
        data: All of it.
        where: What it is, for errors.

    Raises:
        BundleError: It is damaged.
    """
    try:
        found = safetensors.numpy.load(data)  # checks the header
        header = files.parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return found, header.get("__metadata__") or {}
    except (SafetensorError, TypeError, ValueError, KeyError) as error:
        raise BundleError(f"not a valid safetensors file: {error}", where=where) from None
