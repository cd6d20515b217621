"""Loads a folder of the input contract: all of it in one transaction, or nothing.

    polytower load DIR [--images DIR]

What was loaded before stays as it is when a load fails, and loading twice changes nothing. The only traces of a failed
load are its row in `loads` and its rejected rows, written after the rollback.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from pipelines.contract import Source, find_source
from pipelines.load_entities import load_items, load_users
from pipelines.load_interactions import load_interactions
from pipelines.rejections import Rejection, Rejections
from polytower import locks
from polytower.errors import UserError

# Whoever holds the lock is the only one that runs: other rows that say so belong to killed processes.
CLOSE_INTERRUPTED = """
update loads set state = 'failed', counts = '{"error": "interrupted"}', finished_at = clock_timestamp()
where state = 'running'
"""
BEGIN = "insert into loads (source) values (%(source)s) returning load_id"
END = """
update loads set state = %(state)s, counts = %(counts)s, finished_at = clock_timestamp() where load_id = %(load_id)s
"""
# Rejections that a report shows.
HEAD = 20


@dataclass(frozen=True)
class LoadReport:
    """What a load did. counts: "<table>_<what>" → rows, what = read, new, changed, unchanged, rejected (and images).

    rejected: the first rejected rows; all that were kept are in the table rejected_rows under load_id.
    """

    load_id: int
    source: str
    counts: dict[str, int]
    rejected: list[Rejection]
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Rows of all files read, per second of the whole load."""
        return sum(count for name, count in self.counts.items() if name.endswith("_read")) / max(self.seconds, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "load_id": self.load_id,
            "source": self.source,
            "counts": self.counts,
            "rejected": [rejection.as_json() for rejection in self.rejected],
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(self.rows_per_second),
        }

    def lines(self) -> list[str]:
        """The report for a person, one line each."""
        lines = [f"load {self.load_id}: {self.source} in {self.seconds:.1f} s ({self.rows_per_second:,.0f} rows/s)"]
        for table in ("items", "users", "interactions"):
            found = {name.removeprefix(f"{table}_"): n for name, n in self.counts.items() if name.startswith(table)}
            if found:
                lines.append(f"  {table}: " + ", ".join(f"{n:,} {what.replace('_', ' ')}" for what, n in found.items()))
        if self.rejected:
            lines.append(f"  rejected (all of them: table rejected_rows, load_id {self.load_id}):")
            lines += [f"    {rejection}" for rejection in self.rejected]
        return lines


def load_folder(
    connection: psycopg.Connection[Any],
    folder: Path,
    images: Path | None = None,
    *,
    progress: bool = False,
    max_rejected: float = 0.05,
    take_over: bool = False,
) -> LoadReport:
    """Loads interactions, items and users (each optional, not all) from `folder`, in one transaction of its own.

    images: the folder that the items' `image` column names files in; without it, names are stored and no file is read.
    max_rejected: the share of a file's rows that may be faulty; those are quarantined in rejected_rows. Above it, and
    for whatever makes a file unreadable, UserError, and nothing is loaded. An open transaction is committed first.
    take_over: from another load that is running.
    """
    started = time.monotonic()
    connection.commit()
    with locks.held(connection, locks.LOAD, take_over=take_over):  # one loader at a time per database
        load_id = _begin(connection, folder)
        rejections = Rejections(max_rejected)
        try:
            with _readable_errors(), connection.transaction():
                counts = _load(connection, _sources(folder), images, rejections, progress=progress)
                report = LoadReport(load_id, str(folder), counts, rejections.kept[:HEAD], time.monotonic() - started)
                rejections.store(connection, load_id)
                _end(connection, load_id, "done", report.counts)
        except BaseException as error:
            if not connection.broken:
                rejections.store(connection, load_id)
                _end(connection, load_id, "failed", {"error": str(error) or type(error).__name__})
                connection.commit()
            raise
    return report


def _sources(folder: Path) -> dict[str, Source]:
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist (or is not a folder)")
    found = {table: find_source(folder, table) for table in ("items", "users", "interactions")}
    sources = {table: source for table, source in found.items() if source is not None}
    if not sources.keys() & {"items", "interactions"}:
        raise UserError(f"{folder} holds neither interactions nor items (.parquet, .csv or .jsonl); see docs/data.md")
    return sources


def _load(
    connection: psycopg.Connection[Any],
    sources: dict[str, Source],
    images: Path | None,
    rejections: Rejections,
    *,
    progress: bool,
) -> dict[str, int]:
    counts: dict[str, int] = {}
    for table, source in sources.items():  # items first: interactions are checked against them
        if table == "items":
            found = load_items(connection, source, rejections, images, progress=progress)
        elif table == "users":
            found = load_users(connection, source, rejections, progress=progress)
        else:
            found = load_interactions(connection, source, rejections, progress=progress)
        counts |= {f"{table}_{what}": count for what, count in found.items()}
    return counts


def _begin(connection: psycopg.Connection[Any], folder: Path) -> int:
    connection.execute(CLOSE_INTERRUPTED)
    row = connection.execute(BEGIN, {"source": str(folder)}).fetchone()
    assert row is not None
    connection.commit()
    return int(row[0])


def _end(connection: psycopg.Connection[Any], load_id: int, state: str, counts: dict[str, Any]) -> None:
    connection.execute(END, {"state": state, "counts": json.dumps(counts), "load_id": load_id})


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.DiskFull as error:
        message = "the database's disk is full; nothing of this load was kept. Free some space and load again"
        raise UserError(f"{message} ({error})") from error
    except psycopg.OperationalError as error:
        message = "the connection to the database was lost; nothing of this load was kept. Load again"
        raise UserError(f"{message} ({str(error).strip()})") from error
    except psycopg.DataError as error:
        raise UserError(f"Postgres refused a value; nothing of this load was kept: {error}") from error
