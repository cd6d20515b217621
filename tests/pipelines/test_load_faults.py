"""Bad input: each case is refused or quarantined by name, and what was loaded before stays as it was."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.load.folder import load_folder
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import FIRST_DAY, tiny_folder, tiny_items, write_rows
from tests.pipelines.test_load import FORMATS, Connection, column, contents, events

GOOD = events(*(("u0", f"i{n % 60}", n) for n in range(99)))


@pytest.fixture
def connection(emptied: Connection) -> Connection:
    return emptied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def loaded(connection: Connection, tmp_path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What an earlier, good load has brought: nothing of it may be lost."""
    load_folder(connection, tiny_folder(tmp_path / "before", users=3, events=4))
    found = contents(connection)
    connection.commit()  # no lock may stay behind for the tests with connections of their own
    return found


def refused(connection: Connection, folder: Path, *words: str, images: Path | None = None) -> None:
    """Asserts that the load is refused with these words, is on record as failed, and changed nothing."""
    before = contents(connection)
    with pytest.raises(UserError) as caught:
        load_folder(connection, folder, images)
    for word in words:
        assert word in str(caught.value)
    assert contents(connection) == before
    state, counts = connection.execute("select state, counts from loads order by load_id desc limit 1").fetchone()  # type: ignore[misc]
    assert (state, counts["error"]) == ("failed", str(caught.value).replace("\0", "\N{REPLACEMENT CHARACTER}"))


