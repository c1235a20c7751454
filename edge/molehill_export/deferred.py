"""Weights that become arrays when they are read, so that no more than one of them is in memory in float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molehill.tasks.mapped import release


class Deferred:
    """A tensor of any floating point type, as a float32 array once it is read.

    Slices and transposes of it are deferred as well; ``numpy.asarray`` reads.

    Args:
        tensor: The tensor; may lie in a mapped file.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return tuple(self._tensor.shape)

    @property
    def ndim(self) -> int:
        """As of an array."""
        return self._tensor.ndim

    @property
    def size(self) -> int:
        """As of an array."""
        return self._tensor.numel()

    @property
    def nbytes(self) -> int:
        """As of the array that it becomes."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> Deferred:  # noqa: N802  (as of an array)
        """The transpose of a matrix."""
        return Deferred(self._tensor.T)

    def __getitem__(self, index: Any) -> Deferred:
        """A part, by whole numbers and slices."""
        return Deferred(self._tensor[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The numbers; always a copy."""
        del copy
        values: NDArray[Any] = self._tensor.to(torch.float32, copy=True).numpy()
        release()
        return values if dtype is None else values.astype(dtype, copy=False)


Weight: TypeAlias = NDArray[Any] | Deferred
