"""Turns the columns of a batch into the platform's types, and says which rows cannot be: which column, and why.

A column whose type can never fit raises UserError; a single value that does not fit marks its row. All functions take
and give arrays of one length, the batch's rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.contract import Batch
from polytower.errors import UserError

# Three ids and a kind share one index row, which Postgres limits to about 2,700 bytes.
MAX_ID_BYTES = 500
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

Faults = list[tuple[str, pa.Array]]  # reason, boolean mask of the rows it applies to (no nulls)


@dataclass
class Checked:
    """Columns of one batch in the platform's types, and the rows that must not be loaded.

    faulty: row offset → (column, reason, value as found); the first fault of a row stands for it.
    """

    batch: Batch
    columns: dict[str, pa.Array] = field(default_factory=dict)
    faulty: dict[int, tuple[str, str, str]] = field(default_factory=dict)

    def read(self, name: str, check: Callable[[Batch, str], tuple[pa.Array, Faults]]) -> pa.Array:
        """Converts one column, notes its faults and answers its values."""
        self.columns[name], faults = check(self.batch, name)
        for reason, mask in faults:
            for offset in pc.indices_nonzero(mask).to_pylist():
                self.reject(offset, name, reason)
        return self.columns[name]

    def reject(self, offset: int, column: str, reason: str) -> None:
        """Marks a row; its value is looked up for the report."""
        source = self.batch.columns.get(column)
        value = None if source is None else source[offset]
        value = value.as_py() if isinstance(value, pa.Scalar) else value
        self.faulty.setdefault(offset, (column, reason, shown(value)))

    def table(self) -> pa.Table:
        """The rows without fault, with their 1-based file row as the first column `row`."""
        rows = pa.array(range(self.batch.first_row, self.batch.first_row + self.batch.rows), pa.int64())
        table = pa.table({"row": rows, **self.columns})
        if not self.faulty:
            return table
        return table.filter(pa.array([offset not in self.faulty for offset in range(self.batch.rows)]))


def shown(value: Any) -> str:
    """A value as a report shows it: at most 200 characters, storable by Postgres."""
    return ("" if value is None else str(value))[:200].replace("\0", "\N{REPLACEMENT CHARACTER}")


def ids(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Text of a required id: strings as they are, integers without a decimal point."""
    values, faults = text(batch, name)
    blank = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(values)), 0), True)
    return values, [("is empty", blank), *faults, *_too_long(values)]


def keys(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Text of an optional key (kind, event_id); missing is empty."""
    values, faults = text(batch, name)
    return pc.fill_null(values, ""), [*faults, *_too_long(values)]


def text(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Text or null. Integers become text; whole floats too: a missing value makes floats of a column of integers."""
    array = batch.array(name)
    kind = array.type
    if pa.types.is_floating(kind):
        array = _null_if(array, pc.is_nan(array))
        whole = pc.fill_null(pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53)), True)
        if not pc.all(whole).as_py():
            raise _wrong_type(batch, name, "fractional numbers", "text or integers")
        return array.cast(pa.int64()).cast(pa.string()), []
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise _wrong_type(batch, name, str(kind), "text or integers")
    array = array.cast(pa.string())
    return array, [("contains a zero byte", _mask(pc.match_substring(array, "\0")))]


