"""A column of the user's own embeddings: lists of numbers, of one width, each a direction."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.load.columns import Checked
from pipelines.load.contract import Batch
from polytower.errors import UserError

# As wide as a content embedding can be (halfvec).
MAX_WIDTH = 16_000
Floats = NDArray[np.float64]


class VectorColumn:
    """Reads the column of one load; the width of its first sound row is that of all."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.width: int | None = None

    def read(self, checked: Checked) -> list[tuple[Any, ...]]:
        """(vector, "column/width") per row, (None, None) for an empty cell; a row that holds no direction is marked."""
        found: list[tuple[Any, ...]] = []
        for offset, cell in enumerate(_cells(checked.batch, self.column)):
            fault = cell if isinstance(cell, str) else None if cell is None else self._fault(cell)
            if fault is not None:
                checked.reject(offset, self.column, fault)
            if cell is None or fault is not None:
                found.append((None, None))
            else:
                assert not isinstance(cell, str)
                found.append((cell.astype(np.float32).tolist(), f"{self.column}/{self.width}"))
        return found

    def _fault(self, cell: Floats) -> str | None:
        if not len(cell):
            return "holds no numbers"
        if len(cell) > MAX_WIDTH:
            return f"holds {len(cell):,} numbers; at most {MAX_WIDTH:,} can be kept"
        if not np.isfinite(cell).all():
            return f"holds {cell[~np.isfinite(cell)][0]} among its numbers"
        with np.errstate(over="ignore", under="ignore"):
            single = cell.astype(np.float32)
        if not np.isfinite(single).all():
            return "holds a number that single precision does not reach"
        if not single.any():
            return "is all zeros, which is no direction"
        self.width = self.width or len(cell)
        if len(cell) != self.width:
            return f"holds {len(cell)} numbers, where the rows before hold {self.width}"
        return None


def _cells(batch: Batch, name: str) -> Iterator[Floats | str | None]:
    """Per row: the numbers, None for an empty cell, or what is wrong with it."""
    column = batch.columns.get(name)
    if column is None:
        return iter([None] * batch.rows)
    if isinstance(column, list):
        return map(_listed, column)
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return map(_written, column.to_pylist())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_floating(inner) or pa.types.is_integer(inner):
            return (_numbers(cell.values) for cell in column)
    raise UserError(f"{batch.file}: column {name} holds {kind}; lists of numbers are expected of embeddings")


def _numbers(values: pa.Array | None) -> Floats | None:
    return None if values is None else values.to_numpy(zero_copy_only=False).astype(np.float64)


def _written(text: str | None) -> Floats | str | None:
    if text is None or not text.strip():
        return None
    try:
        return _listed(json.loads(text))
    except (ValueError, RecursionError):
        return "is not a JSON list of numbers"


def _listed(cell: Any) -> Floats | str | None:
    if cell is None:
        return None
    if not isinstance(cell, list):
        return "is not a list of numbers"
    # A number with more digits than a float keeps comes as the text that it was written as; null is no number.
    if any(isinstance(value, (bool, list, dict)) for value in cell):
        return "is not a list of numbers"
    try:
        return np.array([np.nan if value is None else float(value) for value in cell])
    except (ValueError, OverflowError):
        return "is not a list of numbers"
