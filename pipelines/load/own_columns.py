"""Columns of the items that hold a modality of the user's own: a load names them, and they are no attributes.

A new one is a reader here and a record with an `option` (feature_repo/modalities.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import psycopg
from psycopg import sql

from feature_repo.modalities import MODALITIES, Modality, modality
from pipelines.load.columns import Checked
from pipelines.load.contract import Batch, Source
from pipelines.load.vectors import VectorColumn
from polytower.errors import UserError


class OwnColumn(Protocol):
    """Reads one column. `read` answers, for each row of a batch, the values of what the record `reads`."""

    def read(self, checked: Checked) -> list[tuple[Any, ...]]: ...


# modality → reader(column)
READERS: dict[str, Callable[[str], OwnColumn]] = {"vector": VectorColumn}


def own_modalities() -> list[Modality]:
    """The modalities whose column a load names."""
    return [record for record in MODALITIES.values() if record.option]


class OwnColumns:
    """The columns that one load names.

    columns: modality → column of the file. Raises UserError for a column of the contract.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, known: Sequence[str] = ()) -> None:
        self.columns = dict(columns or {})
        for name, column in self.columns.items():
            if column in known:
                raise UserError(f"--{modality(name).option} {column}: that column has a meaning of its own in items")
        self._readers = {name: READERS[name](column) for name, column in self.columns.items()}

    def read(self, checked: Checked) -> list[tuple[Any, ...]]:
        """Per row of the batch: the stored columns of all own modalities, in the order of `own_modalities`."""
        rows: list[tuple[Any, ...]] = [()] * checked.batch.rows
        for record in own_modalities():
            if record.name in self.columns:
                found = self._readers[record.name].read(checked)
            else:
                found = [(None,) * len(record.reads)] * len(rows)
            rows = [(*row, *values) for row, values in zip(rows, found, strict=True)]
        return rows

    def lacks(self, batch: Batch, offset: int) -> list[str]:
        """The own modalities of which a row says nothing: what is stored of them stays."""
        return [
            record.name
            for record in own_modalities()
            if record.name not in self.columns or not batch.gives(offset, self.columns[record.name])
        ]

    def refuse_missing(self, source: Source, met: Sequence[str]) -> None:
        """Raises UserError for a named column that the file does not have."""
        for name, column in self.columns.items():
            if column not in met:
                option = f"--{modality(name).option} {column}"
                raise UserError(f"{option}: {source.name} has no such column (it has: {', '.join(met)})")


def refuse_mixed(connection: psycopg.Connection[Any], own: OwnColumns) -> None:
    """Raises UserError where the items' contents of one modality would be of two models, which no encoder can read."""
    for name in own.columns:
        record = modality(name)
        assert record.model_column is not None
        statement = sql.SQL(
            "select {model}, count(*), min(item_id) from items where {model} is not null group by 1 order by 2 desc, 1"
        ).format(model=sql.Identifier(record.model_column))
        found = connection.execute(statement).fetchall()
        if len(found) > 1:
            parts = ", ".join(f"{count:,} {model} (such as {item!r})" for model, count, item in found)
            raise UserError(
                f"--{record.option}: after this load the items would have content of several kinds, by column and"
                f" width: {parts}; give all of them in one load, or empty cells for those that are to have none"
            )
