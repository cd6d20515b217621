"""Writes a synthetic generation straight into the tables: partitions, HNSW indexes, promotion. No tower is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector
from psycopg import sql
from psycopg.types.json import Jsonb

Floats = NDArray[np.float32]

AS_OF = datetime(2026, 1, 1, tzinfo=UTC)
RAW_REVISION = "synthetic"
ITEM_SPACES = ("embedding", "content_embedding", "id_embedding")


@dataclass(frozen=True)
class Synthetic:
    """One generation's worth of data. V items, U users, K interests, D dimensions.

    embedding, content, identity: [V, D]; content and identity default to the item embedding.
    interests: user id → [K, D]; weights: user id → [K], default equal.
    raw: modality → [V, E], what its encoder made of the items; a row of zeros for an item without such content.
    seen: user id → item ids, oldest first, at one-minute distance, the newest one minute before AS_OF.
    """

    item_ids: Sequence[str]
    embedding: Floats
    interests: Mapping[str, Floats] = field(default_factory=dict)
    weights: Mapping[str, Sequence[float]] = field(default_factory=dict)
    content: Floats | None = None
    identity: Floats | None = None
    attributes: Sequence[Mapping[str, Any]] | None = None
    unavailable: frozenset[str] = frozenset()
    seen: Mapping[str, Sequence[str]] = field(default_factory=dict)
    raw: Mapping[str, Floats] = field(default_factory=dict)


def write_generation(
    connection: psycopg.Connection[Any], data: Synthetic, *, live: bool = True, index: bool = True
) -> int:
    """Writes items, interactions, embeddings and interests; answers the generation's id. Commits nothing itself.

    index=False leaves the HNSW indexes out (small catalogues are scanned anyway).
    """
    _write_items(connection, data)
    _write_interactions(connection, data)
    for modality, vectors in data.raw.items():
        write_raw(connection, modality, data.item_ids, vectors)
    width = max((len(rows) for rows in data.interests.values()), default=1)
    row = connection.execute(
        "insert into generations (dim, interests, config, state, ready_at)"
        " values (%(dim)s, %(interests)s, %(config)s, 'ready', now()) returning generation",
        {
            "dim": data.embedding.shape[1],
            "interests": width,
            "config": Jsonb({"preset": "synthetic", "encoders": dict.fromkeys(data.raw, RAW_REVISION)}),
        },
    ).fetchone()
    assert row is not None
    generation = int(row[0])
    # Made and then attached, as the real build does: readers of the generation before are not locked out.
    tables = {"item_embeddings": _copy_items, "user_interests": _copy_interests}
    for parent, copy in tables.items():
        names = {"table": sql.Identifier(f"{parent}_g{generation}"), "parent": sql.Identifier("polytower", parent)}
        connection.execute(sql.SQL("create table {table} (like {parent} including all)").format(**names))
        copy(connection, data, generation)
        if index and parent == "item_embeddings":
            create_indexes(connection, generation, data.embedding.shape[1])
        statement = sql.SQL("alter table {parent} attach partition {table} for values in ({value})")
        connection.execute(statement.format(**names, value=sql.Literal(generation)))
    connection.execute(sql.SQL("analyze {}").format(sql.Identifier(f"item_embeddings_g{generation}")))
    connection.execute("analyze items")
    if live:
        promote(connection, generation)
    return generation


def create_indexes(
    connection: psycopg.Connection[Any], generation: int, dim: int, spaces: Sequence[str] = ITEM_SPACES
) -> None:
    """HNSW on each space, as the real build does after its load."""
    table = f"item_embeddings_g{generation}"
    for column in spaces:
        connection.execute(
            sql.SQL(
                "create index {} on {} using hnsw (({}::halfvec({})) halfvec_ip_ops)"
                " with (m = 16, ef_construction = 64)"
            ).format(
                sql.Identifier(f"{table}_{column}_idx"), sql.Identifier(table), sql.Identifier(column), sql.Literal(dim)
            )
        )


def promote(connection: psycopg.Connection[Any], generation: int) -> None:
    """Makes the generation the live one and retires the one before."""
    connection.execute("update generations set state = 'retired', retired_at = now() where state = 'live'")
    connection.execute(
        "update generations set state = 'live', live_at = now() where generation = %(generation)s",
        {"generation": generation},
    )


def _write_items(connection: psycopg.Connection[Any], data: Synthetic) -> None:
    attributes = data.attributes or [{}] * len(data.item_ids)
    connection.cursor().executemany(
        "insert into items (item_id, title, available, attributes) values (%s, %s, %s, %s) on conflict do nothing",
        [
            (item_id, f"Title {item_id}", item_id not in data.unavailable, Jsonb(dict(row)))
            for item_id, row in zip(data.item_ids, attributes, strict=True)
        ],
    )


def write_raw(
    connection: psycopg.Connection[Any],
    modality: str,
    item_ids: Sequence[str],
    vectors: Floats,
    revision: str = RAW_REVISION,
) -> None:
    """The encoder, in force, and its embeddings [V, E] of the items; none for a row of zeros."""
    cursor = connection.cursor()
    cursor.execute(
        "insert into content_encoders (modality, revision, model, dim, active) values (%s, %s, %s, %s, true)"
        " on conflict do nothing",
        [modality, revision, f"synthetic {modality}", vectors.shape[1]],
    )
    cursor.executemany(
        "insert into content_embeddings (item_id, modality, revision, content_hash, embedding)"
        " values (%s, %s, %s, '', %s) on conflict do nothing",
        [
            (item_id, modality, revision, HalfVector(row))
            for item_id, row in zip(item_ids, vectors, strict=True)
            if row.any()
        ],
    )


def _write_interactions(connection: psycopg.Connection[Any], data: Synthetic) -> None:
    connection.execute("select ensure_interactions_year(2025)")
    base = AS_OF.timestamp()
    rows = [
        (user_id, item_id, datetime.fromtimestamp(base - 60 * (len(items) - n), UTC))
        for user_id, items in data.seen.items()
        for n, item_id in enumerate(items)
    ]
    cursor = connection.cursor()
    cursor.executemany(
        "insert into interactions (user_id, item_id, occurred_at) values (%s, %s, %s) on conflict do nothing", rows
    )
    users = sorted({*data.seen, *data.interests})
    cursor.executemany("insert into users (user_id) values (%s) on conflict do nothing", [(user,) for user in users])


def _copy_items(connection: psycopg.Connection[Any], data: Synthetic, generation: int) -> None:
    spaces = [np.asarray(data.embedding if a is None else a) for a in (data.embedding, data.content, data.identity)]
    statement = sql.SQL(
        "copy {} (generation, item_id, embedding, content_embedding, id_embedding) from stdin (format binary)"
    )
    with connection.cursor().copy(statement.format(sql.Identifier(f"item_embeddings_g{generation}"))) as copy:
        copy.set_types(["int8", "text", "halfvec", "halfvec", "halfvec"])
        for n, item_id in enumerate(data.item_ids):
            copy.write_row((generation, item_id, *(HalfVector(rows[n]) for rows in spaces)))


def _copy_interests(connection: psycopg.Connection[Any], data: Synthetic, generation: int) -> None:
    statement = sql.SQL(
        "copy {} (generation, user_id, interest, embedding, weight, as_of, events) from stdin (format binary)"
    ).format(sql.Identifier(f"user_interests_g{generation}"))
    counted = connection.execute("select user_id, count(*) from interactions group by user_id")
    events: dict[str, int] = dict(counted.fetchall())
    with connection.cursor().copy(statement) as copy:
        copy.set_types(["int8", "text", "int2", "halfvec", "float4", "timestamptz", "int8"])
        for user_id, rows in data.interests.items():
            weights = data.weights.get(user_id, [1 / len(rows)] * len(rows))
            for n, (vector, weight) in enumerate(zip(rows, weights, strict=True)):
                copy.write_row(
                    (generation, user_id, n, HalfVector(vector), float(weight), AS_OF, events.get(user_id, 0))
                )


def clustered(
    seed: int, items: int, dim: int, users: int = 20, interests: int = 4, clusters: int = 200
) -> tuple[Floats, dict[str, Floats]]:
    """Unit item vectors [V, D] around cluster centres, and users whose K interests lie in different clusters."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((clusters, dim))
    vectors = unit(centres[random.integers(clusters, size=items)] + 0.9 * random.standard_normal((items, dim)))
    tastes = {
        f"u{n}": unit(
            centres[random.choice(clusters, interests, replace=False)] + 0.5 * random.standard_normal((interests, dim))
        )
        for n in range(users)
    }
    return vectors, tastes


def unit(rows: NDArray[Any]) -> Floats:
    """Rows scaled to length one, as float32."""
    scaled: Floats = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return scaled
