"""What one HTTP request costs: CPU time of the server, p50 beside four plain pgvector queries, and what HTTP adds.

    python -m benchmarks.request                             # 200,000 items × 64, K = 4, k = 100; this tree
    python -m benchmarks.request --trees ../before .         # two checkouts, asked in turn: the same load for both

Blocks of twenty questions go to each contestant in turn; a server is asked for whole answers, and for ids and scores
alone. "inside" is the mean time of its connection, statement and search (/metrics): the rest of a wait is HTTP.
CPU time is that of the server's process; its Postgres session comes to it. It does not count waiting for a core, but a
busy machine's cold caches can double it.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import contestants, retrieval
from benchmarks.built import build, database, load
from polytower.postgres import connect

USERS, BLOCK = 100, 20


def main() -> None:
    """Asks everybody, prints a row each and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--url", help="a database that is filled already, by this benchmark's data")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url = arguments.url
        if url is None:
            url = stack.enter_context(database(retrieval.NAME))
            load(url, users=arguments.items // 5, items=arguments.items)
            build(url, dim=64, interests=4)
        with connect(url) as connection:
            (generation,) = connection.execute("select generation from live_generation").fetchone() or (0,)
            task = contestants.task(connection, url, generation, users=USERS, k=100)
        *_, plain = contestants.of_postgres(task)
        servers = {str(tree): stack.enter_context(_server(task, tree)) for tree in arguments.trees}
        asked: dict[str, tuple[Any, psutil.Process | None]] = {
            "four plain queries": (stack.enter_context(plain.open()), None)
        }
        for tree, (port, process) in servers.items():
            for what, extra in (("", {}), (", found_by left out", {"found_by": False})):
                session = stack.enter_context(contestants.over_http(task, port, extra))
                asked[tree + what] = session, process
        rows = _rows(asked, arguments.rounds)
        inside = {tree: _inside(port) for tree, (port, _) in servers.items()}
    for row in rows:
        print(f"{row['who']:32s} p50 {row['p50_ms']:7.2f} ms   of plain {row['of_plain']:.3f}   CPU {row['cpu_ms']} ms")
    for tree, milliseconds in inside.items():
        print(f"{tree:32s} inside {milliseconds:.2f} ms")
    print(json.dumps({"load": os.getloadavg(), "rows": rows, "inside_ms": inside}))


def _rows(asked: dict[str, tuple[Any, psutil.Process | None]], rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {who: [] for who in asked}
    used = dict.fromkeys(asked, 0.0)
    for turn in range(-1, rounds):  # the first turn warms up
        for first in range(0, USERS, BLOCK):
            for who, (ask, process) in asked.items():
                before = _cpu(process)
                for user in range(first, first + BLOCK):
                    started = time.perf_counter()
                    ask(user)
                    seconds[who] += [time.perf_counter() - started] if turn >= 0 else []
                used[who] += _cpu(process) - before if turn >= 0 else 0
    plain = np.median(seconds["four plain queries"])
    return [
        {
            "who": who,
            "p50_ms": round(float(np.median(times)) * 1e3, 2),
            "of_plain": round(float(np.median(times) / plain), 3),
            "cpu_ms": round(used[who] / len(times) * 1e3, 2) or None,
        }
        for who, times in seconds.items()
    ]


def _inside(port: int) -> float:
    """Milliseconds that a question spent on its connection, its statement and its search, in the mean."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()

    def total(name: str, stage: str) -> float:
        found = re.search(rf'^polytower_stage_seconds_{name}\{{stage="{stage}"\}} (\S+)', text, re.MULTILINE)
        assert found is not None, f"/metrics has no stage {stage}"
        return float(found[1])

    means = (total("sum", stage) / total("count", stage) for stage in ("pool", "state", "search"))
    return round(sum(means) * 1e3, 2)


def _cpu(process: psutil.Process | None) -> float:
    times = None if process is None else process.cpu_times()
    return 0.0 if times is None else times.user + times.system


@contextmanager
def _server(task: contestants.Task, tree: Path) -> Iterator[tuple[int, psutil.Process]]:
    """`polytower serve` of a checkout, once its index is loaded."""
    port = contestants._free_port()
    environment = {**contestants._environment(task.url), "PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, "-m", "polytower.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, env=environment, cwd=tree, stderr=subprocess.DEVNULL)
    try:
        contestants._wait(process, port, len(task.vectors))
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
