"""Full load on one server for minutes, and whether it grows: latency, refusals and resident memory over time.

    python -m benchmarks.soak --minutes 30

A database of its own is made on the platform's server and dropped afterwards; `polytower serve` runs over it as a
process of its own. Clients (threads of this process) ask without pause: stored interests, histories through the user
tower, batches, neighbours, events, features, bad questions. `--stored` leaves the histories out: then the server must
stay small, since torch is never imported. Growth is the slope of resident memory over the second half, when caches and
pools are full. Writes benchmarks/results/soak.json (soak_stored.json).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.built import build, database
from benchmarks.built import load as load_generated
from benchmarks.generated import item_id, user_id
from polytower.client import Client, ClientError, Interaction, ProblemError, Question

RESULTS = Path(__file__).parent / "results"
NAME = "polytower_bench_soak"
USERS, DIM, INTERESTS = 500, 64, 4
# Of the questions, by kind.
SHARES = {"stored": 0.5, "history": 0.2, "batch": 0.1, "similar": 0.1, "events": 0.04, "features": 0.04, "bad": 0.02}


@dataclass
class Load:
    """What the clients saw. seconds: of every answered request, by kind."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, seconds: float) -> None:
        with self.lock:
            self.seconds.setdefault(kind, []).append(seconds)


def main() -> None:
    """Fills the database, starts the server, drives it, prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--stored", action="store_true", help="no histories: torch is never imported")
    arguments = parser.parse_args()
    with database(NAME) as url:
        load_generated(url, users=max(USERS, arguments.items // 5), items=arguments.items)
        build(url, dim=DIM, interests=INTERESTS)
        with _server(url) as (address, process):
            load = Load()
            samples = _drive(address, process, load, arguments)
    document = _report(load, samples, arguments)
    (RESULTS / f"soak{'_stored' * arguments.stored}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["rows"], indent=1))


@contextmanager
def _server(url: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "POLYTOWER_DATABASE_URL": url}
    started = subprocess.Popen([sys.executable, "-m", "polytower.cli", "serve", "--port", str(port)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        with Client(address, retries=3000, wait=0.2) as client:
            client.ready()
        yield address, psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait(60)


def _drive(
    address: str, process: psutil.Process, load: Load, arguments: argparse.Namespace
) -> list[tuple[float, float]]:
    """(seconds since the start, resident MB) once a second, while the clients ask."""
    end = time.monotonic() + 60 * arguments.minutes
    threads = [
        threading.Thread(target=_client, args=(address, number, end, load, arguments))
        for number in range(arguments.clients)
    ]
    started, samples = time.monotonic(), [(0.0, process.memory_info().rss / 1e6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        samples.append((time.monotonic() - started, process.memory_info().rss / 1e6))
    return samples


def _client(address: str, number: int, end: float, load: Load, arguments: argparse.Namespace) -> None:
    random = np.random.default_rng(number)
    with Client(address, retries=0) as client:
        asks = _questions(client, random, arguments.items)
        shares = np.array([0 if arguments.stored and kind == "history" else SHARES[kind] for kind in asks])
        while time.monotonic() < end:
            kind = str(random.choice(list(asks), p=shares / shares.sum()))
            started = time.perf_counter()
            try:
                asks[kind]()
            except ProblemError as problem:
                load.problems[problem.slug] += 1
            except ClientError as error:
                load.failures[str(error)[:80]] += 1
            load.note(kind, time.perf_counter() - started)


def _questions(client: Client, random: np.random.Generator, items: int) -> dict[str, Callable[[], Any]]:
    def user() -> str:
        return user_id(random.integers(USERS))

    def some(count: int) -> list[str]:
        return [item_id(n) for n in random.integers(items, size=count)]

    return {
        "stored": lambda: client.retrieve(user_id=user(), k=100),
        "history": lambda: client.retrieve(history=some(40), k=100),
        "batch": lambda: client.retrieve_batch([Question(user_id=user(), k=20) for _ in range(8)]),
        "similar": lambda: client.similar(some(1)[0], k=20, filter={"year": {"gte": 2000}}),
        "events": lambda: client.interact([Interaction(user_id=f"new{random.integers(50)}", item_id=some(1)[0])]),
        "features": lambda: client.features("ranker", user_id=[user()] * 20, item_id=some(20)),
        "bad": lambda: client.retrieve(user_id="nobody", k=100),
    }


def _report(load: Load, samples: list[tuple[float, float]], arguments: argparse.Namespace) -> dict[str, Any]:
    elapsed = samples[-1][0]
    rows: list[dict[str, Any]] = [
        {
            "kind": kind,
            "requests": len(seconds),
            "p50_ms": round(float(np.median(seconds)) * 1e3, 2),
            "p99_ms": round(float(np.quantile(seconds, 0.99)) * 1e3, 2),
        }
        for kind, seconds in sorted(load.seconds.items())
    ]
    half = np.array([sample for sample in samples if sample[0] >= elapsed / 2])
    slope = float(np.polyfit(half[:, 0], half[:, 1], 1)[0]) * 600 if len(half) > 2 else 0.0
    rows.append(
        {
            "kind": "memory",
            "mb_by_minute": _by_minute(samples),
            "growth_mb_per_10_min": round(slope, 2),
            "requests_per_s": round(sum(map(len, load.seconds.values())) / elapsed, 1),
            "problems": dict(load.problems),
            "failures": dict(load.failures),
        }
    )
    machine: dict[str, Any] = {
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(),
        **vars(arguments),
    }
    return {"machine": machine, "rows": rows}


def _by_minute(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Resident MB at the start, every five minutes, and at the end."""
    last = samples[-1][0] / 60
    minutes = [0, *range(5, int(last), 5), last]
    nearest = {minute: min(samples, key=lambda sample: abs(sample[0] - 60 * minute)) for minute in minutes}
    return {f"{minute:.3g}": round(megabytes, 1) for minute, (_, megabytes) in nearest.items()}


if __name__ == "__main__":
    main()
