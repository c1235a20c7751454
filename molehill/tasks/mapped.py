"""Stored tensors as they lie in their files: mapped, so that reading one brings in its pages and nothing else."""

from __future__ import annotations

import mmap
from math import prod
from weakref import WeakSet

import torch
from torch import Tensor

from molehill.tasks.weights import Stored

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MAPS: WeakSet[mmap.mmap] = WeakSet()


def mapped(stored: Stored) -> dict[str, Tensor]:
    """The stored tensors of floating point types by name, none of them read yet.

    Args:
        stored: A base; its files were checked by `Stored.tensors`.
    """
    maps: dict[str, mmap.mmap] = {}
    found = {}
    for name, place in stored.places().items():
        kind = _TYPES.get(place.dtype)
        if kind is None or not prod(place.shape):
            continue
        path = str(place.path)
        if path not in maps:
            with place.path.open("rb") as stream:
                # private, since torch wants memory that could be written; nothing writes there
                maps[path] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            _MAPS.add(maps[path])
        flat = torch.frombuffer(maps[path], dtype=kind, count=prod(place.shape), offset=place.start)
        found[name] = flat.view(place.shape)
    return found


def release() -> None:
    """Let go of the pages of all mapped files; they come back when they are read again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for one in _MAPS:
            one.madvise(mmap.MADV_DONTNEED)