def times(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Timestamps in µs, UTC. Naive ones are UTC; numbers are seconds since 1970; text is ISO 8601 or such a number."""
    array = batch.array(name)
    kind = array.type
    if _is_text(kind):
        array = _parsed_times(array)
    elif pa.types.is_date(kind):
        array = array.cast(pa.timestamp("s"))
    elif pa.types.is_floating(kind):
        micros = pc.multiply(_null_if(array, pc.invert(pc.is_finite(array))), 1e6)
        array = _null_if(micros, pc.greater(pc.abs(micros), 9e18)).cast(pa.int64(), safe=False)
        array = array.cast(pa.timestamp("us"))
    elif pa.types.is_integer(kind):
        array = array.cast(pa.int64()).cast(pa.timestamp("s"))
    elif pa.types.is_null(kind):
        array = array.cast(pa.timestamp("us"))
    elif not pa.types.is_timestamp(kind):
        raise _wrong_type(batch, name, str(kind), "timestamps, ISO 8601 text or seconds since 1970")
    return _plausible(array)


def _parsed_times(array: pa.Array) -> pa.Array:
    for target in (pa.timestamp("us", "UTC"), pa.timestamp("us")):
        try:
            return array.cast(target)
        except pa.ArrowInvalid:
            continue  # a zone is missing or unexpected, or a value is no time: look at each
    return pa.array([_parsed_time(value) for value in array.to_pylist()], pa.timestamp("us", "UTC"))


def _parsed_time(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        parsed = datetime.fromisoformat(value.strip()) if not _is_number(value) else _from_epoch(float(value))
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _from_epoch(seconds: float) -> datetime:
    # Milliseconds taken for seconds pass the year 9999; whoever wrote them should read "in the future".
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=min(seconds, 200e9))


def _is_number(value: str) -> bool:
    # Eight digits are a date without dashes (20240131), not seconds in the year 1970.
    stripped = value.strip()
    return len(stripped) != 8 and stripped.removeprefix("-").replace(".", "", 1).isdigit()


def _plausible(array: pa.Array) -> tuple[pa.Array, Faults]:
    unit = PER_SECOND[array.type.unit]
    ticks = array.cast(pa.int64())
    latest = int((datetime.now(UTC) + timedelta(days=1)).timestamp())
    implausible = _mask(pc.or_(pc.less(ticks, 0), pc.greater(ticks, latest * unit)))
    ticks = _null_if(ticks, implausible)
    micros = pc.multiply(ticks, 1_000_000 // unit) if unit <= 1_000_000 else pc.divide(ticks, unit // 1_000_000)
    faults = [
        ("is not a time", _mask(pc.is_null(array))),
        ("lies before 1970 or in the future (numbers are seconds since 1970)", implausible),
    ]
    return micros.cast(pa.timestamp("us", "UTC")), faults


def numbers(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Floats or null; NaN means missing, an infinite or unreadable value is a fault."""
    array = batch.array(name)
    unread: pa.Array | None = None
    if _is_text(array.type):
        found = [_parsed_number(value) for value in array.to_pylist()]
        unread = pa.array([value is False for value in found], pa.bool_())
        array = pa.array([None if value is False else value for value in found], pa.float64())
    elif pa.types.is_boolean(array.type) or not (_is_numeric(array.type) or pa.types.is_null(array.type)):
        raise _wrong_type(batch, name, str(array.type), "numbers")
    array = array.cast(pa.float64(), safe=False)
    faults: Faults = [("is not a finite number", _mask(pc.is_inf(array)))]
    if unread is not None:
        faults.append(("is not a number", unread))
    return _null_if(array, pc.is_nan(array)), faults


def _parsed_number(value: str | None) -> float | bool | None:
    if value is None or not value.strip():
        return None
    try:
        return float(value)
    except ValueError:
        return False


def flags(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Booleans; missing is true. Text "true"/"false" and 1/0 are read too."""
    array = batch.array(name)
    if pa.types.is_boolean(array.type) or pa.types.is_null(array.type):
        return pc.fill_null(array.cast(pa.bool_()), True), []
    if not (_is_text(array.type) or pa.types.is_integer(array.type)):
        raise _wrong_type(batch, name, str(array.type), "true or false")
    words = {"true": True, "t": True, "1": True, "yes": True, "": True}
    words |= {"false": False, "f": False, "0": False, "no": False}
    found = [words.get(str("" if value is None else value).strip().lower()) for value in array.to_pylist()]
    values = pa.array(found, pa.bool_())
    return pc.fill_null(values, True), [("is neither true nor false", _mask(pc.is_null(values)))]


def _too_long(values: pa.Array) -> Faults:
    return [(f"is longer than {MAX_ID_BYTES} bytes", _mask(pc.greater(pc.binary_length(values), MAX_ID_BYTES)))]


def _mask(array: pa.Array, *, default: bool = False) -> pa.Array:
    return pc.fill_null(array, default)


def _null_if(array: pa.Array, condition: pa.Array) -> pa.Array:
    return pc.if_else(_mask(condition), pa.scalar(None, array.type), array)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _wrong_type(batch: Batch, name: str, found: str, expected: str) -> UserError:
    return UserError(f"{batch.file}: column {name} holds {found}; {expected} are expected")