class TestRefusedFiles:
    @pytest.mark.parametrize("file_format", FORMATS)
    @pytest.mark.parametrize("missing", ["user_id", "item_id", "occurred_at"])
    def test_missing_column(
        self, connection: Connection, loaded: object, folder: Path, file_format: str, missing: str
    ) -> None:
        rows = [{name: value for name, value in row.items() if name != missing} for row in GOOD]
        write_rows(folder / f"interactions.{file_format}", rows)
        refused(connection, folder, f"interactions.{file_format}", f"lacks the column {missing}")

    def test_a_zero_byte_in_a_column_s_name(self, connection: Connection, loaded: object, folder: Path) -> None:
        """Its message quotes what Postgres does not hold; that the load failed is on record all the same."""
        folder.mkdir()
        (folder / "interactions.csv").write_bytes(b"user_id,item_id,occurred_at,k\0\nu0,i1,0,x\n")
        refused(connection, folder, "interactions.csv", "k\0")

    @pytest.mark.parametrize("file_format", FORMATS)
    def test_unknown_column(self, connection: Connection, loaded: object, folder: Path, file_format: str) -> None:
        write_rows(folder / f"interactions.{file_format}", [{**row, "rating": 3} for row in GOOD])
        refused(connection, folder, f"interactions.{file_format}", "unknown column: rating", "known: user_id")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("interactions.parquet", b""),
            ("interactions.parquet", b"PAR1 this is not it"),
            ("interactions.csv", b""),
            ("interactions.csv", b"user_id,item_id,occurred_at\n"),
            ("interactions.csv", b"user_id,item_id,occurred_at\nu0,i0\n"),
            ("interactions.csv", b"user_id,item_id,occurred_at\nu\xff,i0,2024-01-01\n"),
            ("interactions.csv", b"user_id,user_id,item_id,occurred_at\nu0,u0,i0,2024-01-01\n"),
            ("interactions.jsonl", b""),
            ("interactions.jsonl", b'{"user_id": "u0", "item_id": "i0", "occur'),
            ("interactions.jsonl", b'["u0", "i0", "2024-01-01"]\n'),
            ("interactions.jsonl", b'{"user_id": "\\ud800", "item_id": "i0", "occurred_at": 1}\n'),
            ("items.parquet", b"PAR1"),
            ("items.jsonl", b"{}{}"),
            ("users.csv", b'user_id,age\n"u0,3\n'),
        ],
    )
    def test_empty_truncated_or_corrupt(
        self, connection: Connection, loaded: object, folder: Path, name: str, content: bytes
    ) -> None:
        write_rows(folder / "interactions.csv", GOOD)
        if name.startswith("interactions"):
            (folder / "interactions.csv").unlink()
        (folder / name).write_bytes(content)
        refused(connection, folder, name)

    def test_truncated_parquet(self, connection: Connection, loaded: object, folder: Path) -> None:
        path = write_rows(folder / "interactions.parquet", GOOD)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        refused(connection, folder, "interactions.parquet cannot be read as PARQUET", "truncated")

    def test_a_page_in_the_middle_is_damaged(self, connection: Connection, loaded: object, folder: Path) -> None:
        folder.mkdir()
        path = folder / "interactions.parquet"
        users = [os.urandom(8).hex() for _ in range(40_000)]
        table = pa.table({"user_id": users, "item_id": ["i0"] * 40_000, "occurred_at": [FIRST_DAY] * 40_000})
        pq.write_table(table, path, row_group_size=20_000, write_page_checksum=True)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4_000] = bytes(4_000)
        path.write_bytes(content)
        refused(connection, folder, "interactions.parquet")

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("user_id", pa.array([[1]])),
            ("user_id", pa.array([1.5])),
            ("item_id", pa.array([True])),
            ("occurred_at", pa.array([True])),
            ("occurred_at", pa.array([b"x"])),
            ("value", pa.array([True])),
            ("value", pa.array([{"a": 1}])),
            ("query", pa.array([["a"]])),
        ],
    )
    def test_wrong_type(
        self, connection: Connection, loaded: object, folder: Path, name: str, values: pa.Array
    ) -> None:
        folder.mkdir()
        columns = {"user_id": ["u0"], "item_id": ["i0"], "occurred_at": [FIRST_DAY]} | {name: values}
        pq.write_table(pa.table(columns), folder / "interactions.parquet")
        refused(connection, folder, "interactions.parquet", f"column {name} holds", "expected")

    @pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
    @pytest.mark.parametrize("value", [{"a": 1}, [["nested"]], [{"a": 1}]])
    def test_attributes_that_are_no_scalars(
        self, connection: Connection, loaded: object, folder: Path, file_format: str, value: Any
    ) -> None:
        write_rows(folder / f"items.{file_format}", [{"item_id": "i0", "details": value}])
        refused(connection, folder, f"items.{file_format}, row 1: column details holds a")

    def test_binary_attributes(self, connection: Connection, loaded: object, folder: Path) -> None:
        write_rows(folder / "users.parquet", [{"user_id": "u0", "face": b"\xff"}])
        write_rows(folder / "interactions.csv", GOOD)
        refused(connection, folder, "users.parquet, row 1: column face holds a bytes")

    def test_two_formats_of_one_table(self, connection: Connection, loaded: object, folder: Path) -> None:
        write_rows(folder / "interactions.csv", GOOD)
        write_rows(folder / "interactions.jsonl", GOOD)
        refused(connection, folder, "interactions.csv and interactions.jsonl", "keep only one")

    def test_no_such_folder(self, connection: Connection, loaded: object, folder: Path) -> None:
        refused(connection, folder, str(folder), "does not exist")

    def test_too_many_faulty_rows(self, connection: Connection, loaded: object, folder: Path) -> None:
        rows = [dict(row, occurred_at="soon") if n % 10 == 0 else row for n, row in enumerate(GOOD)]
        write_rows(folder / "items.csv", tiny_items(61))  # good, and still not loaded
        write_rows(folder / "interactions.csv", rows)
        refused(
            connection, folder, "interactions.csv: 10 of 99 rows are faulty", "allowed 5%", "row 41, occurred_at is not"
        )
        kept = "select count(*) from rejected_rows where load_id = (select max(load_id) from loads)"
        assert column(connection, kept) == [10]
        assert load_folder(connection, folder, max_rejected=0.2).counts["interactions_rejected"] == 10

    def test_a_catalogue_that_does_not_fit(self, connection: Connection, loaded: object, folder: Path) -> None:
        write_rows(folder / "interactions.csv", events(*(("u", f"x{n}", n) for n in range(50))))
        refused(connection, folder, "50 of 50", "item_id is in neither", "'x4'")


