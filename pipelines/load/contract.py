"""Reads the input contract's files as a stream of batches: Parquet, CSV or JSON lines, never a whole file at once.

What makes a file unreadable as a whole (absent, empty, truncated, a wrong column) raises UserError; what is wrong
with single rows is left to the caller (columns.py).
"""

import unicodedata
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipelines.load.csv_records import MAX_ROW_BYTES, RecordCounter, check_header, count_strictly, explain
from pipelines.load.json_lines import Fault, json_rows
from pipelines.load.part_files import TABLES, opened, parts_of, refuse_overlooked
from polytower.errors import UserError

# Rows per batch: large enough for column-wise work, small enough that long descriptions stay a few MB.
BATCH_ROWS = 16_384


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one table. first_row: 1-based number of the first data row; columns hold `rows` values each.

    A column is an arrow array (Parquet, CSV) or a list of Python values (JSON lines). faulty: row offset → what the
    reader found wrong with that row. given: the columns that each row names, where rows differ (JSON lines).
    """

    file: str
    first_row: int
    rows: int
    columns: Mapping[str, pa.Array | list[Any]]
    faulty: Mapping[int, Fault] = field(default_factory=dict)
    given: list[Set[str]] | None = None

    def array(self, name: str) -> pa.Array:
        """The column as arrow; nulls where the file has no such column. JSON numbers among strings become text."""
        column = self.columns.get(name)
        if column is None:
            return pa.nulls(self.rows)
        if isinstance(column, list):
            return self._array_of_json(name, column)
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if pa.types.is_string_view(column.type):
            return column.cast(pa.string())
        return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column

    def values(self, name: str) -> list[Any]:
        """The column as Python values; None where the file has no such column."""
        column = self.columns.get(name)
        if column is None:
            return [None] * self.rows
        if isinstance(column, list):
            return column
        try:
            return list(column.to_pylist())
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise UserError(f"{self.file}: column {name} holds a value that cannot be read: {error}") from error

    def gives(self, offset: int, name: str) -> bool:
        """Whether this row says anything of the column, be it that there is no value."""
        return name in (self.columns if self.given is None else self.given[offset])

    def _array_of_json(self, name: str, values: list[Any]) -> pa.Array:
        for offset, value in enumerate(values):
            if isinstance(value, (dict, list)):
                message = f"{self.file}, row {self.first_row + offset}: column {name} holds a nested value"
                raise UserError(message + "; one text or number is expected")
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return pa.array([_text_of(value) for value in values], pa.string())


def _text_of(value: Any) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    return None if value is None or value != value else str(value)


@dataclass(frozen=True)
class Source:
    """One table of the contract folder: a file, or a folder of part files that are read by name."""

    path: Path
    form: str
    parts: list[Path]

    @property
    def name(self) -> str:
        """File name, as messages and rejected rows call it."""
        return self.path.name

    @cached_property
    def total_rows(self) -> int | None:
        """Number of rows where the format says it (Parquet)."""
        if self.form != "parquet":
            return None
        return sum(self._rows_of_parquet(part) for part in self.parts)

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each part that was read."""
        return []

    def place(self, row: int) -> tuple[str, int]:
        """(file, row in it) of a row of the table."""
        if len(self.parts) == 1:
            return self._label(self.parts[0]), row
        part = sum(start <= row for start in self.starts) - 1
        return self._label(self.parts[part]), row - self.starts[part] + 1

    def batches(self) -> Iterator[Batch]:
        """All rows in file order. Raises UserError when the file is empty, truncated or not of its format."""
        read = {"parquet": self._parquet, "csv": self._csv, "jsonl": self._jsonl}[self.form]
        first_row = 1
        self.starts.clear()
        for part in self.parts:
            self.starts.append(first_row)
            with self._readable(part):
                for batch in read(part, first_row):
                    if batch.rows:
                        yield batch
                        first_row += batch.rows
        if first_row == 1:
            raise UserError(f"{self.name} has no rows; leave the file out if there is nothing to load")

    def _label(self, part: Path) -> str:
        return self.name if part == self.path else f"{self.name}/{part.name}"

    @contextmanager
    def _readable(self, part: Path) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            message = f"{self._label(part)} cannot be read as {self.form.upper()} (truncated or corrupt?)"
            raise UserError(f"{message}: {(str(error).splitlines() or [''])[0]}; write it again") from error

    def _check_count(self, part: Path, read: int, counted: int) -> None:
        if read != counted:
            label = self._label(part)
            raise UserError(f"{label}: {read:,} rows were read, but it has {counted:,}; write it again")

    def _rows_of_parquet(self, part: Path) -> int:
        with self._readable(part), pq.ParquetFile(part) as file:
            return int(file.metadata.num_rows)

    def _parquet(self, part: Path, first_row: int) -> Iterator[Batch]:
        # A small read buffer instead of pre-buffering: a row group may be as large as the file.
        with pq.ParquetFile(part, buffer_size=1 << 20, pre_buffer=False) as file:
            self._refuse_repeated(part, file.schema_arrow.names)
            read = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                batch.validate(full=True)  # text that is not UTF-8 passes through Parquet unseen
                columns = dict(zip(batch.schema.names, batch.columns, strict=True))
                yield Batch(self.name, first_row + read, batch.num_rows, columns)
                read += batch.num_rows
            self._check_count(part, read, file.metadata.num_rows)

    def _csv(self, part: Path, first_row: int) -> Iterator[Batch]:
        label = self._label(part)
        counter = RecordCounter()
        read = 0
        try:
            for columns, rows in self._csv_columns(part, counter):
                for start in range(0, rows, BATCH_ROWS):
                    some = {name: column.slice(start, BATCH_ROWS) for name, column in columns.items()}
                    size = min(BATCH_ROWS, rows - start)
                    yield Batch(self.name, first_row + read, size, some)
                    read += size
        except (pa.ArrowException, UnicodeDecodeError) as error:
            if part.stat().st_size == 0 and len(self.parts) > 1:
                return  # Spark writes empty parts
            raise explain(label, lambda: opened(part, label), str(error).splitlines()[0]) from error
        counter.finish()
        if not counter.regular or counter.records != read + 1:
            self._check_count(part, read, count_strictly(label, lambda: opened(part, label)) - 1)

    def _csv_columns(self, part: Path, counter: RecordCounter) -> Iterator[tuple[dict[str, pa.Array], int]]:
        label = self._label(part)
        parse = pacsv.ParseOptions(newlines_in_values=True)
        block = pacsv.ReadOptions(block_size=MAX_ROW_BYTES)
        with opened(part, label) as file:
            check_header(label, file.readline(MAX_ROW_BYTES).decode("utf-8-sig", "replace"))
        with opened(part, label) as file, pacsv.open_csv(file, parse_options=parse, read_options=block) as csv:
            names = csv.schema.names
        self._refuse_repeated(part, names)
        # Text first: a type guessed from the first rows would refuse, or garble, the later ones ("02139").
        convert = pacsv.ConvertOptions(
            column_types={name: pa.string() for name in names},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        )
        with (
            opened(part, label, counter.feed) as file,
            pacsv.open_csv(file, parse_options=parse, read_options=block, convert_options=convert) as csv,
        ):
            for batch in csv:
                yield dict(zip(names, batch.columns, strict=True)), batch.num_rows

    def _jsonl(self, part: Path, first_row: int) -> Iterator[Batch]:
        with opened(part, self._label(part)) as file:
            rows = json_rows(file, self._label(part))
            while batch := list(islice(rows, BATCH_ROWS)):
                names = dict.fromkeys(name for row, _ in batch for name in row)
                columns = {name: [row.get(name) for row, _ in batch] for name in names}
                faulty = {offset: fault for offset, (_, fault) in enumerate(batch) if fault}
                given: list[Set[str]] = [row.keys() for row, _ in batch]
                yield Batch(self.name, first_row, len(batch), columns, faulty, given)
                first_row += len(batch)

    def _refuse_repeated(self, part: Path, names: list[str]) -> None:
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise UserError(f"{self._label(part)} has two columns named {', '.join(repeated)}")


