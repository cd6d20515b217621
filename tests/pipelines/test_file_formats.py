"""Files as other programs write them: parts, packed, other separators and encodings; read, or told apart in words."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.load import contract, part_files
from pipelines.load.csv_records import RecordCounter
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import write_rows
from tests.pipelines.test_load import Connection, column

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


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "way_out"),
        [
            ("users.json", "jq -c '.[]' users.json > users.jsonl"),
            ("interactions.tsv", "interactions.csv"),
            ("Items.CSV", "call it items.parquet"),
            ("interaction.csv", "call it interactions.parquet"),
            ("interactions-2024.csv", "move it out"),
            ("users.csv.zst", "move it out"),
            ("items.xlsx", "save it as CSV"),
            ("users.zip", "unpack it"),
            ("users", "call it users.parquet"),
            ("users.parquet.gz", "gunzip"),
        ],
    )
    def test_a_look_alike_is_named(self, connection: Connection, folder: Path, name: str, way_out: str) -> None:
        (folder / name).write_bytes(b"user_id\n1\n")
        refused(connection, folder, name, way_out)

    def test_a_folder_of_parts_under_another_name_is_named(self, connection: Connection, folder: Path) -> None:
        write_rows(folder / "interactions" / "part-0.csv", [{"user_id": 1}])
        refused(connection, folder, "has interactions, which looks like the table interactions")

    def test_what_is_no_data_is_told_and_pictures_are_left_alone(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv~").write_text("x")
        (folder / "README.md").write_text("x")
        (folder / "items").mkdir()
        (folder / "items" / "a.jpg").write_bytes(b"x")
        assert load_folder(connection, folder).warnings == ["items.csv~ in the folder was not read"]

    def test_a_broken_link_is_told(self, connection: Connection, folder: Path) -> None:
        (folder / "users.csv").symlink_to(folder / "nosuch")
        refused(connection, folder, "users.csv is neither a file nor a folder")

    @pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
    def test_part_files_are_read_in_order(self, connection: Connection, folder: Path, form: str) -> None:
        parts = folder / f"interactions.{form}"
        rows = [{"user_id": "u", "item_id": item, "occurred_at": 5} for item in ("a", "b", "nosuch")]
        suffix = "json" if form == "jsonl" else f"snappy.{form}" if form == "parquet" else form
        write_rows(parts / f"part-0.{form}", rows[:1]).rename(parts / f"part-0.{suffix}")
        write_rows(parts / f"part-1.{form}", rows[1:]).rename(parts / f"part-1.{suffix}")
        (parts / "_SUCCESS").touch()
        (parts / ".part-0.crc").write_bytes(b"crc")
        if form != "parquet":
            (parts / f"part-2.{suffix}").touch()
        report = load_folder(connection, folder, max_rejected=0.5)
        assert column(connection, "select item_id from interactions order by position") == ["a", "b"]
        [rejection] = report.rejected
        assert (rejection.file, rejection.row) == (f"interactions.{form}/part-1.{suffix}", 2)

    def test_partitions_and_strangers_among_the_parts_are_named(self, connection: Connection, folder: Path) -> None:
        (folder / "users.parquet" / "day=1").mkdir(parents=True)
        refused(connection, folder, "users.parquet/day=1", "without partitions")
        (folder / "users.parquet" / "day=1").rmdir()
        refused(connection, folder, "no part files")
        (folder / "users.parquet" / "part.orc").touch()
        refused(connection, folder, "users.parquet/part.orc is not a part of users.parquet")

    def test_packed_files_are_read(self, connection: Connection, folder: Path) -> None:
        (folder / "interactions.csv.gz").write_bytes(gzip.compress((EVENTS + "u,a,5\nu,c,6\n").encode()))
        (folder / "items.csv").unlink()
        lines = gzip.compress(b'{"item_id": "a"}\n') + gzip.compress(b'{"item_id": "c"}\n')
        (folder / "items.jsonl.gz").write_bytes(lines)
        assert load_folder(connection, folder).counts["interactions_new"] == 2

    @pytest.mark.parametrize(
        ("name", "content", "word"),
        [
            ("users.csv.gz", gzip.compress(b"user_id\n1\n" * 99, mtime=0)[:-9], "cannot be unpacked"),
            ("users.jsonl.gz", b"user_id\n1\n", "cannot be unpacked"),
            ("users.csv", gzip.compress(b"user_id\n1\n", mtime=0), "is gzip (name it .gz)"),
            ("users.csv", b"PAR1", "is Parquet, not CSV"),
        ],
        ids=["cut short", "plain text", "named as if plain", "Parquet"],
    )
    def test_damaged_packings(self, connection: Connection, folder: Path, name: str, content: bytes, word: str) -> None:
        (folder / name).write_bytes(content)
        refused(connection, folder, name, word)

    def test_a_bomb_is_bounded(self, connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(part_files, "HARMLESS_BYTES", 100_000)
        (folder / "users.csv.gz").write_bytes(gzip.compress(b"user_id\n" + b"1\n" * 2_000_000))
        refused(connection, folder, "users.csv.gz unpacks to more than 200 times its size", "gunzip users.csv.gz")

    def test_users_alone_are_loaded(self, connection: Connection, tmp_path: Path) -> None:
        write_rows(tmp_path / "users.csv", [{"user_id": "u", "age": 3}])
        assert load_folder(connection, tmp_path).counts["users_new"] == 1


class TestCsv:
    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ('u,a,5\nu,b,6\nu,a,"7\nu,b,8\n', ("row 3 (line 4)", "never closed")),
            ('"u,a,5\nu,b,6\n', ("row 1 (line 2)", "never closed")),
            ('u,"a,5\nu,"b",6\n', ("row 1 (line 2)", "follows a closing quote")),
            ('u,a,5\n"u"x,b,6\n', ("row 2 (line 3)", "follows a closing quote")),
            ("u,a,5\nu,b\n", ("row 2 (line 3) has 2 fields, but the header has 3",)),
            ("u,a,5\nu\xe9,b,6\n", ("line 3 is not UTF-8", "iconv -f WINDOWS-1252")),
        ],
    )
    def test_what_is_wrong_is_told_by_its_row(
        self, connection: Connection, folder: Path, text: str, words: tuple[str, ...]
    ) -> None:
        (folder / "interactions.csv").write_bytes((EVENTS + text).encode("latin-1"))
        refused(connection, folder, "interactions.csv", *words)

    @pytest.mark.parametrize(("separator", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
    def test_other_separators(self, connection: Connection, folder: Path, separator: str, name: str) -> None:
        rows = "user_id,item_id,occurred_at,value\nu,a,5,%\n".replace(",", separator).replace("%", "9,5")
        (folder / "interactions.csv").write_text(rows)
        refused(connection, folder, f"interactions.csv is separated by {name}", "csv.writer")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("name", ["interactions.csv", "interactions.jsonl"])
    def test_utf_16(self, connection: Connection, folder: Path, encoding: str, name: str) -> None:
        (folder / name).write_bytes((EVENTS + "u,a,5\n").encode(encoding))
        refused(connection, folder, f"{name} is UTF-16", "iconv -f UTF-16 -t UTF-8")

    def test_a_field_above_a_megabyte_is_read_and_above_eight_told(self, connection: Connection, folder: Path) -> None:
        text = "x" * 3_000_000
        write_rows(folder / "items.csv", [{"item_id": "a", "title": text}, {"item_id": "b", "title": "t"}])
        load_folder(connection, folder)
        assert column(connection, "select title = repeat('x', 3000000) from items where item_id = 'a'") == [True]
        write_rows(folder / "items.csv", [{"item_id": "a", "title": text * 6}])
        with pytest.raises(UserError, match=r"items.csv, row 1 .line 2.: a field of more than 8 MiB"):
            load_folder(connection, folder)

    def test_marks_quotes_and_line_ends(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").write_bytes(
            b'\xef\xbb\xbfitem_id,title\r\n\r\na,"two\r\nlines, ""quoted"""\r\nb,5" pipe\r\n'
        )
        (folder / "users.csv").write_bytes(b"user_id,age\ru,5\rv,6")
        load_folder(connection, folder)
        titles = dict(connection.execute("select item_id, title from items").fetchall())
        assert titles == {"a": 'two\r\nlines, "quoted"', "b": '5" pipe'}
        assert column(connection, "select count(*) from users") == [2]

    @given(st.lists(st.lists(st.text('a",\n\r é', max_size=4), min_size=2, max_size=2), max_size=6), st.integers(1, 9))
    def test_the_counter_counts_as_python_does(self, rows: list[list[str]], size: int) -> None:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\r\n", quoting=csv.QUOTE_ALL).writerows(rows)
        content = buffer.getvalue().encode()
        counter = RecordCounter()
        for start in range(0, len(content), size):
            counter.feed(content[start : start + size])
        counter.finish()
        assert (counter.records, counter.regular) == (len(rows), True)

    @given(st.text('a",\n\r', max_size=12))
    def test_the_counter_knows_when_it_does_not_know(self, text: str) -> None:
        counter = RecordCounter()
        counter.feed(text.encode())
        counter.finish()
        if counter.regular:
            strict = csv.reader(io.StringIO(text, newline=""), strict=True)
            assert counter.records == sum(bool(row) for row in strict)