LATER = datetime.now(UTC) + timedelta(days=3)
FAULTY_ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "null user": ({"user_id": None}, "user_id", "is empty"),
    "blank item": ({"item_id": " "}, "item_id", "is empty"),
    "long id": ({"user_id": "u" * 501}, "user_id", "is longer than 500 bytes"),
    "unseen item": ({"item_id": "i999"}, "item_id", "is in neither items nor the database"),
    "no time": ({"occurred_at": None}, "occurred_at", "is not a time"),
    "garbage time": ({"occurred_at": "yesterday"}, "occurred_at", "is not a time"),
    "impossible date": ({"occurred_at": "2023-02-30"}, "occurred_at", "is not a time"),
    "before 1970": ({"occurred_at": "1969-12-31T23:59:59Z"}, "occurred_at", "is before 1970 or more than"),
    "future": ({"occurred_at": LATER.isoformat()}, "occurred_at", "is before 1970 or more than"),
    "milliseconds": ({"occurred_at": "1700000000000"}, "occurred_at", "is before 1970 or more than"),
    "garbage value": ({"value": "three"}, "value", "is not a number"),
    "infinite value": ({"value": "inf"}, "value", "is not a finite number"),
    "long kind": ({"kind": "k" * 501}, "kind", "is longer than 500 bytes"),
}


