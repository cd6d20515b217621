"""A generation's two tables: filled by binary COPY, then indexed, keyed, analysed and attached, in this order.

Inserting into a live HNSW index was measured six times slower than building it after the load.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.types.json import Jsonb

from feature_repo.columns import COPY_END, COPY_START, POSTGRES_EPOCH_MICROS
from feature_repo.schema import SCHEMA, SPACES
from pipelines.generation.lifecycle import PARENTS, get, partition

# pgvector's defaults; benchmarks/results/retrieval.json has the recall that they give.
HNSW_M = 16
HNSW_EF_CONSTRUCTION = 64

COLUMNS: dict[str, dict[str, str]] = {
    "item_embeddings": {
        "item_id": "text",
        "embedding": "halfvec",
        "content_embedding": "halfvec",
        "id_embedding": "halfvec",
    },
    "user_interests": {
        "user_id": "text",
        "interest": "int2",
        "embedding": "halfvec",
        "weight": "float4",
        "as_of": "timestamptz",
        "events": "int8",
    },
}
_BEFORE_ID = np.dtype([("fields", ">i2"), ("size", ">i4"), ("generation", ">i8"), ("id_size", ">i4")])
KEYS = {"item_embeddings": ("generation", "item_id"), "user_interests": ("generation", "user_id", "interest")}

Rows = Iterable[tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class InterestRows:
    """Interests of some users by column, N rows: interest [N], embedding [N, D] of unit length, weight [N].

    as_of: int64 [N], microseconds since 1970. events: int64 [N], how many of the user were known.
    """

    user_ids: Sequence[str]
    interest: NDArray[np.integer[Any]]
    embedding: NDArray[np.float32]
    weight: NDArray[np.float32]
    as_of: NDArray[np.int64]
    events: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.user_ids)


def fill(
    connection: psycopg.Connection[Any], generation: int, items: Rows, interests: Iterable[InterestRows]
) -> dict[str, int]:
    """Writes a generation's two partitions in one transaction and returns the row counts by table.

    items: (item_id, embedding, content_embedding | None, id_embedding | None), vectors as pgvector HalfVector of unit
    length.
    """
    dim = get(connection, generation).dim
    # All three index builds fit in memory at a million items; two workers were measured 1.5 times as fast as one.
    connection.execute("set local max_parallel_maintenance_workers = 2")
    counts = {
        "item_embeddings": _copy_items(connection, generation, items),
        "user_interests": _copy_interests(connection, generation, interests, dim),
    }
    for column in SPACES.values():
        _index(connection, generation, column, dim)
    for parent in PARENTS:
        _attach(connection, generation, parent)
    connection.commit()
    return counts


def halfvecs(vectors: Any, valid: Any) -> Iterator[Any]:
    """Rows of a float array [N, D] as pgvector HalfVector, or None where `valid` [N] is false."""
    from pgvector import HalfVector

    for vector, usable in zip(vectors, valid, strict=True):
        yield HalfVector(vector) if usable else None


def _copy_items(connection: psycopg.Connection[Any], generation: int, rows: Rows) -> int:
    count = 0
    with connection.cursor() as cursor, cursor.copy(_new_partition(connection, generation, "item_embeddings")) as copy:
        copy.set_types(("int8", *COLUMNS["item_embeddings"].values()))
        for row in rows:
            copy.write_row((generation, *row))
            count += 1
    return count


def _copy_interests(
    connection: psycopg.Connection[Any], generation: int, blocks: Iterable[InterestRows], dim: int
) -> int:
    count = 0
    statement = _new_partition(connection, generation, "user_interests")
    # Items have it from their indexes.
    width = "alter table {} add constraint user_interests_width_check check (vector_dims(embedding) = {})"
    connection.execute(sql.SQL(width).format(partition("user_interests", generation), sql.Literal(dim)))
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(COPY_START)
        for block in blocks:
            copy.write(binary_rows(generation, block))
            count += len(block)
        copy.write(COPY_END)
    return count


def _new_partition(connection: psycopg.Connection[Any], generation: int, parent: str) -> sql.Composed:
    """Creates the table, unattached, and answers the COPY that fills it."""
    table = partition(parent, generation)
    connection.execute(
        sql.SQL("create table {} (like {} including defaults including constraints)").format(
            table, sql.Identifier(SCHEMA, parent)
        )
    )
    return sql.SQL("copy {} ({}) from stdin (format binary)").format(table, _names(("generation", *COLUMNS[parent])))


def binary_rows(generation: int, rows: InterestRows) -> bytes:
    """The rows as binary COPY has them, by column: what stands before and after the user's id has one length.

    A row at a time, a million users' interests took twenty times as long. A halfvec is its dimensions, a zero, halves.
    """
    ids = [user_id.encode() for user_id in rows.user_ids]
    dim = rows.embedding.shape[1]
    before = np.zeros(len(rows), _BEFORE_ID)
    before["fields"], before["size"], before["generation"] = 1 + len(COLUMNS["user_interests"]), 8, generation
    before["id_size"] = [len(user_id) for user_id in ids]
    after = np.zeros(
        len(rows),
        [("interest_size", ">i4"), ("interest", ">i2"), ("embedding_size", ">i4"), ("dim", ">i2"), ("zero", ">i2"),
         ("embedding", ">f2", (dim,)), ("weight_size", ">i4"), ("weight", ">f4"), ("as_of_size", ">i4"),
         ("as_of", ">i8"), ("events_size", ">i4"), ("events", ">i8")],
    )  # fmt: skip
    after["interest_size"], after["interest"] = 2, rows.interest
    after["embedding_size"], after["dim"], after["embedding"] = 4 + 2 * dim, dim, rows.embedding
    after["weight_size"], after["weight"] = 4, rows.weight
    after["as_of_size"], after["as_of"] = 8, rows.as_of - POSTGRES_EPOCH_MICROS
    after["events_size"], after["events"] = 8, rows.events
    return b"".join(chain.from_iterable(zip(_cut(before), ids, _cut(after), strict=True)))


def _cut(records: NDArray[Any]) -> list[bytes]:
    """The bytes of each record."""
    size, everything = records.dtype.itemsize, records.tobytes()
    return [everything[start : start + size] for start in range(0, len(everything), size)]


def _index(connection: psycopg.Connection[Any], generation: int, column: str, dim: int) -> None:
    # A column without a dimension cannot be indexed; an expression index on the cast can.
    statement = sql.SQL(
        "create index {} on {} using hnsw (({}::halfvec({})) halfvec_ip_ops) with (m = {}, ef_construction = {})"
    )
    connection.execute(
        statement.format(
            sql.Identifier(f"item_embeddings_g{generation}_{column}_hnsw"),
            partition("item_embeddings", generation),
            sql.Identifier(column),
            sql.Literal(dim),
            sql.Literal(HNSW_M),
            sql.Literal(HNSW_EF_CONSTRUCTION),
        )
    )


def _attach(connection: psycopg.Connection[Any], generation: int, parent: str) -> None:
    for statement in (
        sql.SQL("alter table {table} add primary key ({key})"),
        # A valid check spares ATTACH its scan of the whole table.
        sql.SQL("alter table {table} add constraint generation_check check (generation = {generation})"),
        sql.SQL("alter table {parent} attach partition {table} for values in ({generation})"),
        sql.SQL("alter table {table} drop constraint generation_check"),
        # The parent's triggers come with ATTACH; one on a whole statement does not.
        sql.SQL(
            "create trigger {parent_name} before truncate on {table} for each statement"
            " execute function refuse_truncation()"
        ),
        sql.SQL("analyze {table}"),
    ):
        connection.execute(
            statement.format(
                table=partition(parent, generation),
                parent=sql.Identifier(SCHEMA, parent),
                parent_name=sql.Identifier(f"{parent}_kept_whole"),
                key=_names(KEYS[parent]),
                generation=sql.Literal(generation),
            )
        )


def _names(columns: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, columns))


def store_tower(
    connection: psycopg.Connection[Any], generation: int, part: str, weights: bytes, config: dict[str, Any]
) -> None:
    """Keeps an exported tower (safetensors bytes and its configuration) with its generation."""
    connection.execute(
        "insert into towers (generation, part, weights, config) values (%s, %s, %s, %s)",
        [generation, part, weights, Jsonb(config)],
    )
