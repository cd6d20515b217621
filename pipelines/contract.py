"""Reads the input contract's files as a stream of batches: Parquet, CSV or JSON lines, never a whole file at once.

What makes a file unreadable as a whole (absent, empty, truncated, a wrong column) raises UserError; what is wrong
with single rows is left to the caller (columns.py).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from polytower.errors import UserError

SUFFIXES = (".parquet", ".csv", ".jsonl")
# Rows per batch: large enough for column-wise work, small enough that long descriptions stay a few MB.
BATCH_ROWS = 16_384


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one file. first_row: 1-based number of the first data row; columns hold `rows` values each.

    A column is an arrow array (Parquet, CSV) or a list of Python values (JSON lines).
    """

    file: str
    first_row: int
    rows: int
    columns: Mapping[str, pa.Array | list[Any]]

    def array(self, name: str) -> pa.Array:
        """The column as arrow; nulls where the file has no such column. JSON numbers among strings become text."""
        column = self.columns.get(name)
        if column is None:
            return pa.nulls(self.rows)
        if isinstance(column, list):
            return self._array_of_json(name, column)
        return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column

    def values(self, name: str) -> list[Any]:
        """The column as Python values; None where the file has no such column."""
        column = self.columns.get(name)
        if column is None:
            return [None] * self.rows
        return column if isinstance(column, list) else column.to_pylist()

    def _array_of_json(self, name: str, values: list[Any]) -> pa.Array:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            for offset, value in enumerate(values):
                if isinstance(value, (dict, list)):
                    message = f"{self.file}, row {self.first_row + offset}: column {name} holds a nested value"
                    raise UserError(message + "; one text or number is expected") from None
            return pa.array(
                [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
            )


@dataclass(frozen=True)
class Source:
    """One file of the contract folder."""

    path: Path

    @property
    def name(self) -> str:
        """File name, as messages and rejected rows call it."""
        return self.path.name

    @cached_property
    def total_rows(self) -> int | None:
        """Number of rows where the format says it (Parquet)."""
        if self.path.suffix != ".parquet":
            return None
        with self._readable(), pq.ParquetFile(self.path) as file:
            return int(file.metadata.num_rows)

    def batches(self) -> Iterator[Batch]:
        """All rows in file order. Raises UserError when the file is empty, truncated or not of its format."""
        read = {".parquet": self._parquet, ".csv": self._csv, ".jsonl": self._jsonl}[self.path.suffix]
        first_row = 1
        with self._readable():
            for columns, rows in read():
                if rows:
                    yield Batch(self.name, first_row, rows, columns)
                    first_row += rows
        if first_row == 1:
            raise UserError(f"{self.name} holds no rows; leave the file out if there is nothing to load")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            kind = self.path.suffix[1:].upper()
            message = f"{self.name} cannot be read as {kind} (truncated or corrupt?): {str(error).splitlines()[0]}"
            raise UserError(message + f"; write {self.path} again") from error

    def _parquet(self) -> Iterator[tuple[dict[str, pa.Array], int]]:
        # A small read buffer instead of pre-buffering: a row group may be as large as the file.
        with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            self._refuse_repeated(file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                batch.validate(full=True)  # text that is not UTF-8 passes through Parquet unseen
                yield dict(zip(batch.schema.names, batch.columns, strict=True)), batch.num_rows

    def _csv(self) -> Iterator[tuple[dict[str, pa.Array], int]]:
        parse = pacsv.ParseOptions(newlines_in_values=True)
        with pacsv.open_csv(self.path, parse_options=parse) as file:
            names = file.schema.names
        self._refuse_repeated(names)
        # Text first: a type guessed from the first rows would refuse, or garble, the later ones ("02139").
        convert = pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        with pacsv.open_csv(self.path, parse_options=parse, convert_options=convert) as file:
            for batch in file:
                yield dict(zip(names, batch.columns, strict=True)), batch.num_rows

    def _jsonl(self) -> Iterator[tuple[dict[str, list[Any]], int]]:
        with self.path.open(encoding="utf-8-sig") as file:
            objects = self._objects(file)
            while batch := list(islice(objects, BATCH_ROWS)):
                names = dict.fromkeys(name for row in batch for name in row)
                yield {name: [row.get(name) for row in batch] for name in names}, len(batch)

    def _objects(self, file: TextIO) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "\\u" in line:
                    line_again = json.dumps(row, ensure_ascii=False)
                    line_again.encode()  # half a surrogate pair is no text
            except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
                raise UserError(f"{self.name}, line {number} is not JSON (truncated or corrupt?): {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{self.name}, line {number} is not a JSON object with column names as its keys")
            yield row

    def _refuse_repeated(self, names: list[str]) -> None:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"{self.name} has two columns named {', '.join(repeated)}")


def find_source(folder: Path, table: str) -> Source | None:
    """The file of a table ("interactions", "items", "users") in the folder, or None. Two formats at once: UserError."""
    found = [folder / (table + suffix) for suffix in SUFFIXES if (folder / (table + suffix)).is_file()]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder} holds {names}: which one is meant? Keep one")
    return Source(found[0]) if found else None


def check_columns(batch: Batch, required: tuple[str, ...], known: tuple[str, ...] | None = None) -> None:
    """Raises UserError when a required column is missing, or (with `known`) when one is not in the contract."""
    missing = [name for name in required if name not in batch.columns]
    if missing:
        present = ", ".join(batch.columns)
        raise UserError(f"{batch.file} lacks the column {', '.join(missing)} (it has: {present})")
    unknown = [name for name in batch.columns if known is not None and name not in known]
    if unknown and known is not None:
        message = f"{batch.file} has a column that the contract does not know: {', '.join(unknown)}"
        raise UserError(f"{message}; drop or rename it (known: {', '.join(known)})")
