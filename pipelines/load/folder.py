"""Loads a folder of the input contract: all of it in one transaction, or nothing.

    polytower load DIR [--images DIR] [--vectors COLUMN]

What was loaded before stays as it is when a load fails, and loading twice changes nothing. The only traces of a failed
load are its row in `loads` and its rejected rows, written after the rollback.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from pipelines.load.contract import Source, find_sources
from pipelines.load.entities import Loaded, load_items, load_users
from pipelines.load.interactions import load_interactions
from pipelines.load.rejections import Rejection, Rejections
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

    rejected: the first rejected rows; all that were kept are in the table rejected_rows under load_id. attributes:
    table → attribute → its type, as it was read. warnings: what was loaded and should be looked at.
    """

    load_id: int
    source: str
    counts: dict[str, int]
    rejected: list[Rejection]
    seconds: float
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

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
            "attributes": self.attributes,
            "warnings": self.warnings,
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
            types = self.attributes.get(table)
            if types:
                lines.append("    attributes: " + ", ".join(f"{name} {kind}" for name, kind in types.items()))
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.rejected:
            lines.append(f"  rejected (all are in the table rejected_rows, load_id {self.load_id}):")
            lines += [f"    {rejection}" for rejection in self.rejected]
        return lines


def load_folder(
    connection: psycopg.Connection[Any],
    folder: Path,
    images: Path | None = None,
    *,
    own: Mapping[str, str] | None = None,
    progress: bool = False,
    max_rejected: float = 0.05,
    take_over: bool = False,
) -> LoadReport:
    """Loads interactions, items and users (each optional, not all) from `folder`, in one transaction of its own.

    images: the folder that the items' `image` column names files in; without it, names are stored and no file is read.
    own: modality → the column of items that holds it ("vector" → embeddings of the user's own). max_rejected: the share
    of a file's rows that may be faulty; those are quarantined in rejected_rows. Above it, and
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
                sources, overlooked = _sources(folder)
                found = _load(connection, sources, images, own, rejections, progress=progress)
                report = _report(load_id, folder, found, rejections, overlooked, time.monotonic() - started)
                rejections.store(connection, load_id)
                _end(connection, load_id, "done", report.counts)
        except BaseException as error:
            if not connection.broken:
                rejections.store(connection, load_id)
                _end(connection, load_id, "failed", {"error": _storable(str(error)) or type(error).__name__})
                connection.commit()
            raise
    return report


def _sources(folder: Path) -> tuple[dict[str, Source], list[str]]:
    sources, overlooked = find_sources(folder)
    if not sources:
        raise UserError(f"{folder} has no interactions, items or users (.parquet, .csv or .jsonl); see docs/data.md")
    return sources, overlooked


def _load(
    connection: psycopg.Connection[Any],
    sources: dict[str, Source],
    images: Path | None,
    own: Mapping[str, str] | None,
    rejections: Rejections,
    *,
    progress: bool,
) -> dict[str, Loaded]:
    found: dict[str, Loaded] = {}
    if own and "items" not in sources:
        raise UserError(f"the folder holds no items, of which the column {next(iter(own.values()))} would be read")
    for table, source in sources.items():
        rejections.read_from(source)
        if table == "items":
            found[table] = load_items(connection, source, rejections, images, own, progress=progress)
        elif table == "users":
            found[table] = load_users(connection, source, rejections, progress=progress)
        else:
            found[table] = Loaded(load_interactions(connection, source, rejections, progress=progress))
    return found


def _report(
    load_id: int, folder: Path, found: dict[str, Loaded], rejections: Rejections, overlooked: list[str], seconds: float
) -> LoadReport:
    counts = {f"{table}_{what}": n for table, loaded in found.items() for what, n in loaded.counts.items()}
    attributes = {table: loaded.attributes for table, loaded in found.items() if loaded.attributes}
    warnings = [warning for loaded in found.values() for warning in loaded.warnings] + rejections.warnings
    warnings += [f"{name} in the folder was not read" for name in overlooked]
    return LoadReport(load_id, str(folder), counts, rejections.kept[:HEAD], seconds, attributes, warnings)


def _begin(connection: psycopg.Connection[Any], folder: Path) -> int:
    connection.execute(CLOSE_INTERRUPTED)
    row = connection.execute(BEGIN, {"source": str(folder)}).fetchone()
    assert row is not None
    connection.commit()
    return int(row[0])


def _storable(message: str) -> str:
    """The message without the one character that Postgres does not hold; it may quote a damaged file."""
    return message.replace("\0", "\N{REPLACEMENT CHARACTER}")


def _end(connection: psycopg.Connection[Any], load_id: int, state: str, counts: dict[str, Any]) -> None:
    connection.execute(END, {"state": state, "counts": json.dumps(counts), "load_id": load_id})


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except psycopg.errors.DiskFull as error:
        message = "the database's disk is full; nothing of this load was kept. Free some space and load again"
        raise UserError(f"{message} ({error})") from error
    except psycopg.errors.ProgramLimitExceeded as error:
        raise UserError(f"a value is larger than Postgres can store; nothing of this load was kept: {error}") from error
    except psycopg.OperationalError as error:
        message = "the connection to the database was lost; nothing of this load was kept. Load again"
        raise UserError(f"{message} ({str(error).strip()})") from error
    except psycopg.DataError as error:
        raise UserError(f"Postgres refused a value; nothing of this load was kept: {error}") from error
