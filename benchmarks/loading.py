"""Loading speed and memory on generated interactions.

    python -m benchmarks.loading                      # 10 million rows → benchmarks/results/loading.json
    python -m benchmarks.loading --rows 1000000 --format csv

Generates the folder as a stream, loads it from a process of its own into a fresh embedded Postgres, once and again
(the replay), and prints one JSON line: rows/s from the first byte read to the commit, peak resident memory of the
loading process, and the size of the server's data. Users and items are Zipf-like; times spread over five years.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

import migrations
from pipelines.load.folder import load_folder
from polytower.postgres import EmbeddedPostgres, connect

RESULTS = Path(__file__).parent / "results" / "loading.json"
CHUNK = 250_000
FIRST_SECOND = int(datetime(2019, 7, 1, tzinfo=UTC).timestamp())
SECONDS = 5 * 365 * 86_400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--format", choices=("parquet", "csv", "jsonl"), default="parquet")
    parser.add_argument("--load", nargs=2, metavar=("URL", "DIR"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(options.load[0], Path(options.load[1]))
        return
    with TemporaryDirectory(prefix="polytower-bench-") as home:
        result = run(Path(home), options)
    print(json.dumps(result))
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{options.format} {options.rows}"] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def run(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Generates, loads twice, and answers the figures."""
    folder = home / "data"
    generate(folder, options.rows, options.users, options.items, options.format)
    server = EmbeddedPostgres(home / "postgres")
    url = server.acquire()
    try:
        migrations.upgrade(url)
        first, again = (_in_a_process_of_its_own(url, folder) for _ in range(2))
    finally:
        server.release()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "rows": options.rows,
        "format": options.format,
        "file_mib": round(sum(path.stat().st_size for path in folder.iterdir()) / 2**20),
        "first": first,
        "again": again,
    }


def _in_a_process_of_its_own(url: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.loading", "--load", url, str(folder)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(found.stdout))


def load(url: str, folder: Path) -> None:
    """Loads the folder and prints the figures of this process."""
    started = time.monotonic()
    with connect(url) as connection:
        report = load_folder(connection, folder, progress=sys.stderr.isatty())
        backend = psutil.Process(connection.info.backend_pid).cpu_times()
        size = connection.execute("select pg_database_size(current_database())").fetchone()
    seconds = time.monotonic() - started
    read = report.counts["interactions_read"]
    figures = {
        "new": report.counts["interactions_new"],
        "seconds": round(seconds, 1),
        "interactions_per_second": round(read / seconds),
        # On a machine shared with other work, seconds say little: what the two processes computed says more.
        "cpu_seconds": {"client": round(time.process_time(), 1), "server": round(backend.user + backend.system, 1)},
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "database_mib": round(size[0] / 2**20) if size else None,
    }
    print(json.dumps(figures))


def generate(folder: Path, rows: int, users: int, items: int, file_format: str) -> None:
    """Writes items.parquet and `rows` interactions, chunk by chunk."""
    folder.mkdir(parents=True)
    catalogue = {
        "item_id": [f"item-{i}" for i in range(items)],
        "title": [f"Title of item {i}" for i in range(items)],
        "genre": [f"genre {i % 23}" for i in range(items)],
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    path = folder / f"interactions.{file_format}"
    chunks = _chunks(rows, users, items)
    if file_format == "jsonl":
        with path.open("w") as file:
            for chunk in chunks:
                file.writelines(json.dumps(row, default=str) + "\n" for row in chunk.to_pylist())
        return
    first = next(chunks)
    writer = pq.ParquetWriter if file_format == "parquet" else pacsv.CSVWriter
    with writer(path, first.schema) as opened:
        opened.write_table(first)
        for chunk in chunks:
            opened.write_table(chunk)


def _chunks(rows: int, users: int, items: int) -> Iterator[pa.Table]:
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        size = min(CHUNK, rows - start)
        # A log in order of time, as most sources write it; the popular ids come first.
        seconds = FIRST_SECOND + SECONDS * start // rows + np.sort(rng.integers(SECONDS * size // rows, size=size))
        chosen_users = (users * rng.random(size) ** 2).astype(np.int64)
        chosen_items = (items * rng.random(size) ** 3).astype(np.int64)
        yield pa.table(
            {
                "user_id": pa.array(chosen_users).cast(pa.string()),
                "item_id": pa.array([f"item-{i}" for i in chosen_items]),
                "occurred_at": pa.array(seconds, pa.timestamp("s")).cast(pa.timestamp("us", "UTC")),
                "value": pa.array(rng.integers(1, 6, size=size).astype(np.float32)),
            }
        )


if __name__ == "__main__":
    main()
