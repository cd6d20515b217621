"""Loading a contract folder: what arrives, and that a second load changes nothing; for each of the three formats."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import FIRST_DAY, Format, tiny_folder, tiny_interactions, tiny_items, write_rows

FORMATS = get_args(Format)
Connection = psycopg.Connection[Any]


def contents(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that a load may write but its own journal of loads."""
    return {
        "items": connection.execute("select * from items order by item_id").fetchall(),
        "users": connection.execute("select * from users order by user_id").fetchall(),
        "interactions": connection.execute("select * from interactions order by position").fetchall(),
    }


def column(connection: Connection, statement: str) -> list[Any]:
    return [row[0] for row in connection.execute(statement).fetchall()]


def events(*rows: tuple[str, str, int], **more: Any) -> list[dict[str, Any]]:
    """Interactions (user, item, minutes after the first day's start)."""
    return [
        {"user_id": user, "item_id": item, "occurred_at": FIRST_DAY + timedelta(minutes=minutes), **more}
        for user, item, minutes in rows
    ]


@pytest.fixture
def connection(emptied: Connection) -> Connection:
    return emptied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.mark.parametrize("file_format", FORMATS)
class TestFormats:
    def test_everything_arrives(self, connection: Connection, folder: Path, file_format: Format) -> None:
        tiny_folder(folder, images=True, file_format=file_format)
        report = load_folder(connection, folder, folder / "images")
        expected = tiny_interactions(40, 60, 16, np.random.default_rng(0))
        stored = connection.execute(
            "select user_id, item_id, occurred_at, value, kind, event_id, query from interactions order by position"
        ).fetchall()
        assert stored == [
            (row["user_id"], row["item_id"], row["occurred_at"], row["value"], "interaction", "", None)
            for row in expected
        ]
        assert report.counts == {
            "items_read": 60, "items_new": 60, "items_changed": 0, "items_unchanged": 0, "items_rejected": 0,
            "items_images": 59, "items_images_dropped": 0,
            "users_read": 40, "users_new": 40, "users_changed": 0, "users_unchanged": 0, "users_rejected": 0,
            "interactions_read": 640, "interactions_new": 640, "interactions_unchanged": 0, "interactions_rejected": 0,
        }  # fmt: skip
        assert connection.execute("select state, counts from loads").fetchall() == [("done", report.counts)]

    def test_items_and_users_have_the_same_types_in_all_formats(
        self, connection: Connection, folder: Path, file_format: Format
    ) -> None:
        tiny_folder(folder, file_format=file_format)
        load_folder(connection, folder)
        stored = connection.execute("select item_id, title, description, available, attributes from items").fetchall()
        assert sorted(stored) == sorted(
            (
                row["item_id"],
                row["title"],
                row["description"],
                True,
                {name: row[name] for name in ("year", "genres") if row[name] is not None},
            )
            for row in tiny_items(60)
        )
        assert column(connection, "select attributes from users where user_id = 'u1'") == [{"age": 21, "city": "Lagos"}]

    def test_a_second_load_changes_nothing(self, connection: Connection, folder: Path, file_format: Format) -> None:
        tiny_folder(folder, images=True, file_format=file_format)
        load_folder(connection, folder, folder / "images")
        before = contents(connection)
        connection.execute("delete from changed_days")
        report = load_folder(connection, folder, folder / "images")
        assert contents(connection) == before
        assert [report.counts[f"{table}_unchanged"] for table in ("items", "users", "interactions")] == [60, 40, 640]
        assert column(connection, "select day from changed_days") == []

    def test_a_changed_item_changes_alone(self, connection: Connection, folder: Path, file_format: Format) -> None:
        tiny_folder(folder, file_format=file_format)
        load_folder(connection, folder)
        rows = tiny_items(60)
        rows[7]["title"] = "Another title"
        rows[8]["genres"] = ["Crime", "Nature"]
        write_rows(folder / f"items.{file_format}", rows)
        report = load_folder(connection, folder)
        newest = "select item_id from items where updated_at = (select max(updated_at) from items) order by 1"
        assert column(connection, newest) == ["i7", "i8"]
        assert (report.counts["items_changed"], report.counts["items_unchanged"]) == (2, 58)

    def test_unicode_and_empty_titles(self, connection: Connection, folder: Path, file_format: Format) -> None:
        titles = {"é/1": "Zażółć gęślą jaźń 🎬", "木": '"quoted", with\nline break', "e": "", "n": None, "t": "\\."}
        write_rows(
            folder / f"items.{file_format}", [{"item_id": item, "title": title} for item, title in titles.items()]
        )
        load_folder(connection, folder)
        assert dict(connection.execute("select item_id, title from items").fetchall()) == titles

    def test_one_user_and_one_item(self, connection: Connection, folder: Path, file_format: Format) -> None:
        tiny_folder(folder, users=1, items=1, events=1, file_format=file_format)
        report = load_folder(connection, folder)
        assert (report.counts["items_new"], report.counts["interactions_new"]) == (1, 1)

    def test_a_long_history_keeps_its_order(self, connection: Connection, folder: Path, file_format: Format) -> None:
        items = [f"i{n}" for n in np.random.default_rng(1).permutation(10_000) % 50]
        # Three events share each second, and time goes backwards halfway: only the position tells the file's order.
        minutes = [abs(5_000 - n) // 3 for n in range(10_000)]
        write_rows(folder / f"items.{file_format}", tiny_items(50))
        log = events(*(("u", item, minute) for item, minute in zip(items, minutes, strict=True)))
        for n, row in enumerate(log):
            row["event_id"] = f"e{n}"
        write_rows(folder / f"interactions.{file_format}", log)
        load_folder(connection, folder)
        assert column(connection, "select item_id from interactions order by position") == items

    def test_an_event_replayed_in_file_and_later_is_one(
        self, connection: Connection, folder: Path, file_format: Format
    ) -> None:
        write_rows(folder / f"items.{file_format}", tiny_items(3))
        log = events(("u", "i0", 1), ("u", "i1", 2), ("u", "i0", 1))
        write_rows(folder / f"interactions.{file_format}", log)
        for new, unchanged in ((2, 1), (0, 3)):
            counts = load_folder(connection, folder).counts
            assert (counts["interactions_new"], counts["interactions_unchanged"]) == (new, unchanged)

    def test_all_optional_columns(self, connection: Connection, folder: Path, file_format: Format) -> None:
        write_rows(folder / f"items.{file_format}", tiny_items(3))
        write_rows(
            folder / f"interactions.{file_format}",
            [
                *events(("u", "i0", 1), kind="search", query="blue shoes", value=0.5, event_id="a"),
                *events(("u", "i0", 2), kind=None, query=None, value=None, event_id=None),
            ],
        )
        load_folder(connection, folder)
        statement = "select kind, query, value, event_id from interactions order by position"
        assert connection.execute(statement).fetchall() == [
            ("search", "blue shoes", 0.5, "a"),
            ("interaction", None, None, ""),
        ]


class TestTypes:
    @pytest.mark.parametrize(
        "written",
        [
            pa.array([1_700_000_000], pa.int64()),
            pa.array([1_700_000_000.0]),
            pa.array(["1700000000"]),
            pa.array(["2023-11-14T22:13:20"]),
            pa.array(["2023-11-14 22:13:20Z"]),
            pa.array(["2023-11-15T00:13:20+02:00"]),
            pa.array([datetime(2023, 11, 14, 22, 13, 20)], pa.timestamp("ns")),  # noqa: DTZ001  naive on purpose
            pa.array([datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)], pa.timestamp("ms", "Europe/Oslo")),
            pa.array(["2023-11-14T22:13:20"]).dictionary_encode(),
        ],
    )
    def test_times(self, connection: Connection, folder: Path, written: pa.Array) -> None:
        write_rows(folder / "items.csv", tiny_items(2))
        table = pa.table({"user_id": ["u"], "item_id": ["i0"], "occurred_at": written})
        pq.write_table(table, folder / "interactions.parquet")
        load_folder(connection, folder)
        assert column(connection, "select occurred_at from interactions") == [
            datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
        ]

    @pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.float64(), pa.string(), pa.large_string()])
    def test_ids_have_no_decimal_point(self, connection: Connection, folder: Path, kind: pa.DataType) -> None:
        ids = pa.array([7, 8]).cast(kind)
        folder.mkdir()
        pq.write_table(pa.table({"item_id": ids}), folder / "items.parquet")
        log = {"user_id": ids, "item_id": ids, "occurred_at": [FIRST_DAY, FIRST_DAY]}
        pq.write_table(pa.table(log), folder / "interactions.parquet")
        load_folder(connection, folder)
        assert column(connection, "select user_id from interactions order by 1") == ["7", "8"]

    def test_json_ids_may_mix_numbers_and_text(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "items.jsonl", [{"item_id": 1}, {"item_id": "b"}])
        write_rows(folder / "interactions.jsonl", events(("u", "b", 1), (5, "b", 2)))  # type: ignore[arg-type]
        load_folder(connection, folder)
        assert column(connection, "select item_id from items order by 1") == ["1", "b"]
        assert column(connection, "select user_id from interactions order by 1") == ["5", "u"]

    def test_attributes(self, connection: Connection, folder: Path) -> None:
        row = {
            "item_id": "a", "words": ["x", None, "y"], "price": 1.5, "adult": False, "released": FIRST_DAY,
            "missing": None, "nan": float("nan"), "attributes": ["a named column"], "code": "0042",
        }  # fmt: skip
        write_rows(folder / "items.parquet", [row])
        load_folder(connection, folder)
        assert column(connection, "select attributes from items") == [
            {
                "words": ["x", "y"], "price": 1.5, "adult": False, "released": "2023-12-27T00:00:00+00:00",
                "attributes": ["a named column"], "code": "0042",
            }
        ]  # fmt: skip

    def test_csv_columns_decide_as_a_whole(self, connection: Connection, folder: Path) -> None:
        rows = [
            {"item_id": "a", "zip": "94043", "year": 1999, "price": 2, "adult": True},
            {"item_id": "b", "zip": "02139", "year": None, "price": 2.5, "adult": False},
        ]
        write_rows(folder / "items.csv", rows)
        load_folder(connection, folder)
        assert column(connection, "select attributes from items order by item_id") == [
            {"zip": "94043", "year": 1999, "price": 2.0, "adult": True},
            {"zip": "02139", "price": 2.5, "adult": False},
        ]

    def test_nan_values_are_missing_ones(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(2))
        write_rows(folder / "interactions.parquet", events(("u", "i0", 1), value=float("nan")))
        load_folder(connection, folder)
        assert column(connection, "select value from interactions") == [None]


