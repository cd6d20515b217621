"""Turns the columns of a batch into the platform's types, and says which rows cannot be: which column, and why.

A column whose type can never fit raises UserError; a single value that does not fit marks its row. All functions take
and give arrays of one length, the batch's rows.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.modalities import BLANK
from feature_repo.schema import MAX_AHEAD_SECONDS, MAX_ID_BYTES
from pipelines.load.contract import Batch
from pipelines.load.csv_records import MAX_ROW_BYTES
from pipelines.load.digits import LARGEST_INTEGER, Written
from polytower.errors import UserError

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}

# Milliseconds taken for seconds pass the year 9999; whoever wrote them should read "in the future".
FAR_AHEAD = 200e9

Faults = list[tuple[str, pa.Array]]  # reason, boolean mask of the rows it applies to (no nulls)


@dataclass
class Checked:
    """Columns of one batch in the platform's types, and the rows that must not be loaded.

    faulty: row offset → (column, reason, value as found); the first fault of a row stands for it.
    blanks_around: column of ids → (how many have blanks around them, row of the first).
    """

    batch: Batch
    columns: dict[str, pa.Array] = field(default_factory=dict)
    faulty: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    blanks_around: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.faulty |= {
            offset: (column, reason, shown(value)) for offset, (column, reason, value) in self.batch.faulty.items()
        }

    def read(self, name: str, check: Callable[[Batch, str], tuple[pa.Array, Faults]]) -> pa.Array:
        """Converts one column, notes its faults and answers its values."""
        self.columns[name], faults = check(self.batch, name)
        for reason, mask in faults:
            for offset in pc.indices_nonzero(mask).to_pylist():
                self.reject(offset, name, reason)
        return self.columns[name]

    def read_id(self, name: str) -> pa.Array:
        """Converts a column of ids, and notes those that look like another one but for blanks around them."""
        values = self.read(name, ids)
        around = pc.indices_nonzero(_mask(pc.not_equal(pc.utf8_trim(values, BLANK), values))).to_pylist()
        if around:
            self.blanks_around[name] = (len(around), self.batch.first_row + around[0])
        return values

    def reject(self, offset: int, column: str, reason: str) -> None:
        """Marks a row; its value is looked up for the report."""
        source = self.batch.columns.get(column)
        value = None if source is None else source[offset]
        if isinstance(value, pa.Scalar):
            try:
                value = value.as_py()
            except (ValueError, OverflowError):  # a time beyond Python's years
                value = value.value
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
    blank = pc.fill_null(pc.equal(pc.utf8_length(pc.utf8_trim(values, BLANK)), 0), True)
    return values, [("is empty", blank), *faults, *_too_long(values)]


def keys(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Text of an optional key (kind, event_id); missing is empty."""
    values, faults = text(batch, name)
    return pc.fill_null(values, ""), [*faults, *_too_long(values)]


