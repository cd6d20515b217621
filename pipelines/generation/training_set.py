"""What the towers learn from, read out of Postgres as arrays: the catalogue with its content, and all histories."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from psycopg import sql

from encoders.catalogue import Catalogue, Histories
from encoders.content.attributes import user_vectors
from feature_repo.modalities import modality
from pipelines.item_content import content_of
from polytower.errors import UserError

# Users, and items with their embeddings, that are fetched at once.
USERS_BATCH = 5_000
ITEMS_BATCH = 5_000

HISTORIES = """
select string_agg(
           '"' || replace(user_id, '"', '""') || '","' || replace(item_id, '"', '""') || '",'
               || (extract(epoch from occurred_at) * 1000000)::bigint || ','
               || coalesce(case when %(queries)s then query_key(query) end, '') || E'\\n',
           '' order by occurred_at, position)
from interactions join items using (item_id) where occurred_at < %(before)s::timestamptz
group by user_id collate "C" order by user_id collate "C"
"""

# What is known of a user, for towers that read it: (user_id, attributes) of some users.
Profiles = tuple[Sequence[str], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """A consistent snapshot (one transaction) of everything that training reads.

    encoders: modality -> revision of the content embeddings in the catalogue. until: position of the newest event.
    before: no event at or after this moment is known; None knows all that there are. contents: what encoders that are
    trained too read, by modality and catalogue index; None where an item has none.
    """

    catalogue: Catalogue
    histories: Histories
    encoders: Mapping[str, str]
    until: int
    before: datetime | None = None
    contents: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def read_training_set(
    connection: psycopg.Connection[Any],
    user_attributes: int = 0,
    *,
    queries: bool = False,
    before: datetime | None = None,
    instead: Mapping[str, str] | None = None,
) -> TrainingSet:
    """Reads the snapshot; commits what the caller left open. Raises UserError when there is nothing to learn from.

    user_attributes: width that the users' attributes are hashed to, for towers that read them; 0 leaves them out.
    queries: whether what the events were searched by is read as well. before: events at or after it are left out.
    Items, their content and users' attributes are as they are now. instead: as in read_catalogue.
    """
    with one_moment(connection):
        found = read_events(connection, before, instead, queries=queries)
        if not user_attributes:
            return found
        histories = with_attributes(found.histories, read_profiles(connection), user_attributes)
        return replace(found, histories=histories)


@contextmanager
def one_moment(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Inside, every statement reads the database as it was at the first one. Commits what the caller left open."""
    connection.commit()  # the isolation level can only be set by a transaction's first statement
    with connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        yield


def read_events(
    connection: psycopg.Connection[Any],
    before: datetime | None,
    instead: Mapping[str, str] | None = None,
    *,
    queries: bool = False,
) -> TrainingSet:
    """The training set without the users' attributes. Raises UserError when there is nothing to learn from."""
    catalogue, encoders = read_catalogue(connection, instead)
    histories = read_histories(connection, catalogue, before, queries=queries)
    if histories.query_vectors is not None:
        encoders |= text_encoder(connection)
    if not len(histories.items):
        raise UserError(
            "there are no interactions to learn from: `polytower load DIR` brings them"
            if before is None
            else f"there are no interactions before {before.isoformat()} to learn from: choose a later moment"
        )
    row = connection.execute(
        "select max(position) from interactions where occurred_at < %s::timestamptz", [before or "infinity"]
    ).fetchone()
    assert row is not None
    return TrainingSet(catalogue, histories, encoders, int(row[0]), before)


def read_catalogue(
    connection: psycopg.Connection[Any], instead: Mapping[str, str] | None = None
) -> tuple[Catalogue, dict[str, str]]:
    """All items in byte order of their ids, with the content embeddings of the active encoder revisions.

    instead: modality -> another revision (an adapted encoder's). Returns the catalogue and {modality: revision}. A
    modality that no item has is left out. Raises UserError for a revision by which nothing was encoded.
    """
    item_ids = [row[0] for row in connection.execute('select item_id from items order by item_id collate "C"')]
    index = {item_id: row for row, item_id in enumerate(item_ids)}
    content: dict[str, np.ndarray] = {}
    present: dict[str, np.ndarray] = {}
    revisions: dict[str, str] = {}
    registered = connection.execute("select modality, revision, dim, active from content_encoders").fetchall()
    wanted = {name: revision for name, revision, _, active in registered if active} | dict(instead or {})
    widths = {(name, revision): dim for name, revision, dim, _ in registered}
    for name, revision in sorted(wanted.items()):
        if (name, revision) not in widths:
            raise UserError(
                f"the {name} encoder that training adapted (revision {revision}) has not encoded the catalogue yet:"
                " `polytower materialize` does, as Dagster's asset adapted_embeddings"
            )
        dim = widths[name, revision]
        modality(name)  # one that this version does not know is refused
        vectors, found = _read_content(connection, name, revision, dim, index)
        if found.any():
            content[name], present[name], revisions[name] = vectors, found, revision
    return Catalogue(item_ids, content, present), revisions