class TestParts:
    def test_interactions_without_items_need_known_items(self, connection: Connection, folder: Path) -> None:
        tiny_folder(folder)
        load_folder(connection, folder)
        (folder / "items.parquet").unlink()
        write_rows(folder / "interactions.parquet", events(("new", "i3", 1)))
        assert load_folder(connection, folder).counts["interactions_new"] == 1

    def test_items_alone_are_an_update_of_content(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(4))
        assert load_folder(connection, folder).counts["items_new"] == 4

    def test_nothing_at_all_is_refused(self, connection: Connection, folder: Path) -> None:
        folder.mkdir()
        with pytest.raises(UserError, match="has no interactions, items or users"):
            load_folder(connection, folder)

    def test_several_queries_in_one_second_are_several_events(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(2))
        rows = [*events(("u", "i0", 1), query="red", kind="tag"), *events(("u", "i0", 1), query="blue", kind="tag")]
        write_rows(folder / "interactions.csv", rows)
        load_folder(connection, folder)
        load_folder(connection, folder)
        assert column(connection, "select query from interactions order by position") == ["red", "blue"]

    def test_years_are_partitions_made_on_demand(self, connection: Connection, folder: Path) -> None:
        tiny_folder(folder)
        load_folder(connection, folder)
        write_rows(folder / "interactions.parquet", events(("u0", "i3", -600_000), ("u0", "i3", 1)))
        load_folder(connection, folder)
        partitions = "select inhrelid::regclass::text from pg_inherits where inhparent = 'interactions'::regclass"
        found = sorted(column(connection, partitions))
        assert found == ["interactions_y2022", "interactions_y2023", "interactions_y2024"]
        indexes = "select count(*) from pg_indexes where tablename = 'interactions_y2022'"
        assert column(connection, indexes) == [4]

    def test_changed_days_are_noted_on_both_ways_in(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "items.csv", tiny_items(2))
        for minutes in (1, 2, 1_500):  # a new year's bare table first, then its index
            write_rows(folder / "interactions.csv", events(("u", "i0", minutes)))
            load_folder(connection, folder)
        days = "select day::text from changed_days order by 1"
        assert column(connection, days) == ["2023-12-27", "2023-12-27", "2023-12-28"]


