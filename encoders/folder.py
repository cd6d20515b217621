"""Reading a contract folder straight into arrays, without a database: for experiments (`polytower experiment`).

The platform's own loader (pipelines/load.py) is the one that validates row by row; here a bad folder is refused whole.
"""

import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from encoders.catalogue import Histories
from polytower.errors import UserError

_SUFFIXES = (".parquet", ".csv", ".jsonl")


def read_items(folder: Path) -> pa.Table:
    """The items table as it is (item_id as text, first of each id), or an empty one where there is no file."""
    path = _find(folder, "items")
    if path is None:
        return pa.table({"item_id": pa.array([], pa.string())})
    table = _with_text(_read(path), path, ["item_id"])
    ids = table["item_id"].to_pylist()
    first = {item_id: row for row, item_id in reversed(list(enumerate(ids)))}
    return table.take(sorted(first.values()))


def read_interactions(folder: Path, item_ids: list[str] | None = None) -> tuple[list[str], Histories]:
    """(item ids in catalogue order, histories ordered by (occurred_at, file order)).

    The catalogue is item_ids, if given, and then every other item with an event, sorted by id. Users are sorted by id.
    Raises UserError for a missing file, column or an unreadable time.
    """
    path = _find(folder, "interactions")
    if path is None:
        raise UserError(f"{folder}: no interactions.parquet, .csv or .jsonl; the input contract is in the README")
    table = _with_text(_read(path), path, ["user_id", "item_id"])
    times = _microseconds(table, path)
    known = list(item_ids or [])
    described = set(known)
    known += sorted(set(table["item_id"].to_pylist()) - described)
    items = pc.index_in(table["item_id"], value_set=pa.array(known, pa.string())).to_numpy().astype(np.int64)
    user_ids = sorted(set(table["user_id"].to_pylist()))
    users = pc.index_in(table["user_id"], value_set=pa.array(user_ids, pa.string())).to_numpy().astype(np.int64)
    order = np.lexsort((np.arange(len(users)), times, users))
    offsets = np.searchsorted(users[order], np.arange(len(user_ids) + 1)).astype(np.int64)
    return known, Histories(user_ids, offsets, items[order], times[order])


def read_users(folder: Path, user_ids: Sequence[str]) -> list[dict[str, Any]]:
    """What the folder's users file says of each of these users: {attribute: value}, empty for whom it does not name.

    The first row of a user counts, as when the folder is loaded. Raises UserError where there is no such file.
    """
    path = _find(folder, "users")
    if path is None:
        raise UserError(f"{folder}: no users.parquet, .csv or .jsonl, from which towers.user_attributes would be read")
    rows = _with_text(_read(path), path, ["user_id"]).to_pylist()
    known = {row.pop("user_id"): row for row in reversed(rows)}
    return [{name: _plain(value) for name, value in known.get(user_id, {}).items()} for user_id in user_ids]


def _plain(value: Any) -> Any:
    """As the platform keeps it: a date as its text, no value for a number that is none."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    if isinstance(value, date):  # a timestamp is a date too
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find(folder: Path, name: str) -> Path | None:
    found = [folder / f"{name}{suffix}" for suffix in _SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name}; keep one of them")
    return found[0] if found else None


def _read(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        return pyarrow.csv.read_csv(path) if path.suffix == ".csv" else pyarrow.json.read_json(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _with_text(table: pa.Table, path: Path, columns: list[str]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            raise UserError(f"{path}: no column {column}; it has {', '.join(table.column_names)}")
        text = table[column].cast(pa.string())
        if text.null_count:
            row = text.to_pylist().index(None) + 1
            raise UserError(f"{path}: row {row} has no {column}; fill it in or leave the row out")
        table = table.set_column(table.column_names.index(column), column, text)
    return table


def _microseconds(table: pa.Table, path: Path) -> Any:
    if "occurred_at" not in table.column_names:
        raise UserError(f"{path}: no column occurred_at; it has {', '.join(table.column_names)}")
    try:
        times = table["occurred_at"].cast(pa.timestamp("us", tz="UTC"))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"{path}: occurred_at is not a time in UTC: {error}") from error
    if times.null_count:
        raise UserError(f"{path}: row {times.to_pylist().index(None) + 1} has no occurred_at")
    return times.cast(pa.int64()).to_numpy()