def read_contents(connection: psycopg.Connection[Any], catalogue: Catalogue) -> dict[str, list[Any]]:
    """What the items have of the modalities in the catalogue whose encoders can be chosen, by catalogue index."""
    index = {item_id: row for row, item_id in enumerate(catalogue.item_ids)}
    found: dict[str, list[Any]] = {}
    for name, _ in catalogue.modalities:
        if modality(name).setting is None:
            continue
        found[name] = [None] * len(index)
        with connection.cursor(name="read_contents", binary=True) as cursor:
            cursor.itersize = ITEMS_BATCH
            cursor.execute(sql.SQL("select item_id, content from ({}) as c").format(content_of(name)))
            for item_id, content in cursor:
                if item_id in index:
                    found[name][index[item_id]] = content
    return found


def _read_content(
    connection: psycopg.Connection[Any], modality: str, revision: str, dim: int, index: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.zeros((len(index), dim), np.float32)
    found = np.zeros(len(index), bool)
    with connection.cursor(name="read_content", binary=True) as cursor:
        cursor.itersize = ITEMS_BATCH
        cursor.execute(
            "select item_id, embedding from content_embeddings where modality = %s and revision = %s",
            [modality, revision],
        )
        for item_id, embedding in cursor:
            row = index.get(item_id)
            if row is not None:
                vectors[row], found[row] = embedding.to_numpy(), True
    return vectors, found


def text_encoder(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """{"text": revision of the encoder in force}; {} without one."""
    found = connection.execute("select revision from content_encoders where modality = 'text' and active").fetchone()
    return {} if found is None else {"text": found[0]}


def read_histories(
    connection: psycopg.Connection[Any], catalogue: Catalogue, before: datetime | None = None, *, queries: bool = False
) -> Histories:
    """Every user's events (before a moment), oldest first by (occurred_at, position); users in byte order of their ids.

    queries: with the text embeddings of what was searched for; a query that is not encoded counts as none.

    Each user's events come as lines of CSV in one value, and are read into dictionary-encoded columns: a few dozen
    bytes an event in memory, and no Python object for each.
    """
    buffer = io.BytesIO()
    with connection.cursor(name="read_histories", binary=True) as cursor:
        cursor.execute(HISTORIES, {"before": before or "infinity", "queries": queries})
        while users := cursor.fetchmany(USERS_BATCH):
            buffer.write("".join(lines for (lines,) in users).encode())
    if not buffer.tell():
        empty = np.zeros(0, np.int64)
        return Histories([], np.zeros(1, np.int64), empty, empty)
    buffer.seek(0)
    text = pa.dictionary(pa.int32(), pa.string())
    table = pa_csv.read_csv(
        buffer,
        read_options=pa_csv.ReadOptions(column_names=["user", "item", "time", "query"]),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types={"user": text, "item": text, "time": pa.int64(), "query": text}, strings_can_be_null=False
        ),
    ).unify_dictionaries()
    histories = _histories(table, catalogue)
    return with_queries(connection, histories, table["query"].combine_chunks()) if queries else histories


def with_queries(connection: psycopg.Connection[Any], histories: Histories, keys: pa.DictionaryArray) -> Histories:
    """The histories with their events' queries. keys: query_key of each event, "" for none.

    The vectors are those of queries that occur, in order of their keys.
    """
    vectors: dict[str, np.ndarray] = {}
    with connection.cursor(name="read_queries", binary=True) as cursor:
        cursor.itersize = ITEMS_BATCH
        cursor.execute(
            """select query_key, embedding from query_embeddings join content_encoders using (modality, revision)
               where active and query_key = any (%s) order by query_key collate "C" """,
            [keys.dictionary.to_pylist()],
        )
        for key, embedding in cursor:
            vectors[key] = embedding.to_numpy()
    if not vectors:
        return histories
    place = {key: row for row, key in enumerate(vectors)}
    rows = np.array([place.get(key, -1) for key in keys.dictionary.to_pylist()], np.int64)
    of_event = rows[keys.indices.to_numpy(zero_copy_only=False)]
    return replace(histories, queries=of_event, query_vectors=np.stack(list(vectors.values())).astype(np.float32))


def read_profiles(connection: psycopg.Connection[Any]) -> Iterator[Profiles]:
    """The users with attributes, in byte order of their ids, USERS_BATCH at a time."""
    with connection.cursor(name="read_users", binary=True) as cursor:
        cursor.execute(
            """select user_id, attributes from users where attributes <> '{}' order by user_id collate "C" """
        )
        while rows := cursor.fetchmany(USERS_BATCH):
            yield [user_id for user_id, _ in rows], [attributes for _, attributes in rows]


def with_attributes(histories: Histories, profiles: Iterable[Profiles], width: int) -> Histories:
    """The histories with what is known of their users, hashed to `width` numbers.

    After them come, without events, the users who are known by their attributes alone, in byte order of their ids.
    """
    names: list[str] = []
    vectors = [np.zeros((0, width), np.float32)]
    for user_ids, attributes in profiles:
        names += user_ids
        vectors.append(user_vectors(attributes, width))
    index = {user_id: row for row, user_id in enumerate(histories.user_ids)}
    idle = [name for name in names if name not in index]
    index |= {name: row for row, name in enumerate(idle, len(index))}
    hashed = np.zeros((len(index), width), np.float32)
    hashed[[index[name] for name in names]] = np.concatenate(vectors)
    offsets = np.pad(histories.offsets, (0, len(idle)), mode="edge")
    return replace(histories, user_ids=[*histories.user_ids, *idle], offsets=offsets, attributes=hashed)


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