class TestQuarantinedRows:
    @pytest.mark.parametrize("file_format", ["csv", "jsonl"])
    @pytest.mark.parametrize("case", FAULTY_ROWS)
    def test_the_rest_loads(
        self, connection: Connection, loaded: object, folder: Path, case: str, file_format: str
    ) -> None:
        fault, name, reason = FAULTY_ROWS[case]
        good = [{**row, "occurred_at": row["occurred_at"].isoformat(), "value": "1.5", "kind": "view"} for row in GOOD]
        write_rows(folder / f"interactions.{file_format}", [*good[:50], {**good[50], **fault}, *good[50:]])
        report = load_folder(connection, folder)
        assert (report.counts["interactions_new"], report.counts["interactions_rejected"]) == (99, 1)
        [(file, row, column_name, why, value)] = connection.execute(
            "select file, row_number, column_name, reason, value from rejected_rows"
        ).fetchall()
        assert (file, row, column_name) == (f"interactions.{file_format}", 51, name)
        assert why.startswith(reason)
        assert value == str(fault[name] or "")[:200]
        assert load_folder(connection, folder).counts["interactions_unchanged"] == 99

    def test_nan_and_missing_times_of_parquet(self, connection: Connection, loaded: object, folder: Path) -> None:
        folder.mkdir()
        seconds = [1_700_000_000.0 + n for n in range(50)]
        seconds[3], seconds[4] = float("nan"), float("inf")
        table = pa.table({"user_id": ["u"] * 50, "item_id": ["i0"] * 50, "occurred_at": seconds})
        pq.write_table(table, folder / "interactions.parquet")
        assert load_folder(connection, folder).counts["interactions_new"] == 48
        assert column(connection, "select row_number from rejected_rows order by 1") == [4, 5]

    def test_zero_bytes(self, connection: Connection, loaded: object, folder: Path) -> None:
        items = [*tiny_items(60), {"item_id": "a\0b"}, {"item_id": "c", "tags": ["d\0"]}]
        write_rows(folder / "items.parquet", items)
        load_folder(connection, folder)
        rows = connection.execute("select row_number, column_name, reason from rejected_rows order by 1").fetchall()
        assert rows == [(61, "item_id", "contains a zero byte"), (62, "tags", "contains a zero byte")]

    @pytest.mark.parametrize("file_format", FORMATS)
    @pytest.mark.parametrize("key", ["event id", "user, item, time and kind"])
    @pytest.mark.parametrize("before", [True, False])
    def test_duplicate_keys_with_other_content(
        self, connection: Connection, loaded: object, folder: Path, file_format: str, key: str, before: bool
    ) -> None:
        path = folder / f"interactions.{file_format}"
        good = [{**row, "value": 1.0, "event_id": f"e{n}" if key == "event id" else None} for n, row in enumerate(GOOD)]
        fault = {**good[7], **({"item_id": "i9"} if key == "event id" else {"value": 2.0})}
        write_rows(path, good if before else [*good, fault])
        load_folder(connection, folder)
        if before:
            write_rows(path, [*good[:99], fault])
            assert load_folder(connection, folder).counts["interactions_unchanged"] == 99
        [(row, reason)] = connection.execute("select row_number, reason from rejected_rows").fetchall()
        assert row == 100
        assert "duplicate key" in reason
        assert column(connection, "select count(*) from interactions") == [99 + 12]

    @pytest.mark.parametrize("file_format", FORMATS)
    def test_duplicate_items_name_both_rows(
        self, connection: Connection, loaded: object, folder: Path, file_format: str
    ) -> None:
        rows = tiny_items(60)
        write_rows(folder / f"items.{file_format}", [*rows, {**rows[9], "title": "Other"}, rows[3]])
        report = load_folder(connection, folder)
        [(row, name, reason, value)] = connection.execute(
            "select row_number, column_name, reason, value from rejected_rows"
        ).fetchall()
        assert (row, name, value) == (61, "item_id", "i9")
        assert reason == "repeats the key of row 10 with other content"
        assert (report.counts["items_unchanged"], report.counts["items_rejected"]) == (61, 1)
        assert column(connection, "select title from items where item_id = 'i9'") == ["Kitchen 9"]

    def test_duplicate_users(self, connection: Connection, loaded: object, folder: Path) -> None:
        write_rows(folder / "interactions.csv", GOOD)
        write_rows(folder / "users.csv", [{"user_id": f"u{n % 30}", "age": n // 30} for n in range(31)])
        assert load_folder(connection, folder).counts["users_rejected"] == 1

    def test_available_must_be_a_flag(self, connection: Connection, loaded: object, folder: Path) -> None:
        rows = [{**row, "available": "no" if n == 1 else "yes"} for n, row in enumerate(tiny_items(60))]
        write_rows(folder / "items.csv", [*rows, {"item_id": "x", "available": "perhaps"}])
        assert load_folder(connection, folder).counts["items_rejected"] == 1
        assert column(connection, "select item_id from items where not available") == ["i1"]


def fail_on_items(connection: Connection, action: str) -> None:
    """Makes the database run `action` (PL/pgSQL) when the first interaction is written, deep inside a load."""
    connection.execute("select ensure_interactions_year(2023)")
    connection.execute(
        "create function act() returns trigger language plpgsql as $$ begin " + action + " return new; end $$"
    )
    connection.execute("create trigger act before insert on interactions for each row execute function act()")
    connection.commit()


class TestBrokenLoads:
    def test_full_disk(self, connection: Connection, loaded: object, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(70))
        write_rows(folder / "interactions.csv", GOOD)
        fail_on_items(connection, "raise exception 'could not extend file' using errcode = 'disk_full';")
        refused(connection, folder, "disk is full", "nothing of this load was kept", "Free some space")
        connection.execute("drop trigger act on interactions")
        assert load_folder(connection, folder).counts["interactions_new"] == 99

    def test_lost_connection(self, emptied_database: str, loaded: object, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(70))
        write_rows(folder / "interactions.csv", GOOD)
        with connect(emptied_database) as observer:
            before = contents(observer)
            fail_on_items(observer, "perform pg_terminate_backend(pg_backend_pid());")
            with (
                pytest.raises(UserError, match="connection to the database was lost"),
                connect(emptied_database) as victim,
            ):
                load_folder(victim, folder)
            assert contents(observer) == before
            observer.execute("drop trigger act on interactions")
            assert load_folder(observer, folder).counts["interactions_new"] == 99
            assert column(observer, "select state from loads order by load_id") == ["done", "failed", "done"]

    def test_killed_process(self, emptied_database: str, connection: Connection, loaded: object, folder: Path) -> None:
        before = contents(connection)
        write_rows(folder / "items.csv", tiny_items(70))
        write_rows(folder / "interactions.csv", GOOD)
        fail_on_items(connection, "raise warning 'now';")
        script = (
            "import os, signal, sys; from pathlib import Path\n"
            "from pipelines.load.folder import load_folder; from polytower.postgres import connect\n"
            "with connect(sys.argv[1]) as connection:\n"
            "    connection.add_notice_handler(lambda _: os.kill(os.getpid(), signal.SIGKILL))\n"
            "    load_folder(connection, Path(sys.argv[2]))\n"
        )
        found = subprocess.run([sys.executable, "-c", script, emptied_database, str(folder)], check=False)
        assert found.returncode == -signal.SIGKILL
        connection.rollback()
        assert contents(connection) == before
        connection.execute("drop trigger act on interactions")
        assert load_folder(connection, folder).counts["items_new"] == 10
        states = connection.execute("select state, counts ->> 'error' from loads order by load_id").fetchall()
        assert states == [("done", None), ("failed", "interrupted"), ("done", None)]
