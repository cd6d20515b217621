"""Erasure: everything that is known of a user, or an item, taken out of the database and the checkpoints.

One transaction, behind the locks of loading, encoding, sequences and building: nobody writes what is being removed. A
list of the forgotten (hashes, no ids) keeps loads and posts from bringing it back.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, LiteralString

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from feature_repo.modalities import MODALITIES
from pipelines.generation import lifecycle, seal, training_folder
from pipelines.generation.training import forget_in_snapshots
from polytower import locks
from polytower.settings import settings

EntityName = Literal["user", "item"]

REMEMBER = """
insert into forgotten (entity, digest) values (%(entity)s, sha256(convert_to(%(id)s, 'UTF8')))
on conflict (entity, digest) do update set forgotten_at = now()
"""
LIFT = "delete from forgotten where entity = %(entity)s and digest = sha256(convert_to(%(id)s, 'UTF8'))"

# Table -> the column that names the entity. Of all of them, rows go whole.
TABLES: dict[EntityName, dict[str, str]] = {
    "user": {
        "interactions": "user_id", "user_sequences": "user_id", "user_stats": "user_id", "user_interests": "user_id",
        "users": "user_id", "rejected_rows": "value",
    },
    "item": {
        "interactions": "item_id", "item_stats": "item_id", "item_embeddings": "item_id",
        "content_embeddings": "item_id", "content_codes": "item_id", "semantic_ids": "item_id", "items": "item_id",
        "rejected_rows": "value",
    },
}  # fmt: skip
# An item's places in the sequences of users; an emptied sequence goes.
CUT_SEQUENCES = """
with cut as (
    select s.user_id, s.day, kept.* from user_sequences s cross join lateral (
        select coalesce(array_agg(i order by n), '{}') as item_ids, coalesce(array_agg(t order by n), '{}') as times,
               coalesce(array_agg(k order by n), '{}') as kinds,
               -- none is listed where no event has any
               coalesce(array_agg(q order by n) filter (where q is not null), '{}') as queries
        from unnest(s.item_ids, s.occurred_ats, s.kinds, s.queries) with ordinality e (i, t, k, q, n) where i <> %(id)s
    ) kept where s.user_id = any(%(users)s) and %(id)s = any(s.item_ids)
)
update user_sequences s set item_ids = cut.item_ids, occurred_ats = cut.times, kinds = cut.kinds,
    queries = case when array_remove(cut.queries, '') = '{}' then '{}' else cut.queries end
from cut where s.user_id = cut.user_id and s.day = cut.day
"""
EMPTY_SEQUENCES = "delete from user_sequences where user_id = any(%(users)s) and item_ids = '{}'"
WRITERS = (*MODALITIES, "queries")
# What only these events were searched by.
QUERIES = "select distinct query_key(query) from interactions where {} = %(id)s and query_key(query) is not null"
DROP_QUERIES = """
delete from query_embeddings q where q.query_key = any(%(keys)s)
    and not exists (select from interactions i where query_key(i.query) = q.query_key)
"""
MET_BY = "select distinct user_id from interactions where item_id = %(id)s"
GENERATIONS = "select generation, quality -> 'seal' from generations where quality ? 'seal'"
RESEAL = "update generations set quality = jsonb_set(quality, '{seal}', %s) where generation = %s"


@dataclass(frozen=True)
class Erasure:
    """What was removed: {place: rows}. remaining: what `proof`, a query that anybody may run, finds now."""

    entity: EntityName
    removed: dict[str, int]
    remaining: dict[str, int]
    proof: str

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return asdict(self)


def forget(connection: psycopg.Connection[Any], entity: EntityName, entity_id: str) -> Erasure:
    """Removes a user, or an item, everywhere; one that nobody knows is put on the list all the same.

    Events of others stay, as do the trained weights: they hold no row of a user; an item's goes with the next training.
    """
    connection.commit()
    with connection.transaction():
        for lock in (locks.LOAD, *(f"polytower.encode.{name}" for name in WRITERS), locks.SEQUENCES, locks.BUILD):
            locks.wait_in_transaction(connection, lock)
        values = {"id": entity_id, "entity": entity}
        connection.execute(REMEMBER, values)
        lifecycle.amends(connection)
        _seal_again(connection, entity, entity_id)
        users = [row[0] for row in connection.execute(MET_BY, values)] if entity == "item" else []
        keys = [row[0] for row in connection.execute(sql.SQL(QUERIES).format(sql.Identifier(f"{entity}_id")), values)]
        removed = {
            table: connection.execute(_statement("delete from {} where {} = %(id)s", table, column), values).rowcount
            for table, column in TABLES[entity].items()
        }
        if entity == "item":
            removed["places in user_sequences"] = connection.execute(CUT_SEQUENCES, {**values, "users": users}).rowcount
            connection.execute(EMPTY_SEQUENCES, {"users": users})
        removed["query_embeddings"] = connection.execute(DROP_QUERIES, {"keys": keys}).rowcount if keys else 0
        # Inside: where the files cannot be written, nothing is removed anywhere.
        removed["checkpoints"] = forget_in_snapshots(entity, entity_id)
        removed["training sets"] = training_folder.clear(settings().training_sets_dir)
    return Erasure(entity, removed, remaining(connection, entity, entity_id), proof(connection, entity, entity_id))


def lift(connection: psycopg.Connection[Any], entity: EntityName, entity_id: str) -> bool:
    """Takes an id off the list, so that loads and posts may bring it again; False where it was not on it."""
    lifted = connection.execute(LIFT, {"id": entity_id, "entity": entity}).rowcount > 0
    connection.commit()
    return lifted


def remaining(connection: psycopg.Connection[Any], entity: EntityName, entity_id: str) -> dict[str, int]:
    """{place: rows} that still name it."""
    return dict(connection.execute(_proof(entity, entity_id)).fetchall())


def proof(connection: psycopg.Connection[Any], entity: EntityName, entity_id: str) -> str:
    """The query behind `remaining`, to be run anywhere."""
    return _proof(entity, entity_id).as_string(connection)


def _proof(entity: EntityName, entity_id: str) -> sql.Composed:
    parts = [
        sql.SQL("select {}, count(*) from polytower.{} where {} = {}").format(
            sql.Literal(table), sql.Identifier(table), sql.Identifier(column), sql.Literal(entity_id)
        )
        for table, column in TABLES[entity].items()
    ]
    if entity == "item":
        parts.append(
            sql.SQL("select 'places in user_sequences', count(*) from polytower.user_sequences"
                    " where {} = any(item_ids)").format(sql.Literal(entity_id))
        )  # fmt: skip
    return sql.SQL(" union all ").join(parts)


def _seal_again(connection: psycopg.Connection[Any], entity: EntityName, entity_id: str) -> None:
    """Promotion will look for the generations as they are without the rows that go."""
    table = "user_interests" if entity == "user" else "item_embeddings"
    for generation, sealed in connection.execute(GENERATIONS).fetchall():
        if table in sealed and lifecycle.has_partitions(connection, generation):
            left = seal.without(connection, sealed, table, generation, entity_id)
            if left != sealed:
                connection.execute(RESEAL, [Jsonb(left), generation])


def _statement(statement: LiteralString, table: str, column: str) -> sql.Composed:
    return sql.SQL(statement).format(sql.Identifier(table), sql.Identifier(column))
