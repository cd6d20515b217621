"""What the feature benchmark writes and reads: users with sequences and statistics, items with embeddings."""

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from benchmarks.generated import item_id, user_id
from feature_repo.schema import ITEM_ID, SEQUENCE_LENGTH, USER_ID

ROWS = 2000
DIM = 64

Row = tuple[EntityKey, dict[str, ValueProto], datetime, None]


def sequence_rows() -> list[Row]:
    random, day = Random(0), datetime(2026, 1, 1, tzinfo=UTC)
    rows = []
    for user in range(ROWS):
        length = random.randint(1, SEQUENCE_LENGTH)
        micros = [int(day.timestamp() + 60 * step) * 1_000_000 for step in range(length)]
        values = {
            "item_ids": ValueProto(
                string_list_val=StringList(val=[item_id(random.randrange(10**5)) for _ in micros]),
            ),
            "occurred_ats": ValueProto(int64_list_val=Int64List(val=micros)),
            "kinds": ValueProto(string_list_val=StringList(val=random.choices(["view", "cart", "buy"], k=length))),
            "queries": ValueProto(string_list_val=StringList()),
        }
        rows.append((_key(USER_ID, user_id(user)), values, day + timedelta(minutes=length), None))
    return rows


def stats_rows() -> list[Row]:
    random, day = Random(1), datetime(2026, 1, 1, tzinfo=UTC)
    first = int(day.timestamp()) * 1_000_000
    return [
        (
            _key(USER_ID, user_id(user)),
            {
                "user_interactions": ValueProto(int64_val=random.randrange(1000)),
                "user_distinct_items": ValueProto(int64_val=random.randrange(500)),
                "user_mean_value": ValueProto(double_val=random.random()),
                "user_first_at": ValueProto(int64_val=first),
            },
            day + timedelta(minutes=user),
            None,
        )
        for user in range(ROWS)
    ]


def embedding_rows(connection: psycopg.Connection[Any]) -> list[Row]:
    """What the live generation holds: unit vectors in half precision, which both stores hold exactly."""
    now = datetime.now(UTC)
    names = ("embedding", "content_embedding", "id_embedding")
    stored = connection.execute(
        "select item_id, generation, embedding::real[], content_embedding::real[], id_embedding::real[]"
        " from item_embeddings where generation = (select generation from live_generation) order by item_id"
    ).fetchall()
    return [
        (
            _key(ITEM_ID, item),
            {
                **{name: _floats(vector) for name, vector in zip(names, vectors, strict=True)},
                "embedding_generation": ValueProto(int64_val=generation),
            },
            now,
            None,
        )
        for item, generation, *vectors in stored
    ]


def _floats(vector: list[float] | None) -> ValueProto:
    return ValueProto() if vector is None else ValueProto(float_list_val=FloatList(val=vector))


def _key(name: str, value: str) -> EntityKey:
    return EntityKey(join_keys=[name], entity_values=[ValueProto(string_val=value)])
