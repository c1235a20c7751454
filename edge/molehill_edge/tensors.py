"""Files of named tensors in the safetensors format: see `molehill.tensors` for how they are written."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from molehill.errors import BundleError
from molehill.tensors import Array, pack, write

__all__ = ["pack", "read", "write"]


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
