"""Attributes: every column of items and users that the contract does not name, as one JSON object per row."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

import pyarrow as pa

from pipelines.load.columns import Checked
from pipelines.load.contract import Batch, Source, check_names
from pipelines.load.digits import LARGEST_INTEGER, Written, is_number, survives
from polytower.errors import UserError

Reader = Callable[[Any], Any]

# So many fractional numbers in one cell are hardly a property of an item.
WIDE = 16

_FLAG = re.compile(r"true|false", re.IGNORECASE)


@dataclass
class Attributes:
    """How the attribute columns of one table are read, and what types were met.

    met: attribute → type ("number", "text", "true/false") → the first row that has it. wide: attribute → length of its
    first list of at least WIDE fractional numbers.
    """

    known: tuple[str, ...]
    readers: Mapping[str, Reader]
    met: dict[str, dict[str, int]] = field(default_factory=dict)
    wide: dict[str, int] = field(default_factory=dict)

    def objects(self, checked: Checked) -> list[dict[str, Any]]:
        """One object per row: name → scalar or list of scalars; null where a column that the row names has no value.

        An infinite number marks its row. Raises UserError, naming the column, for structs, maps, binary and nested
        lists.
        """
        batch = checked.batch
        objects: list[dict[str, Any]] = [{} for _ in range(batch.rows)]
        for name in batch.columns:
            if name in self.known:
                continue
            read = self.readers.get(name)
            met = self.met.setdefault(name, {})
            for offset, value in enumerate(batch.values(name)):
                try:
                    found = None if value is None else _value(read(value) if read else value)
                except TypeError as error:
                    message = f"{batch.file}, row {batch.first_row + offset}: column {name} holds {error}"
                    raise UserError(
                        f"{message}; an attribute is text, a number, true/false, or a list of them"
                    ) from None
                except OverflowError:
                    checked.reject(offset, name, "is not a finite number")
                    continue
                if found is not None or batch.gives(offset, name):
                    objects[offset][name] = found
                if isinstance(found, list) and len(found) >= WIDE and all(type(each) is float for each in found):
                    self.wide.setdefault(name, len(found))
                for element in found if isinstance(found, list) else (found,):
                    if element is not None:
                        met.setdefault(_TYPES[type(element)], batch.first_row + offset)
        return objects


_TYPES = {bool: "true/false", int: "number", float: "number", str: "text", Written: "text"}


def _value(value: Any) -> Any:
    if isinstance(value, list):
        items = [_scalar(item) for item in value]
        return [item for item in items if item is not None]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, Decimal)):
        number = float(value)
        if math.isinf(number):
            raise OverflowError
        return None if math.isnan(number) else number
    if isinstance(value, date):  # a timestamp is a date too
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__}")


def read_attributes(source: Source, known: tuple[str, ...]) -> Attributes:
    """How a table's attributes are to be read, from one pass over its file. UserError for names that are near alike.

    All values of a column decide together, in every format. Numbers of which one has more digits than a number keeps
    are text, as they stand. In CSV, where all is text: numbers, true/false, JSON lists, otherwise text.
    """
    names: dict[str, None] = {}
    candidates: dict[str, list[Callable[[str], bool]]] = {}
    written: set[str] = set()
    for batch in source.batches():
        met = [name for name in batch.columns if name not in names]
        if met:
            names.update(dict.fromkeys(met))
            check_names(source.name, list(names), known)
        for name in batch.columns:
            if name in known:
                continue
            if source.form == "csv":
                left = candidates.setdefault(name, list(_READERS))
                values = [value for value in batch.values(name) if value]
                candidates[name] = [fits for fits in left if all(map(fits, values))]
            elif name not in written and _loses_digits(batch, name):
                written.add(name)
    readers: dict[str, Reader] = {name: _READERS[left[0]] for name, left in candidates.items() if left}
    return Attributes(known, readers | dict.fromkeys(written, _as_written))


def _loses_digits(batch: Batch, name: str) -> bool:
    column = batch.columns[name]
    if not isinstance(column, list):
        kind = column.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        wide = kind in (pa.int64(), pa.uint64()) or (pa.types.is_decimal(kind) and kind.precision > 15)
        if not wide:
            return False
    return any(_number_loses_digits(value) for value in batch.values(name))


def _number_loses_digits(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_number_loses_digits, value))
    if isinstance(value, int):
        return abs(value) > LARGEST_INTEGER
    return isinstance(value, Written) or (isinstance(value, Decimal) and not survives(format(value, "f")))


def _as_written(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return str(value) if isinstance(value, Written) else value
    if isinstance(value, float):
        return None if math.isnan(value) else repr(value)
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def _is_flag(text: str) -> bool:
    return _FLAG.fullmatch(text) is not None


def _is_list(text: str) -> bool:
    return text.startswith("[") and isinstance(_json_or_none(text), list)


def _json_or_none(text: str) -> Any:
    """A JSON list whose numbers keep their digits."""
    try:
        found = json.loads(text, parse_float=lambda number: float(number) if survives(number) else Written(number))
        return None if _number_loses_digits(found) else found
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> int | float | None:
    if not text:
        return None
    return float(text) if any(sign in text for sign in ".eE") else int(text)


# In order of preference; an empty cell means no value in all of them.
_READERS: dict[Callable[[str], bool], Reader] = {
    is_number: _number,
    _is_flag: lambda text: text.lower() == "true" if text else None,
    _is_list: lambda text: _json_or_none(text) if text else None,
}
