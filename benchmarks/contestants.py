"""Who is compared in benchmarks/retrieval.py: each answers the k best items over a user's K interests.

Peers sit in the optional extra `bench`; one that is not installed is left out by name. Every peer is asked as its
documentation says, for k items per interest, merged in Python by best score; its one search width is set to the first
step of its ladder that reaches the recall objective (WIDTHS).
"""

import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import orjson
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector
from psycopg import sql

from polytower.postgres import connect
from serving import queries
from serving.question import Interests, Question

Floats = NDArray[np.float32]
Answer = Callable[[int], list[str]]
WIDTHS = (10, 20, 40, 60, 100, 160, 250, 400)


@dataclass(frozen=True)
class Task:
    """One catalogue and its questions, as a built generation has them.

    url: of the database. vectors: [items, D], item_ids beside; tastes: [users, K, D], user_ids beside. seen: of each
    user, rows of the items. rare: bool [items], what the filter leaves.
    """

    url: str
    generation: int
    item_ids: list[str]
    vectors: Floats
    user_ids: list[str]
    tastes: Floats
    seen: list[list[int]]
    rare: NDArray[np.bool_]
    k: int

    def halves(self, user: int) -> list[HalfVector]:
        """The user's interests as Postgres takes them."""
        return [HalfVector(row) for row in self.tastes[user]]


@dataclass(frozen=True)
class Contestant:
    """name as printed. open: a client's own session; pid: the process that holds the index, None for this one.

    measured: whether its memory is one process's (Postgres' is shared by sessions).
    """

    name: str
    open: Callable[[], Any]
    pid: int | None = None
    filtered: bool = False
    measured: bool = True
    note: str = ""


def task(connection: psycopg.Connection[Any], url: str, generation: int, *, users: int, k: int) -> Task:
    """Reads a generation's vectors, exactly as they are stored, and so many users' interests as questions."""
    with connection.cursor("items", binary=True) as cursor:
        cursor.itersize = 10_000
        cursor.execute(
            "select item_id, embedding, attributes @> '{\"rare\": true}' from item_embeddings"
            " join items using (item_id) where generation = %s order by item_id",
            [generation],
        )
        items = [(item_id, vector.to_numpy().astype(np.float32), rare) for item_id, vector, rare in cursor]
    tastes = connection.execute(
        "select user_id, array_agg(embedding order by interest) from user_interests where generation = %(generation)s"
        " group by user_id order by md5(user_id) limit %(users)s",
        {"generation": generation, "users": users},
    ).fetchall()
    row = {item_id: n for n, (item_id, _, _) in enumerate(items)}
    seen = dict(
        connection.execute(
            "select user_id, array_agg(distinct item_id) from interactions where user_id = any(%s) group by user_id",
            [[user_id for user_id, _ in tastes]],
        ).fetchall()
    )
    return Task(
        url,
        generation,
        list(row),
        np.stack([vector for _, vector, _ in items]),
        [user_id for user_id, _ in tastes],
        np.stack([[vector.to_numpy().astype(np.float32) for vector in interests] for _, interests in tastes]),
        [[row[item_id] for item_id in seen[user_id]] for user_id, _ in tastes],
        np.array([rare for _, _, rare in items]),
        k,
    )


def merged(lists: Sequence[tuple[Sequence[Any], Sequence[float]]], k: int) -> list[Any]:
    """Best score of each, best first: what every user of a plain vector index writes."""
    best: dict[Any, float] = {}
    for items, scores in lists:
        for item, score in zip(items, scores, strict=True):
            best[item] = max(score, best.get(item, score))
    return sorted(best, key=lambda item: (-best[item], item))[:k]


def of_postgres(task: Task) -> Iterator[Contestant]:
    """polytower's SQL, and plain pgvector queries on the same index."""

    @contextmanager
    def by_vectors(wanted: Mapping[str, Any]) -> Iterator[Answer]:
        with connect(task.url, autocommit=True) as connection:

            def answer(user: int) -> list[str]:
                vectors = task.tastes[user]
                question = Question(vectors=vectors.tolist(), k=task.k, filter=wanted)
                interests = Interests("given", vectors, None, range(len(vectors)))
                parameters = queries.search_parameters(question, interests, None)
                with connection.cursor(binary=True) as cursor:
                    return [row[0] for row in cursor.execute(queries.CANDIDATES_BY_VECTORS, parameters).fetchall()]

            yield answer

    @contextmanager
    def plain() -> Iterator[Answer]:
        statement = sql.SQL(
            "select item_id, -(embedding::halfvec({dim}) <#> %(vector)b) as score from {table}"
            " order by embedding::halfvec({dim}) <#> %(vector)b limit %(k)s"
        ).format(dim=sql.Literal(task.vectors.shape[1]), table=sql.Identifier(f"item_embeddings_g{task.generation}"))
        with connect(task.url, autocommit=True) as connection:
            connection.execute("select set_config('hnsw.ef_search', %(k)s, false)", {"k": str(task.k)})

            def answer(user: int) -> list[str]:
                lists = []
                for vector in task.halves(user):
                    rows = connection.execute(statement, {"vector": vector, "k": task.k}).fetchall()
                    lists.append(([row[0] for row in rows], [row[1] for row in rows]))
                return merged(lists, task.k)

            yield answer

    yield Contestant("polytower SQL", lambda: by_vectors({}), measured=False)
    yield Contestant("polytower SQL, 2 % filter", lambda: by_vectors({"rare": True}), filtered=True, measured=False)
    yield Contestant("plain pgvector queries, merged in Python", plain, measured=False)


