"""A contract folder as arrays, without a database: the same files, rows and clock as `polytower load`.

polytower experiment DIR
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from encoders.catalogue import Histories
from encoders.experiments.experiment import Dataset, Queries
from feature_repo.modalities import MODALITIES, item_text
from pipelines.load.attributes import read_attributes
from pipelines.load.columns import shown
from pipelines.load.contract import Source, find_sources
from pipelines.load.entities import ITEMS, USERS, item_rows, user_rows
from pipelines.load.interactions import checked_interactions
from pipelines.load.own_columns import OwnColumns
from pipelines.load.rejections import Rejection, Rejections
from polytower.errors import UserError
from polytower.settings import settings

# What tells one event from another; with an event id, that id alone.
UNSEEN = "is not in items"
_EVENT = ["user_id", "occurred_at", "item_id", "kind", "query"]


def read_folder(
    folder: Path, max_rejected: float = 0.05, own: Mapping[str, str] | None = None
) -> tuple[Dataset, Rejections]:
    """(what an experiment reads, the rows that were left out). own: modality → the column of items that holds it.

    The catalogue is that of the items file, in its order; where there is none, all items with an event, by id. Of the
    same event or item the first row counts. Raises UserError as the load does.
    """
    sources, _ = find_sources(folder)
    if "interactions" not in sources:
        raise UserError(f"{folder} has no interactions (.parquet, .csv or .jsonl); see docs/data.md")
    rejections = Rejections(max_rejected)
    items = _items(sources["items"], rejections, OwnColumns(own, ITEMS.known)) if "items" in sources else {}
    events = _events(sources["interactions"], rejections)
    item_ids = list(items) if "items" in sources else sorted(set(pc.unique(events["item_id"]).to_pylist()))
    histories, queries = _histories(events, sources["interactions"], item_ids, rejections)
    users = _users(sources["users"], rejections) if "users" in sources else None
    known = None if users is None else [users.get(user, {}) for user in histories.user_ids]
    encoders = {name: getattr(settings(), one.setting) for name, one in MODALITIES.items() if one.setting}
    name = folder.resolve().name
    return Dataset(name, item_ids, list(items.values()), histories, known, queries, encoders), rejections


def _items(source: Source, rejections: Rejections, own: OwnColumns) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    read = 0
    rejections.read_from(source)
    attributes = read_attributes(source, (*ITEMS.known, *own.columns.values()))
    for size, rows in item_rows(source, attributes, rejections, None, own, progress=False):
        read += size
        for _, _, *values, texts in rows:
            row = dict(zip(ITEMS.columns, values, strict=True))
            found.setdefault(row["item_id"], {**row, "attributes": _there(texts)})
    rejections.refuse_if_many(source.name, read)
    return found


def _users(source: Source, rejections: Rejections) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    read = 0
    rejections.read_from(source)
    for size, rows in user_rows(source, read_attributes(source, USERS.known), rejections, progress=False):
        read += size
        for _, _, user_id, attributes in rows:
            found.setdefault(user_id, _there(attributes))
    rejections.refuse_if_many(source.name, read)
    return found


def _there(attributes: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(attributes).items() if value is not None}


def _events(source: Source, rejections: Rejections) -> pa.Table:
    """All sound rows, texts dictionary-encoded: about 60 bytes an event."""
    rejections.read_from(source)
    encoded = []
    for batch in source.batches():
        table = checked_interactions(batch, rejections)
        names = [name for name in table.column_names if pa.types.is_string(table[name].type)]
        for name in names:
            table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
        encoded.append(table)
    return pa.concat_tables(encoded).unify_dictionaries().combine_chunks()


def _histories(
    events: pa.Table, source: Source, item_ids: list[str], rejections: Rejections
) -> tuple[Histories, Queries]:
    codes = {name: _codes(events[name]) for name in ("user_id", "item_id", "kind", "event_id", "query")}
    times = events["occurred_at"].cast(pa.int64()).to_numpy()
    frame = pd.DataFrame({**codes, "occurred_at": times})
    named = pc.not_equal(events["event_id"], "").to_numpy()
    again = np.where(named, frame.duplicated(["event_id"]), frame.assign(named=named).duplicated([*_EVENT, "named"]))
    items = _positions(events["item_id"], item_ids)[codes["item_id"]]
    read = len(events) + rejections.rows(source.name)
    for row in np.flatnonzero(items < 0).tolist():
        found = Rejection(
            source.name, events["row"][row].as_py(), "item_id", UNSEEN, shown(events["item_id"][row].as_py())
        )
        rejections.add(found)
    rejections.refuse_if_many(source.name, read)
    kept = np.flatnonzero(~again & (items >= 0))
    if not len(kept):
        raise UserError(f"{source.name}: no row is left to learn from")
    names = sorted(set(events["user_id"].take(pa.array(kept)).unique().to_pylist()))
    users = _positions(events["user_id"], names)[codes["user_id"]]
    order = kept[np.lexsort((kept, times[kept], users[kept]))]
    offsets = np.searchsorted(users[order], np.arange(len(names) + 1)).astype(np.int64)
    return Histories(names, offsets, items[order], times[order]), _queries(events["query"].take(pa.array(order)))


def _queries(column: pa.ChunkedArray) -> Queries:
    """The query of each event, without blank edges and by its number among the distinct ones; −1 for a blank one."""
    dictionary = _dictionary(column).dictionary.to_pylist()
    rendered = [item_text(text, None) for text in dictionary]
    texts = sorted({text for text in rendered if text})
    index = {text: row for row, text in enumerate(texts)}
    rows = np.array([*(index.get(text, -1) for text in rendered), -1], np.int64)
    return Queries(rows[_codes(column)], texts)


def _codes(column: pa.ChunkedArray) -> Any:
    return pc.fill_null(_dictionary(column).indices, -1).to_numpy(zero_copy_only=False)


def _positions(column: pa.ChunkedArray, names: list[str]) -> Any:
    """Of each entry of the column's dictionary: its place among the names, −1 where it is none of them."""
    found = pc.index_in(_dictionary(column).dictionary, pa.array(names, pa.string()))
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
