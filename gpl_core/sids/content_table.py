"""Items' vectors by item_index, as steps look them up."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

_ROWS = 65_536
_LEAST = 1e-6  # a vector with a norm of no more is 0: its direction is rounding noise


@dataclass(frozen=True, eq=False)
class ContentTable:
    """Item vectors by item_index; missing ones stay missing."""

    vectors: np.ndarray  # float32 [n x d], unit rows; may be a memory map
    row_of: np.ndarray  # int64 [largest item_index + 1]: row of an item, -1 where it has no usable vector

    @classmethod
    def of(cls, item_index: np.ndarray, vectors: np.ndarray) -> Self:
        """The table of items int64 [n], ascending, and ``vectors``; 0 (norm <= 1e-6), NaN, infinite: not usable."""
        row_of = np.full(int(item_index[-1]) + 1, -1, dtype=np.int64)
        for start in range(0, len(vectors), _ROWS):
            part = vectors[start : start + _ROWS]
            length = np.einsum("nd,nd->n", part, part)
            usable = start + np.flatnonzero(np.isfinite(length) & (length > _LEAST**2))
            row_of[item_index[usable]] = usable
        return cls(vectors, row_of)

    @property
    def width(self) -> int:
        """d."""
        return self.vectors.shape[1]

    def rows(self, item_index: np.ndarray) -> np.ndarray:
        """Rows of ``item_index`` (int, any shape), int64; -1 where there is none, and for padding."""
        index = np.asarray(item_index)
        known = (index >= 0) & (index < len(self.row_of))
        return np.where(known, self.row_of[np.where(known, index, 0)], -1)

    def take(self, rows: np.ndarray) -> Tensor:
        """Vectors of ``rows`` (int [M], none negative), float32 [M x d] on the CPU."""
        return torch.from_numpy(np.ascontiguousarray(self.vectors[rows], dtype=np.float32))

    def content(self, item_index: np.ndarray) -> np.ndarray:
        """Vectors of ``item_index`` (int, any shape), float32 [... x d]; 0 where there is none."""
        row = self.rows(item_index)
        return np.where(row[..., None] >= 0, self.vectors[np.maximum(row, 0)], np.float32(0))
