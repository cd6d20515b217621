"""Rows that are not loaded: which, why, and when they are too many for the rest to be believed."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import psycopg

from pipelines.load.columns import Checked
from pipelines.load.contract import Source
from polytower.errors import UserError

# Rejected rows of one file that are kept one by one; beyond that they are only counted.
KEPT_PER_FILE = 10_000


@dataclass(frozen=True)
class Rejection:
    """One row (or one image) that was not loaded. row: 1-based data row; value: as found, at most 200 characters."""

    file: str
    row: int
    column: str | None
    reason: str
    value: str | None

    def __str__(self) -> str:
        value = "" if self.value is None else f": {self.value!r}"
        return f"{self.file}, row {self.row}, {self.column or 'row'} {self.reason}{value}"

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class Rejections:
    """Collects the rejections of one load. max_rejected: the share of a file's rows above which the load is refused."""

    def __init__(self, max_rejected: float) -> None:
        self.max_rejected = max_rejected
        self.kept: list[Rejection] = []
        self._rows: Counter[str] = Counter()
        self._kept_per_file: Counter[str] = Counter()
        self._sources: dict[str, Source] = {}
        self._blanks_around: dict[tuple[str, str], tuple[int, int]] = {}

    def read_from(self, source: Source) -> None:
        """Names the source of a file's rows, so that a row of a folder of parts is told by its part."""
        self._sources[source.name] = source

    @property
    def warnings(self) -> list[str]:
        """What is no fault of a row, and yet should be looked at."""
        return [
            f"{file}: {count:,} values of {column} have blanks around them (the first in row {row:,}); these are "
            "different ids from those without"
            for (file, column), (count, row) in self._blanks_around.items()
        ]

    def add(self, rejection: Rejection, *, whole_row: bool = True) -> None:
        """Notes one; an image dropped from an item that stays is not a whole row."""
        self._rows[rejection.file] += whole_row
        if self._kept_per_file[rejection.file] < KEPT_PER_FILE:
            self._kept_per_file[rejection.file] += 1
            source = self._sources.get(rejection.file)
            file, row = source.place(rejection.row) if source else (rejection.file, rejection.row)
            self.kept.append(replace(rejection, file=file, row=row))

    def add_batch(self, checked: Checked) -> None:
        """Notes the faulty rows of a batch."""
        first_row = checked.batch.first_row
        for offset, (column, reason, value) in sorted(checked.faulty.items()):
            self.add(Rejection(checked.batch.file, first_row + offset, column, reason, value))
        for column, (count, row) in checked.blanks_around.items():
            before, first = self._blanks_around.get((checked.batch.file, column), (0, row))
            self._blanks_around[checked.batch.file, column] = (before + count, first)

    def add_counted(self, total: int, head: list[Rejection]) -> None:
        """Notes `total` rejections of one file, of which only `head` were fetched from the database."""
        for rejection in head:
            self.add(rejection)
        if head:
            self._rows[head[0].file] += total - len(head)

    def rows(self, file: str) -> int:
        """Rows of the file rejected so far."""
        return self._rows[file]

    def refuse_if_many(self, file: str, rows: int) -> None:
        """Raises UserError when more than the allowed share of the file's rows was rejected."""
        rejected = self.rows(file)
        if rejected <= self.max_rejected * rows:
            return
        shown = "\n".join(f"  {rejection}" for rejection in self.kept if rejection.file.split("/")[0] == file)
        first = "\n".join(shown.splitlines()[:5])
        raise UserError(
            f"{file}: {rejected:,} of {rows:,} rows are faulty, more than the allowed {self.max_rejected:.0%}; "
            f"nothing was loaded. The first ones:\n{first}"
        )

    def store(self, connection: psycopg.Connection[Any], load_id: int) -> None:
        """Writes the kept ones to rejected_rows."""
        statement = "copy rejected_rows (load_id, file, row_number, column_name, reason, value) from stdin"
        with connection.cursor() as cursor, cursor.copy(statement) as copy:
            for row in self.kept:
                copy.write_row((load_id, row.file, row.row, row.column, row.reason, row.value))