@contextmanager
def served(task: Task) -> Iterator[list[Contestant]]:
    """polytower's HTTP server, a process of its own, with its index in memory loaded."""
    with tempfile.TemporaryFile() as log:
        port = _free_port()
        program = "from polytower.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", program, "serve", "--port", str(port)],
            stderr=log,
            env=_environment(task.url),
        )
        try:
            _wait(process, port, len(task.vectors))
            names = {
                "polytower HTTP": {},
                "polytower HTTP, found_by left out": {"found_by": False},
                "polytower HTTP, 2 % filter": {"filter": {"rare": True}},
                "polytower HTTP, seen excluded": {"exclude_seen": True},
            }
            yield [
                Contestant(
                    name, lambda extra=extra: over_http(task, port, extra), process.pid, filtered="filter" in extra
                )
                for name, extra in names.items()
            ]
        finally:
            process.terminate()
            process.wait()


@contextmanager
def over_http(task: Task, port: int, extra: Mapping[str, Any]) -> Iterator[Answer]:
    """One client of a served polytower, on one connection. extra: fields of every question."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def answer(user: int) -> list[str]:
        body = json.dumps({"user_id": task.user_ids[user], "k": task.k, "exclude_seen": False, **extra})
        try:
            connection.request("POST", "/v1/retrieve", body, {"content-type": "application/json"})
            response = connection.getresponse()
        except ConnectionError:  # kept alive for five seconds; another contestant may take longer than that
            connection.close()
            connection.request("POST", "/v1/retrieve", body, {"content-type": "application/json"})
            response = connection.getresponse()
        found = orjson.loads(response.read())  # as polytower's own client does
        if response.status != 200:
            raise RuntimeError(f"the server answers {response.status}: {found}")
        return [row["item_id"] for row in found["candidates"]]

    try:
        yield answer
    finally:
        connection.close()


def _environment(url: str) -> dict[str, str]:
    import os

    return {**os.environ, "POLYTOWER_DATABASE_URL": url}


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", port: int, items: int) -> None:
    loaded = re.compile(r'^polytower_index\{what="items"\} (\S+)', re.MULTILINE)
    for _ in range(1200):
        time.sleep(0.5)
        if process.poll() is not None:
            raise RuntimeError("the server did not start; run `polytower serve` to see why")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", "/metrics")
            found = loaded.search(connection.getresponse().read().decode())
            if found and float(found[1]) == items:  # a million is written 1e+06 there
                return
        except OSError:
            continue
        finally:
            connection.close()
    raise RuntimeError("the server's index was not loaded in ten minutes")


def exact(task: Task) -> Contestant:
    """A matrix product over everything."""

    @contextmanager
    def opened() -> Iterator[Answer]:
        def answer(user: int) -> list[str]:
            scores = (task.vectors @ task.tastes[user].T).max(axis=1)
            top = np.argpartition(-scores, task.k)[: task.k]
            return [task.item_ids[n] for n in top[np.argsort(-scores[top])]]

        yield answer

    return Contestant("exact numpy", opened)


Search = Callable[[Floats, int], list[tuple[Sequence[int], Sequence[float]]]]


def _contestant(name: str, task: Task, search: Search, objective: float) -> Contestant:
    """A library as a contestant, at the first width that reaches the objective over twenty users."""
    truth = [_truth(task, user) for user in range(min(20, len(task.tastes)))]
    for width in WIDTHS:
        found = [merged(search(task.tastes[user], width), task.k) for user in range(len(truth))]
        recall = np.mean([len({*f} & t) / len(t) for f, t in zip(found, truth, strict=True)])
        if recall >= objective:
            break

    @contextmanager
    def opened() -> Iterator[Answer]:
        yield lambda user: [task.item_ids[n] for n in merged(search(task.tastes[user], width), task.k)]

    return Contestant(name, opened, note=f"width {width}")


def _truth(task: Task, user: int) -> set[int]:
    scores = (task.vectors @ task.tastes[user].T).max(axis=1)
    return {*np.argpartition(-scores, task.k)[: task.k].tolist()}


def faiss(task: Task, objective: float, _folder: str) -> Contestant:
    """HNSW in process, nothing stored."""
    import faiss

    index = faiss.IndexHNSWFlat(task.vectors.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 64
    index.add(task.vectors)

    def search(interests: Floats, width: int) -> list[tuple[Sequence[int], Sequence[float]]]:
        parameters: Any = faiss.SearchParametersHNSW()
        parameters.efSearch = max(width, task.k)
        scores, items = index.search(interests, task.k, params=parameters)
        return list(zip(items.tolist(), scores.tolist(), strict=True))

    return _contestant("faiss HNSW, in process", task, search, objective)


def usearch(task: Task, objective: float, _folder: str) -> Contestant:
    """HNSW of 16-bit vectors in process, nothing stored."""
    from usearch.index import Index

    index = Index(ndim=task.vectors.shape[1], metric="ip", dtype="f16", connectivity=16, expansion_add=64)
    index.add(np.arange(len(task.vectors)), task.vectors)

    def search(interests: Floats, width: int) -> list[tuple[Sequence[int], Sequence[float]]]:
        index.expansion_search = max(width, task.k)
        found = index.search(interests, task.k, threads=1)
        # One question's answer has one dimension less.
        keys, distances = np.atleast_2d(found.keys), np.atleast_2d(found.distances)
        return list(zip(keys.tolist(), (-distances).tolist(), strict=True))

    return _contestant("usearch f16, in process", task, search, objective)


def lancedb(task: Task, objective: float, folder: str) -> Contestant:
    """Embedded and durable; IVF_HNSW_SQ, refined."""
    import lancedb
    import pyarrow as pa

    dim = task.vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(task.vectors.ravel()), dim)
    table = lancedb.connect(folder).create_table(
        "items", pa.table({"number": pa.array(range(len(task.vectors)), pa.int64()), "vector": column})
    )
    table.create_index(metric="dot", vector_column_name="vector", index_type="IVF_HNSW_SQ")

    def search(interests: Floats, width: int) -> list[tuple[Sequence[int], Sequence[float]]]:
        lists = []
        for interest in interests:
            question = table.search(interest).limit(task.k).ef(max(width, 2 * task.k)).refine_factor(2)
            found = question.select(["number", "_distance"]).to_arrow()
            lists.append((found["number"].to_pylist(), [-d for d in found["_distance"].to_pylist()]))
        return lists

    return _contestant("LanceDB IVF_HNSW_SQ, embedded", task, search, objective)


def chroma(task: Task, objective: float, folder: str) -> Contestant:
    """Embedded and durable; HNSW."""
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(folder, settings=Settings(anonymized_telemetry=False))

    def collection(width: int) -> Any:
        configuration = {"hnsw": {"space": "ip", "ef_construction": 64, "max_neighbors": 16, "ef_search": width}}
        return client.get_or_create_collection("items", configuration=configuration, embedding_function=None)

    made = collection(task.k)
    for start in range(0, len(task.vectors), 5000):
        rows = task.vectors[start : start + 5000]
        made.add(ids=[str(n) for n in range(start, start + len(rows))], embeddings=rows)

    def search(interests: Floats, _width: int) -> list[tuple[Sequence[int], Sequence[float]]]:
        found = made.query(query_embeddings=interests, n_results=task.k, include=["distances"])
        return [
            ([int(n) for n in ids], [-d for d in distances])
            for ids, distances in zip(found["ids"], found["distances"], strict=True)
        ]

    return _contestant("Chroma HNSW, embedded", task, search, objective)


def milvus(task: Task, objective: float, folder: str) -> Contestant:
    """Milvus Lite: embedded and durable; its one index for a file of this kind, scanned."""
    from pymilvus import MilvusClient

    client = MilvusClient(folder + "/items.db")
    client.create_collection("items", dimension=task.vectors.shape[1], metric_type="IP", auto_id=False)
    for start in range(0, len(task.vectors), 10_000):
        rows = task.vectors[start : start + 10_000]
        client.insert("items", [{"id": start + n, "vector": row} for n, row in enumerate(rows.tolist())])

    def search(interests: Floats, _width: int) -> list[tuple[Sequence[int], Sequence[float]]]:
        found = client.search("items", data=interests.tolist(), limit=task.k)
        return [([hit["id"] for hit in hits], [hit["distance"] for hit in hits]) for hits in found]

    return _contestant("Milvus Lite, embedded", task, search, objective)


# module that has to be there → contestant
PEERS: dict[str, tuple[str, Callable[[Task, float, str], Contestant]]] = {
    "faiss": ("faiss", faiss),
    "usearch": ("usearch", usearch),
    "lancedb": ("lancedb", lancedb),
    "chroma": ("chromadb", chroma),
    "milvus": ("milvus_lite", milvus),
}


def installed(name: str) -> bool:
    """Whether a peer's package is there."""
    return find_spec(PEERS[name][0]) is not None
