"""What the feature benchmark writes and reads: users with sequences and statistics, items with embeddings."""

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import psycopg
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

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
                string_list_val=StringList(val=[f"item{random.randrange(10**5)}" for _ in micros]),
            ),
            "occurred_ats": ValueProto(int64_list_val=Int64List(val=micros)),
            "kinds": ValueProto(string_list_val=StringList(val=random.choices(["view", "cart", "buy"], k=length))),
        }
        rows.append((_key(USER_ID, f"user{user}"), values, day + timedelta(minutes=length), None))
    return rows


def stats_rows() -> list[Row]:
    random, day = Random(1), datetime(2026, 1, 1, tzinfo=UTC)
    first = int(day.timestamp()) * 1_000_000
    return [
        (
            _key(USER_ID, f"user{user}"),
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


def embedding_rows() -> list[Row]:
    """Unit vectors rounded to half precision, which both stores then hold exactly."""
    vectors_ND = np.random.default_rng(2).normal(size=(ROWS, DIM))
    vectors_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)
    now = datetime.now(UTC)
    return [
        (
            _key(ITEM_ID, f"item{item}"),
            {
                **{name: ValueProto(float_list_val=FloatList(val=vector)) for name in _embedding_names()},
                "embedding_generation": ValueProto(int64_val=1),
            },
            now,
            None,
        )
        for item, vector in enumerate(vectors_ND)
    ]


def fill_embeddings(connection: psycopg.Connection[Any], rows: list[Row]) -> None:
    """A live generation with the same vectors."""
    from pgvector import HalfVector

    connection.execute("insert into generations (state, dim, interests, live_at) values ('live', %s, 1, now())", [DIM])
    connection.execute("insert into promotions (generation) select generation from generations")
    connection.execute("create table item_embeddings_g1 partition of item_embeddings for values in (1)")
    with connection.cursor().copy(
        "copy item_embeddings_g1 (generation, item_id, embedding) from stdin (format binary)"
    ) as copy:
        copy.set_types(["bigint", "text", "halfvec"])
        for key, values, *_ in rows:
            vector = HalfVector(np.array(values["embedding"].float_list_val.val))
            copy.write_row([1, key.entity_values[0].string_val, vector])


def _key(name: str, value: str) -> EntityKey:
    return EntityKey(join_keys=[name], entity_values=[ValueProto(string_val=value)])


def _embedding_names() -> tuple[str, ...]:
    return ("embedding", "content_embedding", "id_embedding")
