"""Inputs that users of neighbouring projects stumbled over: each is read with nothing changed, or refused in words."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.schema import MAX_AHEAD_SECONDS
from pipelines.load.digits import is_number
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import write_rows
from tests.pipelines.test_load import FORMATS, Connection, column

EVENTS = "user_id,item_id,occurred_at\n"


@pytest.fixture
def connection(emptied: Connection) -> Connection:
    return emptied


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    write_rows(path / "items.csv", [{"item_id": "a"}, {"item_id": "b"}])
    return path


def refused(connection: Connection, folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_folder(connection, folder)
    for word in words:
        assert word in str(caught.value)
    assert column(connection, "select count(*) from items") == [0]


class TestDigits:
    @pytest.mark.parametrize("form", FORMATS)
    def test_no_digit_is_lost_and_the_filter_finds_one(self, connection: Connection, folder: Path, form: str) -> None:
        (folder / "items.csv").unlink()
        authors = [1460323737035677698, 1460323737035677699, 5]
        write_rows(folder / f"items.{form}", [{"item_id": str(n), "author": a} for n, a in enumerate(authors)])
        report = load_folder(connection, folder)
        assert report.attributes == {"items": {"author": "text"}}
        statement = "select count(*) from items where attributes @@ filter_path(%s)"
        for author in authors:
            assert connection.execute(statement, [json.dumps({"author": str(author)})]).fetchone() == (1,)

    def test_decimals(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").unlink()
        prices = pa.array([Decimal("9.50"), Decimal("10.00")], pa.decimal128(18, 2))
        exact = pa.array([Decimal("1.2345678901234567891"), None], pa.decimal128(38, 19))
        pq.write_table(pa.table({"item_id": ["a", "b"], "price": prices, "exact": exact}), folder / "items.parquet")
        load_folder(connection, folder)
        assert column(connection, "select attributes from items order by item_id") == [
            {"price": 9.5, "exact": "1.2345678901234567891"}, {"price": 10.0},
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("0", True), ("-3", True), ("9.50", True), ("0.1", True), ("1e-05", True), ("1.5E10", True),
            ("9007199254740992", True), ("0.10000000000000001", True), ("2.2250738585072014e-308", True),
            ("9007199254740993", False), ("12E12", False), ("5E10", False), ("13E400", False), ("1e-400", False),
            ("02139", False), ("+5", False), ("1_000", False), ("٣", False), (" 5", False), ("1.2E400", False),
            ("0.1000000000000000055", False), ("9" * 5000, False), ("nan", False), ("", False),
        ],
    )  # fmt: skip
    def test_a_number_is_what_survives_being_one(self, text: str, number: bool) -> None:
        assert is_number(text) is number

    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_every_float_that_python_writes_is_one(self, value: float) -> None:
        assert is_number(repr(value))
        assert is_number(format(value, ".17g")) or "e" in format(value, ".17g") or abs(value) > 2**53

    def test_codes_in_csv_stay_text(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").write_text("item_id,code,big\na,12E12,1\nb,13E400,9007199254740993\n")
        load_folder(connection, folder)
        assert column(connection, "select attributes from items order by 1") == [
            {"code": "12E12", "big": "1"}, {"code": "13E400", "big": "9007199254740993"},
        ]  # fmt: skip

    def test_an_infinite_attribute_is_a_rejected_row(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").unlink()
        write_rows(folder / "items.parquet", [{"item_id": "a", "x": float("inf")}, {"item_id": "b", "x": [1.0][0]}])
        report = load_folder(connection, folder, max_rejected=0.5)
        assert [(r.column, r.reason) for r in report.rejected] == [("x", "is not a finite number")]


class TestTimes:
    def test_float32_seconds_are_refused(self, connection: Connection, folder: Path) -> None:
        seconds = pa.array([1_700_000_000 + 10 * n for n in range(10)], pa.float64()).cast(pa.float32())
        table = pa.table({"user_id": ["u"] * 10, "item_id": ["a"] * 10, "occurred_at": seconds})
        pq.write_table(table, folder / "interactions.parquet")
        refused(connection, folder, "interactions.parquet: column occurred_at holds float", "128 s apart")

    @pytest.mark.parametrize("kind", [pa.uint64(), pa.int64(), pa.float64()], ids=str)
    def test_integers_of_all_sizes(self, connection: Connection, folder: Path, kind: pa.DataType) -> None:
        sizes = [5, 2**62, 2**63 - 1 if kind == pa.int64() else 2**63]
        times = pa.array(map(float, sizes) if kind == pa.float64() else sizes, kind)
        table = pa.table({"user_id": ["u"] * 3, "item_id": ["a"] * 3, "occurred_at": times})
        pq.write_table(table, folder / "interactions.parquet")
        report = load_folder(connection, folder, max_rejected=0.9)
        assert [(r.row, r.column) for r in report.rejected] == [(2, "occurred_at"), (3, "occurred_at")]

    def test_what_lies_ahead_is_rejected(self, connection: Connection, folder: Path) -> None:
        now = datetime.now(UTC)
        skews = (MAX_AHEAD_SECONDS - 60, MAX_AHEAD_SECONDS + 60)
        write_rows(
            folder / "interactions.csv",
            [{"user_id": "u", "item_id": "a", "occurred_at": now + timedelta(seconds=skew)} for skew in skews],
        )
        report = load_folder(connection, folder, max_rejected=0.5)
        assert [(r.row, r.column) for r in report.rejected] == [(2, "occurred_at")]


class TestPartialFiles:
    def test_a_file_changes_the_columns_that_it_has(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").unlink()
        item = {"title": "T", "description": "D", "image": "a.jpg", "price": 3, "tags": ["x"]}
        write_rows(folder / "items.jsonl", [{"item_id": "a", **item}, {"item_id": "b", **item}])
        load_folder(connection, folder)
        (folder / "items.jsonl").unlink()
        (folder / "items.csv").write_text("item_id,available,price\na,false,\nb,true,4\nc,false,5\n")
        report = load_folder(connection, folder)
        statement = "select item_id, title, description, image, available, attributes from items order by 1"
        assert connection.execute(statement).fetchall() == [
            ("a", "T", "D", "a.jpg", False, {"tags": ["x"]}),
            ("b", "T", "D", "a.jpg", True, {"tags": ["x"], "price": 4}),
            ("c", None, None, None, False, {"price": 5}),
        ]
        assert (report.counts["items_new"], report.counts["items_changed"]) == (1, 2)
        assert load_folder(connection, folder).counts["items_unchanged"] == 3

    def test_a_key_that_a_json_line_leaves_out_says_nothing(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").unlink()
        write_rows(folder / "items.jsonl", [{"item_id": n, "title": "T", "x": 1, "available": False} for n in "ab"])
        load_folder(connection, folder)
        write_rows(folder / "items.jsonl", [{"item_id": "a", "title": None, "x": None}, {"item_id": "b"}])
        load_folder(connection, folder)
        statement = "select item_id, title, available, attributes from items order by 1"
        assert connection.execute(statement).fetchall() == [("a", None, False, {}), ("b", "T", False, {"x": 1})]

    def test_users_too(self, connection: Connection, tmp_path: Path) -> None:
        write_rows(tmp_path / "users.csv", [{"user_id": "u", "age": 3, "city": "Oslo"}])
        load_folder(connection, tmp_path)
        write_rows(tmp_path / "users.csv", [{"user_id": "u", "age": 4}])
        load_folder(connection, tmp_path)
        assert column(connection, "select attributes from users") == [{"age": 4, "city": "Oslo"}]


class TestAttributes:
    @pytest.mark.parametrize(
        ("first", "second"), [("Color", "color"), ("color ", "color"), ("Title", "title"), ("caf\u00e9", "cafe\u0301")]
    )
    @pytest.mark.parametrize("form", FORMATS)
    def test_names_that_are_near_alike(
        self, connection: Connection, folder: Path, form: str, first: str, second: str
    ) -> None:
        (folder / "items.csv").unlink()
        write_rows(folder / f"items.{form}", [{"item_id": "a", first: "x"}, {"item_id": "b", second: "x"}])
        refused(connection, folder, f"items.{form} has the column", repr(first), repr(second))

    def test_a_column_without_a_name(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").write_text(",item_id\n0,a\n")
        refused(connection, folder, "a column without a name", "index=False")

    def test_types_are_told(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").write_text('item_id,zip,n,tags,flag,none\na,02139,1,"[""x"", 2]",true,\n')
        report = load_folder(connection, folder)
        assert report.attributes["items"] == {
            "zip": "text", "n": "number", "tags": "text and number", "flag": "true/false", "none": "no value",
        }  # fmt: skip
        assert any("attributes: zip text, n number" in line for line in report.lines())

    def test_a_type_that_turns_is_told_with_the_rows(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").write_text("item_id,zip\na,12345\nb,12346\nc,12347\n")
        assert load_folder(connection, folder).warnings == []
        (folder / "items.csv").write_text("item_id,zip\nb,12346\nc,02139\n")
        report = load_folder(connection, folder)
        [warning] = report.warnings
        assert "attribute zip of items is text in 2 values (first in row 1 of items.csv)" in warning
        assert "number in 1 values (such as item_id 'a')" in warning
        assert any(warning in line for line in report.lines())

    def test_blanks_around_ids_are_told(self, connection: Connection, folder: Path) -> None:
        (folder / "interactions.csv").write_text(EVENTS + "u,a,5\nu ,a,5\n")
        assert (
            "1 values of user_id have blanks around them (the first in row 2)"
            in load_folder(connection, folder).warnings[0]
        )


class TestValues:
    @pytest.mark.parametrize("form", FORMATS)
    def test_no_number_is_rounded_without_a_word(self, connection: Connection, folder: Path, form: str) -> None:
        values: list[Any] = [2**53, 2**53 + 1, 5, -(2**60)]
        write_rows(
            folder / f"interactions.{form}",
            [{"user_id": "u", "item_id": "a", "occurred_at": n, "value": v} for n, v in enumerate(values)],
        )
        report = load_folder(connection, folder, max_rejected=0.6)
        assert [rejection.row for rejection in report.rejected] == [2, 4]

    def test_what_python_alone_calls_a_number_is_none(self, connection: Connection, folder: Path) -> None:
        (folder / "interactions.csv").write_text("user_id,item_id,occurred_at,value\nu,a,5,1_000\nu,a,6,1e3\n")
        report = load_folder(connection, folder, max_rejected=0.5)
        assert [rejection.value for rejection in report.rejected] == ["1_000"]