def text(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Text or null. Integers become text; whole floats too: a missing value makes floats of a column of integers."""
    values = batch.columns.get(name)
    array = _text_of_json(batch, name, values) if isinstance(values, list) else batch.array(name)
    kind = array.type
    if pa.types.is_floating(kind):
        array = _null_if(array, pc.is_nan(array))
        # Beyond its mantissa a float is one of several integers, and nobody knows which was meant.
        exact = 2.0 ** (53 if kind.bit_width == 64 else 24)
        whole = pc.fill_null(pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), exact)), True)
        if not pc.all(whole).as_py():
            raise _wrong_type(batch, name, "fractions, or numbers that lost digits", "text or integers")
        return array.cast(pa.int64()).cast(pa.string()), []
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise _wrong_type(batch, name, str(kind), "text or integers")
    array = array.cast(pa.string())
    return array, [
        ("contains a zero byte", _mask(pc.match_substring(array, "\0"))),
        (f"is longer than {MAX_ROW_BYTES >> 20} MiB", _mask(pc.greater(pc.binary_length(array), MAX_ROW_BYTES))),
    ]


def _text_of_json(batch: Batch, name: str, values: list[Any]) -> pa.Array:
    """Value by value, so that an id does not depend on its neighbours: NaN is none, 7.0 is 7, true is refused."""
    if all(type(value) is str for value in values):
        return pa.array(values, pa.string())
    found = []
    for offset, value in enumerate(values):
        if isinstance(value, float):
            value = None if math.isnan(value) else int(value) if value.is_integer() and abs(value) < 2**53 else value
        if isinstance(value, (bool, float, dict, list, Written)):
            what = value if isinstance(value, Written) else json.dumps(value)
            where = f"{batch.file}, row {batch.first_row + offset}: column {name} holds {shown(what)}"
            nested = "nested values are not allowed: " if isinstance(value, (dict, list)) else ""
            raise UserError(f"{where}; {nested}text or integers are expected")
        found.append(None if value is None else str(value))
    return pa.array(found, pa.string())


def times(batch: Batch, name: str) -> tuple[pa.Array, Faults]:
    """Timestamps in µs, UTC. Naive ones are UTC; numbers are seconds since 1970; text is ISO 8601 or such a number."""
    values = batch.columns.get(name)
    if isinstance(values, list) and not _alike(values):
        array = pa.array([_time_of_json(value) for value in values], pa.timestamp("us", "UTC"))
    else:
        array = batch.array(name)
    kind = array.type
    if _is_text(kind):
        array = _parsed_times(array)
    elif pa.types.is_date(kind):
        array = array.cast(pa.timestamp("s"))
    elif pa.types.is_floating(kind):
        if kind.bit_width < 64:
            raise UserError(
                f"{batch.file}: column {name} holds {kind} numbers, which cannot tell times less than 128 s apart; "
                "write doubles, integers or timestamps"
            )
        micros = pc.multiply(_null_if(array, pc.invert(pc.is_finite(array))), 1e6)
        # What an integer cannot hold is far in the future or the past: that is what the row is rejected for.
        micros = pc.max_element_wise(
            pc.min_element_wise(pc.round(micros), 9e18, skip_nulls=False), -9e18, skip_nulls=False
        )
        array = micros.cast(pa.int64(), safe=False)
        array = array.cast(pa.timestamp("us"))
    elif pa.types.is_integer(kind):
        if kind == pa.uint64():
            array = pc.min_element_wise(array, pa.scalar(2**62, pa.uint64()), skip_nulls=False)
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


def _alike(values: list[Any]) -> bool:
    """Whether arrow reads a JSON column as what it is: texts, or integers that fit."""
    found = {type(value) for value in values if value is not None}
    return found <= {str} or (found == {int} and all(value is None or abs(value) < 2**62 for value in values))


def _time_of_json(value: Any) -> datetime | None:
    if isinstance(value, str):
        return _parsed_time(value)
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    return _from_epoch(max(-1.0, min(value, FAR_AHEAD))) if known else None


def _parsed_time(value: str | None) -> datetime | None:
    if value is None:
        return None
    try:
        parsed = datetime.fromisoformat(value.strip()) if not _is_number(value) else _from_epoch(float(value))
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _from_epoch(seconds: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=min(seconds, FAR_AHEAD))


def _is_number(value: str) -> bool:
    # Eight digits are a date without dashes (20240131), not seconds in the year 1970.
    stripped = value.strip()
    return len(stripped) != 8 and stripped.removeprefix("-").replace(".", "", 1).isdigit()


def _plausible(array: pa.Array) -> tuple[pa.Array, Faults]:
    unit = PER_SECOND[array.type.unit]
    ticks = array.cast(pa.int64())
    latest = int(datetime.now(UTC).timestamp()) + MAX_AHEAD_SECONDS
    implausible = _mask(pc.or_(pc.less(ticks, 0), pc.greater(ticks, latest * unit)))
    ticks = _null_if(ticks, implausible)
    micros = pc.multiply(ticks, 1_000_000 // unit) if unit <= 1_000_000 else pc.divide(ticks, unit // 1_000_000)
    faults = [
        ("is not a time", _mask(pc.is_null(array))),
        (
            f"is before 1970 or more than {MAX_AHEAD_SECONDS} s in the future (numbers are seconds since 1970)",
            implausible,
        ),
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
    faults: Faults = [("has more digits than a number can keep", _loses_digits(array))]
    array = array.cast(pa.float64(), safe=False)
    faults.append(("is not a finite number", _mask(pc.is_inf(array))))
    if unread is not None:
        faults.append(("is not a number, or has more digits than a number can keep", unread))
    return _null_if(array, pc.is_nan(array)), faults


def _loses_digits(array: pa.Array) -> pa.Array:
    """Integers that no float holds; fractions are the nearest double."""
    if not pa.types.is_int64(array.type) and not pa.types.is_uint64(array.type):
        return pa.repeat(False, len(array))
    beyond = pc.greater(array, LARGEST_INTEGER)
    return _mask(pc.or_(beyond, pc.less(array, -LARGEST_INTEGER)) if pa.types.is_int64(array.type) else beyond)


def _parsed_number(value: str | None) -> float | bool | None:
    if value is None or not value.strip():
        return None
    number = value.strip()
    if number.removeprefix("-").isdigit():
        return float(number) if len(number) <= 17 and abs(int(number)) <= LARGEST_INTEGER else False
    try:
        return False if "_" in number else float(number)
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