class TestJsonLines:
    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (b'[{"item_id": "a"}, {"item_id": "b"}]', "jq -c '.[]' items.jsonl"),
            (b'[\n {"item_id": "a"}\n]', "jq -c '.[]'"),
            (b'{\n "item_id": "a"}', "jq -c ."),
            ('{"item_id": "é"}'.encode("latin-1"), "iconv -f WINDOWS-1252"),
            (b'{"item_id": true}', "row 1: column item_id holds true"),
            (b'{"item_id": "a"}\n{"item_id": 7.5}', "row 2: column item_id holds 7.5"),
            (b'{"item_id": 1.00000000000000000001}', "column item_id holds 1.0000"),
        ],
    )
    def test_refused(self, connection: Connection, folder: Path, content: bytes, word: str) -> None:
        (folder / "items.csv").unlink()
        (folder / "items.jsonl").write_bytes(content)
        refused(connection, folder, "items.jsonl", word)

    @pytest.mark.parametrize("rows", [1, 100])
    def test_ids_are_what_they_are_whatever_lies_beside_them(
        self, connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int
    ) -> None:
        monkeypatch.setattr(contract, "BATCH_ROWS", rows)
        (folder / "items.csv").unlink()
        ids = ["NaN", '"x"', "7.0", "8", "18446744073709551616", "null", '""', '"\\u200b"']
        (folder / "items.jsonl").write_text("\n".join(f'{{"item_id": {value}}}' for value in ids))
        report = load_folder(connection, folder, max_rejected=0.5)
        assert column(connection, 'select item_id from items order by item_id collate "C"') == [
            "18446744073709551616", "7", "8", "x",
        ]  # fmt: skip
        assert [(r.row, r.column, r.reason) for r in report.rejected] == [
            (row, "item_id", "is empty") for row in (1, 6, 7, 8)
        ]

    @pytest.mark.parametrize("rows", [1, 100])
    def test_times_are_what_they_are_whatever_lies_beside_them(
        self, connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch, rows: int
    ) -> None:
        monkeypatch.setattr(contract, "BATCH_ROWS", rows)
        times = ["20240131", '"20240131"', "1.5", '"1.5"', "true", "1e300", "NaN", '"x"', str(2**64)]
        (folder / "interactions.jsonl").write_text(
            "\n".join(f'{{"user_id": "u", "item_id": "a", "occurred_at": {value}}}' for value in times)
        )
        report = load_folder(connection, folder, max_rejected=0.9)
        assert [rejection.row for rejection in report.rejected] == [5, 6, 7, 8, 9]
        found = column(connection, "select extract(epoch from occurred_at)::float from interactions order by position")
        assert found == [20240131.0, 1706659200.0, 1.5]

    def test_thousands_of_digits_and_a_key_twice_are_rejected_rows(self, connection: Connection, folder: Path) -> None:
        (folder / "items.csv").unlink()
        digits = "9" * 5000
        lines = [
            f'{{"item_id": {digits}}}', f'{{"item_id": "b", "n": [1, {digits}]}}',
            '{"item_id": "c", "title": "one", "title": "two"}', '{"item_id": "d", "n": [1]}',
        ]  # fmt: skip
        (folder / "items.jsonl").write_text("\n".join(lines))
        report = load_folder(connection, folder, max_rejected=0.9)
        assert [(r.row, r.column, r.reason) for r in report.rejected] == [
            (1, "item_id", "is a number of 5,000 digits"),
            (2, "n", "is a number of 5,000 digits"),
            (3, "title", "appears twice in one row"),
        ]
        assert column(connection, "select item_id from items") == ["d"]
