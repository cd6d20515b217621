"""What Postgres spends on writing sequences, by how a row keeps its three lists: today's arrays beside other designs.

    python -m benchmarks.sequence_writes        # a minute → benchmarks/results/sequence_writes.json; Linux

The rows of the feature benchmark (2,000 users, 1 to 200 events each). All figures are processor time (Postgres' from
/proc), medians of ROUNDS: they depend less on what else the machine does. designs: a binary COPY stream encoded
beforehand, into an empty table with the keys and indexes of user_sequences. stores: `online_write_batch` as a whole,
into an empty table (write) and once more (rewrite), Feast's stock store and ours.
"""

import json
import statistics
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, LiteralString

import psycopg
from psycopg import sql

import migrations
from benchmarks.feature_rows import ROWS, sequence_rows
from benchmarks.feature_rows import Row as FeatureRow
from benchmarks.features import empty, stock_store, write
from feature_repo import definitions, store
from feature_repo.columns import COPY_END, COPY_START
from feature_repo.copy_rows import copy_rows
from feature_repo.views.online_writes import Row, cells
from feature_repo.views.user_sequence import VIEW
from polytower.postgres import EmbeddedPostgres, connect

RESULTS = Path(__file__).parent / "results" / "sequence_writes.json"
ROUNDS = 5
SEQUENCE = definitions.FEATURE_VIEWS[VIEW.name]
SEPARATOR = "\x1f"
FIELDS = {"item_ids": "string_list_val", "occurred_ats": "int64_list_val", "kinds": "string_list_val"}
ARRAYS: tuple[LiteralString, ...] = ("text[]", "timestamptz[]", "text[]")

Cells = Sequence[bytes]


@dataclass(frozen=True)
class Design:
    """types: of the three columns. cells: N cells of each. staged: SQL that takes rows over from a staging table."""

    name: str
    types: tuple[LiteralString, ...]
    cells: tuple[Cells, ...]
    table: LiteralString = "table"
    indexed: bool = True
    staged: LiteralString | None = None


def main() -> None:
    """Measures, prints and writes the rows."""
    given = sequence_rows()
    rows = [Row(key.entity_values[0].string_val, as_of, values) for key, values, as_of, _ in given]
    entity, day, as_of, *arrays, _ = cells(VIEW, rows)  # nobody searched
    with TemporaryDirectory(prefix="polytower-bench-") as home:
        postgres = EmbeddedPostgres(Path(home) / "postgres")
        url = postgres.acquire()
        try:
            migrations.upgrade(url)
            stores = _stores(url, given)
            with connect(url) as connection:
                found = [_measure(connection, [entity, day, as_of], design) for design in _designs(rows, arrays)]
        finally:
            postgres.release()
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "data": {"rows": ROWS, "events": sum(len(row.values["kinds"].string_list_val.val) for row in rows)},
        "stores": stores,
        "designs": found,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def _stores(url: str, given: list[FeatureRow]) -> list[dict[str, Any]]:
    stores = {"feast-postgres": stock_store(url), "polytower": store.feature_store(url)}
    store.apply(stores["polytower"])
    stores["feast-postgres"].apply([definitions.user, SEQUENCE])
    for target in stores.values():  # opens their connections
        write(target, SEQUENCE, given[:1])
    spent: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(ROUNDS):
        empty(url, VIEW.name)
        for measure in ("write", "rewrite"):
            for name, target in stores.items():
                pids, begun = _backends(url), time.process_time()
                before = sum(map(_seconds, pids))
                write(target, SEQUENCE, given)
                python = time.process_time() - begun
                spent.setdefault((name, measure), []).append((python, sum(map(_seconds, pids)) - before))
    medians = {
        key: [round(statistics.median(each) * 1e3, 1) for each in zip(*pairs, strict=True)]
        for key, pairs in spent.items()
    }
    return [
        {"store": name, "measure": measure, "python_ms": python, "postgres_ms": postgres}
        for (name, measure), (python, postgres) in medians.items()
    ]


def _backends(url: str) -> list[int]:
    with connect(url) as connection:
        statement = "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        return [pid for (pid,) in connection.execute(statement)]


def _seconds(pid: int) -> float:
    """Processor time of a process so far; 0 for one that has ended."""
    schedule = Path(f"/proc/{pid}/schedstat")
    return int(schedule.read_text().split()[0]) / 1e9 if schedule.exists() else 0.0


