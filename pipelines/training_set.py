"""What the towers learn from, read out of Postgres as arrays: the catalogue with its content, and all histories."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from encoders.catalogue import Catalogue, Histories
from feature_repo.schema import MODALITIES
from polytower.errors import UserError


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """A consistent snapshot (one transaction) of everything that training reads.

    encoders: modality -> revision of the content embeddings in the catalogue. until: newest interaction's position.
    """

    catalogue: Catalogue
    histories: Histories
    encoders: Mapping[str, str]
    until: int


def read_training_set(connection: psycopg.Connection[Any]) -> TrainingSet:
    """Reads the snapshot; commits what the caller left open. Raises UserError when there is nothing to learn from."""
    connection.commit()  # the isolation level can only be set by a transaction's first statement
    with connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        catalogue, encoders = read_catalogue(connection)
        histories = read_histories(connection, catalogue)
        row = connection.execute("select coalesce(max(position), 0) from interactions").fetchone()
    assert row is not None
    if not len(histories):
        raise UserError("there are no interactions to learn from: `polytower load DIR` brings them")
    return TrainingSet(catalogue, histories, encoders, int(row[0]))


def read_catalogue(connection: psycopg.Connection[Any]) -> tuple[Catalogue, dict[str, str]]:
    """All items in byte order of their ids, with the content embeddings of the active encoder revisions.

    Returns the catalogue and {modality: revision}. A modality that no item has is left out.
    """
    item_ids = [row[0] for row in connection.execute('select item_id from items order by item_id collate "C"')]
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    content: dict[str, np.ndarray] = {}
    present: dict[str, np.ndarray] = {}
    revisions: dict[str, str] = {}
    active = connection.execute("select modality, revision, dim from content_encoders where active").fetchall()
    for modality, revision, dim in sorted(active, key=lambda row: MODALITIES.index(row[0])):
        vectors, found = _read_content(connection, modality, revision, dim, index)
        if found.any():
            content[modality], present[modality], revisions[modality] = vectors, found, revision
    return Catalogue(item_ids, content, present), revisions


def _read_content(
    connection: psycopg.Connection[Any], modality: str, revision: str, dim: int, index: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.zeros((len(index), dim), np.float32)
    found = np.zeros(len(index), bool)
    with connection.cursor(name="read_content", binary=True) as cursor:
        cursor.itersize = 5_000
        cursor.execute(
            "select item_id, embedding from content_embeddings where modality = %s and revision = %s",
            [modality, revision],
        )
        for item_id, embedding in cursor:
            row = index.get(item_id)
            if row is not None:
                vectors[row], found[row] = embedding.to_numpy(), True
    return vectors, found


def read_histories(connection: psycopg.Connection[Any], catalogue: Catalogue) -> Histories:
    """Every user's events, oldest first by (occurred_at, position); users in byte order of their ids.

    Streams CSV out of COPY into dictionary-encoded columns: about 20 bytes an event in memory.
    """
    query = """copy (
        select user_id, item_id, (extract(epoch from occurred_at) * 1000000)::bigint as time
        from interactions order by user_id collate "C", occurred_at, position
    ) to stdout (format csv)"""
    buffer = io.BytesIO()
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        for block in copy:
            buffer.write(block)
    if not buffer.tell():
        empty = np.zeros(0, np.int64)
        return Histories([], np.zeros(1, np.int64), empty, empty)
    buffer.seek(0)
    text = pa.dictionary(pa.int32(), pa.string())
    table = pa_csv.read_csv(
        buffer,
        read_options=pa_csv.ReadOptions(column_names=["user", "item", "time"]),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types={"user": text, "item": text, "time": pa.int64()}, strings_can_be_null=False
        ),
    ).unify_dictionaries()
    return _histories(table, catalogue)


def _histories(table: pa.Table, catalogue: Catalogue) -> Histories:
    users, items = (table[name].combine_chunks() for name in ("user", "item"))
    rows = pc.index_in(items.dictionary, pa.array(catalogue.item_ids, pa.string())).to_numpy(zero_copy_only=False)
    item_rows = rows[items.indices.to_numpy(zero_copy_only=False)]
    user_rows = users.indices.to_numpy(zero_copy_only=False)
    # Rows come sorted by user, so a change of code is the start of the next user's history.
    starts = np.flatnonzero(np.concatenate([[True], user_rows[1:] != user_rows[:-1]]))
    names = users.dictionary.to_pylist()
    return Histories(
        [names[code] for code in user_rows[starts]],
        np.concatenate([starts, [len(user_rows)]]).astype(np.int64),
        item_rows.astype(np.int64),
        table["time"].to_numpy().astype(np.int64),
    )