class TestImages:
    def test_without_images_what_is_stored_stays(self, connection: Connection, folder: Path) -> None:
        tiny_folder(folder, images=True)
        load_folder(connection, folder, folder / "images")
        before = contents(connection)
        rows = tiny_items(60, images=True)
        rows[0]["image"] = "other.jpg"
        write_rows(folder / "items.parquet", rows)
        assert load_folder(connection, folder).counts["items_changed"] == 1
        after = contents(connection)
        assert [row[:6] for row in after["items"][1:]] == [row[:6] for row in before["items"][1:]]
        assert after["items"][0][3:6] == ("other.jpg", None, None)

    def test_a_new_file_behind_the_same_name_is_a_change(self, connection: Connection, folder: Path) -> None:
        tiny_folder(folder, images=True)
        load_folder(connection, folder, folder / "images")
        (folder / "images" / "i3.jpg").write_bytes((folder / "images" / "i4.jpg").read_bytes())
        assert load_folder(connection, folder, folder / "images").counts["items_changed"] == 1
        assert len(column(connection, "select image_sha256 from items where item_id in ('i3', 'i4') group by 1")) == 1


def test_the_report_reads_well(connection: Connection, folder: Path) -> None:
    tiny_folder(folder)
    rows = tiny_interactions(40, 60, 16, np.random.default_rng(0))
    rows[4]["item_id"] = "never"
    write_rows(folder / "interactions.parquet", rows)
    report = load_folder(connection, folder)
    text = "\n".join(report.lines())
    assert "interactions: 640 read, 639 new, 0 unchanged, 1 rejected" in text
    assert "interactions.parquet, row 5, item_id is in neither" in text
    assert report.as_json()["rejected"] == [
        {
            "file": "interactions.parquet", "row": 5, "column": "item_id", "value": "never",
            "reason": "is in neither items nor the database",
        }
    ]  # fmt: skip
