"""Attributes: every column of items and users that the contract does not name, as one JSON object per row."""

import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from typing import Any

from pipelines.contract import Batch, Source
from polytower.errors import UserError

Reader = Callable[[str], Any]

# A leading zero means a code (a zip, a phone number), not a number.
_INTEGER = re.compile(r"-?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_FLAG = re.compile(r"true|false", re.IGNORECASE)


def attribute_objects(batch: Batch, known: tuple[str, ...], readers: Mapping[str, Reader]) -> list[dict[str, Any]]:
    """One object per row: name → scalar or list of scalars; missing values have no key.

    readers: how the text of a CSV column becomes a value (csv_readers). Raises UserError, naming the column, for
    structs, maps, binary and nested lists.
    """
    objects: list[dict[str, Any]] = [{} for _ in range(batch.rows)]
    for name in batch.columns:
        if name in known:
            continue
        if not name.strip():
            raise UserError(f"{batch.file} has a column without a name; name or drop it")
        read = readers.get(name)
        for offset, value in enumerate(batch.values(name)):
            try:
                found = _value(read(value) if read and value is not None else value)
            except TypeError as error:
                message = f"{batch.file}, row {batch.first_row + offset}: column {name} holds {error}"
                raise UserError(f"{message}; an attribute is text, a number, true/false, or a list of them") from None
            if found is not None:
                objects[offset][name] = found
    return objects


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
        return number if math.isfinite(number) else None
    if isinstance(value, date):  # a timestamp is a date too
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__}")


def csv_readers(source: Source, known: tuple[str, ...]) -> dict[str, Reader]:
    """What the text of each attribute column of a CSV file means, from one pass over the whole file.

    All values of a column decide together: integers, numbers, true/false, JSON lists, otherwise text as it stands.
    """
    if source.path.suffix != ".csv":
        return {}
    candidates: dict[str, list[Callable[[str], bool]]] = {}
    for batch in source.batches():
        for name in batch.columns:
            if name not in known:
                left = candidates.setdefault(name, list(_READERS))
                values = [value for value in batch.values(name) if value]
                candidates[name] = [fits for fits in left if all(map(fits, values))]
    return {name: _READERS[left[0]] for name, left in candidates.items() if left}


def _is_integer(text: str) -> bool:
    return _INTEGER.fullmatch(text) is not None


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text) is not None


def _is_flag(text: str) -> bool:
    return _FLAG.fullmatch(text) is not None


def _is_list(text: str) -> bool:
    return text.startswith("[") and isinstance(_json_or_none(text), list)


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _read_flag(text: str) -> bool | None:
    return text.lower() == "true" if text else None


# In order of preference; an empty cell means no value in all of them.
_READERS: dict[Callable[[str], bool], Reader] = {
    _is_integer: lambda text: int(text) if text else None,
    _is_number: lambda text: float(text) if text else None,
    _is_flag: _read_flag,
    _is_list: _json_or_none,
}