def _designs(rows: Sequence[Row], arrays: list[list[bytes]]) -> list[Design]:
    item_ids, times, kinds = (
        [list(getattr(row.values[name], field).val) for row in rows] for name, field in FIELDS.items()
    )
    numbers = {item: number for number, item in enumerate(sorted({item for row in item_ids for item in row}))}
    codes = {kind: code for code, kind in enumerate(sorted({kind for row in kinds for kind in row}))}
    joined = [[_cell(SEPARATOR.join(row).encode()) for row in column] for column in (item_ids, kinds)]
    packed_times = [_cell(struct.pack(f">{len(row)}q", *row)) for row in times]
    packed_items = [_cell(struct.pack(f">{len(row)}i", *(numbers[item] for item in row))) for row in item_ids]
    packed_kinds = [_cell(bytes(codes[kind] for kind in row)) for row in kinds]
    wires = tuple(
        [_cell(getattr(row.values[name], field).SerializeToString()) for row in rows] for name, field in FIELDS.items()
    )
    today = (arrays[0], arrays[1], arrays[2])
    split: LiteralString = "string_to_array(a, E'\\x1f'), b, string_to_array(c, E'\\x1f')"
    return [
        Design("arrays (today)", ARRAYS, today),
        Design("arrays, without indexes", ARRAYS, today, indexed=False),
        Design("arrays, unlogged", ARRAYS, today, table="unlogged table"),
        Design("arrays, unlogged staging, insert … select", ARRAYS, today, staged="a, b, c"),
        Design(
            "joined texts staged, string_to_array",
            ("text", "timestamptz[]", "text"),
            (joined[0], today[1], joined[1]),
            staged=split,
        ),
        Design(
            "item numbers int4[], timestamptz[], kinds bytea",
            ("int4[]", "timestamptz[]", "bytea"),
            (_int_arrays(item_ids, numbers), today[1], packed_kinds),
        ),
        Design("joined texts, timestamptz[]", ("text", "timestamptz[]", "text"), (joined[0], today[1], joined[1])),
        Design("joined texts, times bytea", ("text", "bytea", "text"), (joined[0], packed_times, joined[1])),
        Design(
            "item numbers, times and kinds bytea",
            ("bytea", "bytea", "bytea"),
            (packed_items, packed_times, packed_kinds),
        ),
        Design("protobuf bytea, as the stock store", ("bytea", "bytea", "bytea"), wires),
    ]


def _measure(connection: psycopg.Connection[Any], keys: Sequence[Cells], design: Design) -> dict[str, Any]:
    columns = [*keys, *design.cells]
    chunks = [copy_rows([column[start : start + 250] for column in columns]) for start in range(0, ROWS, 250)]
    stream = [COPY_START, *chunks, COPY_END]
    seconds = []
    for _ in range(ROUNDS):
        kept = ARRAYS if design.staged else design.types
        _create(connection, "written", design.table, kept, indexed=design.indexed)
        if design.staged:
            _create(connection, "staged", "unlogged table", design.types, indexed=False)
        connection.commit()
        before = _seconds(connection.info.backend_pid)
        _write(connection, design, stream)
        seconds.append(_seconds(connection.info.backend_pid) - before)
    size = connection.execute("select pg_total_relation_size('written')").fetchone()
    assert size is not None
    row = {
        "design": design.name,
        "postgres_ms": round(statistics.median(seconds) * 1e3, 1),
        "table_mb": round(size[0] / 1e6, 1),
    }
    connection.execute("drop table written; drop table if exists staged")
    return row


def _create(
    connection: psycopg.Connection[Any],
    name: str,
    kind: LiteralString,
    types: Sequence[LiteralString],
    *,
    indexed: bool,
) -> None:
    definition = sql.SQL(
        "drop table if exists {name}; create " + kind + " {name} (user_id text not null, day date not null,"
        " as_of timestamptz not null, a {a} not null, b {b} not null, c {c} not null) with (toast_tuple_target = 8160)"
    )
    indexes = sql.SQL(
        "alter table {name} add primary key (user_id, day);"
        " create index on {name} (user_id, as_of desc); create index on {name} (day)"
    )
    storage = sql.SQL(
        "alter table {name} alter a set storage external, alter b set storage external, alter c set storage external"
    )
    for statement in (definition, storage, *([indexes] if indexed else [])):
        parts = dict(zip("abc", map(sql.SQL, types), strict=True))
        connection.execute(statement.format(name=sql.Identifier(name), **parts))


def _write(connection: psycopg.Connection[Any], design: Design, stream: Sequence[bytes]) -> None:
    target = sql.Identifier("staged" if design.staged else "written")
    with connection.cursor().copy(sql.SQL("copy {} from stdin (format binary)").format(target)) as copy:
        for chunk in stream:
            copy.write(chunk)
    if design.staged:
        connection.execute(sql.SQL("insert into written select user_id, day, as_of, " + design.staged + " from staged"))
    connection.commit()


def _cell(content: bytes) -> bytes:
    return struct.pack(">i", len(content)) + content


def _int_arrays(item_ids: Sequence[Sequence[str]], numbers: dict[str, int]) -> Cells:
    return [
        _cell(
            struct.pack(">iiiii", 1, 0, 23, len(row), 1)
            + b"".join(struct.pack(">ii", 4, numbers[item]) for item in row)
        )
        for row in item_ids
    ]


if __name__ == "__main__":
    main()
