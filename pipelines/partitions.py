"""A generation's two tables: filled by binary COPY, then indexed, keyed, analysed and attached, in this order.

Inserting into a live HNSW index was measured six times slower than building it after the load.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from feature_repo.schema import SCHEMA, SPACES
from pipelines.generations import PARENTS, get, partition

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
KEYS = {"item_embeddings": ("generation", "item_id"), "user_interests": ("generation", "user_id", "interest")}

Rows = Iterable[tuple[Any, ...]]


def fill(connection: psycopg.Connection[Any], generation: int, items: Rows, interests: Rows) -> dict[str, int]:
    """Writes a generation's two partitions in one transaction and returns the row counts by table.

    items: (item_id, embedding, content_embedding | None, id_embedding | None), vectors as pgvector HalfVector of unit
    length; interests: (user_id, interest, embedding, weight, as_of, events).
    """
    dim = get(connection, generation).dim
    # All three index builds fit in memory at a million items; two workers were measured 1.5 times as fast as one.
    connection.execute("set local max_parallel_maintenance_workers = 2")
    counts = {
        parent: _copy(connection, generation, parent, rows)
        for parent, rows in zip(PARENTS, (items, interests), strict=True)
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


def _copy(connection: psycopg.Connection[Any], generation: int, parent: str, rows: Rows) -> int:
    table = partition(parent, generation)
    connection.execute(
        sql.SQL("create table {} (like {} including defaults)").format(table, sql.Identifier(SCHEMA, parent))
    )
    columns = COLUMNS[parent]
    names = _names(("generation", *columns))
    count = 0
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("copy {} ({}) from stdin (format binary)").format(table, names)) as copy,
    ):
        copy.set_types(("int8", *columns.values()))
        for row in rows:
            copy.write_row((generation, *row))
            count += 1
    return count


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
        sql.SQL("analyze {table}"),
    ):
        connection.execute(
            statement.format(
                table=partition(parent, generation),
                parent=sql.Identifier(SCHEMA, parent),
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