def find_sources(folder: Path) -> tuple[dict[str, Source], list[str]]:
    """(table → source, names of what looks like a table and is no data), items first: the others refer to them.

    UserError where there is no such folder, it cannot be read, or it holds data that would be overlooked.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist (or is not a folder)")
    try:
        overlooked = refuse_overlooked(folder)
        found = {table: find_source(folder, table) for table in TABLES}
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror} ({error.filename})") from error
    return {table: source for table, source in found.items() if source is not None}, overlooked


def find_source(folder: Path, table: str) -> Source | None:
    """The source of a table ("interactions", "items", "users") in the folder, or None. Two at once: UserError."""
    found = parts_of(folder, table)
    return None if found is None else Source(*found)


def check_columns(batch: Batch, required: tuple[str, ...], known: tuple[str, ...] | None = None) -> None:
    """Raises UserError when a required column is missing, or (with `known`) when one is not in the contract."""
    missing = [name for name in required if name not in batch.columns]
    if missing:
        present = ", ".join(batch.columns)
        raise UserError(f"{batch.file} lacks the column {', '.join(missing)} (it has: {present})")
    unknown = [name for name in batch.columns if known is not None and name not in known]
    if unknown and known is not None:
        message = f"{batch.file} has an unknown column: {', '.join(unknown)}"
        raise UserError(f"{message}; drop or rename it (known: {', '.join(known)})")


def check_names(file: str, names: list[str], known: tuple[str, ...]) -> None:
    """UserError for a column without a name, and for two that differ in case, outer blanks or normal form."""
    if any(not name.strip() for name in names):
        raise UserError(f"{file} has a column without a name; name or drop it (pandas: to_csv(…, index=False))")
    met: dict[str, str] = {name: name for name in known}
    for name in names:
        other = met.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), name)
        if other != name:
            raise UserError(
                f"{file} has the columns {name!r} and {other!r}; merge them, or give one a more distinct name"
            )
