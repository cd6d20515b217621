"""Nasty values and damaged files, drawn: a load ends with the values as they were, a rejected row, or words."""

import json
import tempfile
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.load import contract
from pipelines.load.dataset import read_folder
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import write_rows
from tests.pipelines.test_load import FORMATS, Connection

NASTY = st.one_of(
    st.sampled_from(
        [
            "", " ", "NaN", "null", "true", "7.0", "007", "-0", "-0.0", "1e5", "12E12", "1e400", "9" * 40, "9" * 5000,
            "\\N", '"', "''", "a,b", "a\nb", "\r\n", "\u200b", "\ufeff", "é", "e\u0301", "\U0001f600", "[1, 2]", "{}",
            "2024-02-30", "20240131", "1970-01-01", "0", "1.5", "inf", "1_0", "٣", "\x7f", "[" * 3000, "1 ", " x",
        ]
    ),
    st.text(max_size=8),
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
)  # fmt: skip
ANY = st.one_of(
    st.none(),
    NASTY,
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.lists(st.one_of(st.none(), st.floats(), st.text(max_size=3), st.integers(-(2**62), 2**62)), max_size=3),
)
COLUMNS = ("item_id", "title", "available", "x", "y")
ARROW = (
    pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(),
    pa.binary(), pa.date32(), pa.timestamp("s"), pa.timestamp("ns", "Europe/Oslo"), pa.decimal128(38, 10),
    pa.time64("us"), pa.duration("s"), pa.list_(pa.float64()), pa.struct([("a", pa.int64())]), pa.null(),
    pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.int64()), pa.list_(pa.list_(pa.int64())),
)  # fmt: skip
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def same(cell: str, value: Any) -> bool:
    """Whether a stored attribute is what the cell of a CSV file says."""
    if isinstance(value, bool):
        return cell.lower() == str(value).lower()
    if isinstance(value, str):
        return value == cell
    if isinstance(value, list):
        return [v for v in json.loads(cell) if v is not None] == value
    return Decimal(cell) in (Decimal(str(value)), Decimal(format(value, ".17g"))) or Decimal(cell) == 0 == value


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(st.lists(st.tuples(NASTY, NASTY, NASTY), min_size=1, max_size=6), st.sampled_from([1, 2, 100]))
def test_csv_changes_no_value(rows: list[tuple[str, str, str]], size: int) -> None:
    with tempfile.TemporaryDirectory() as name, patch.object(contract, "BATCH_ROWS", size):
        folder = Path(name)
        cells = [{"item_id": f"i{n}", "title": title, "x": x, "y": y} for n, (title, x, y) in enumerate(rows)]
        write_rows(folder / "items.csv", cells)
        write_rows(folder / "interactions.csv", [{"user_id": "u", "item_id": "i0", "occurred_at": 5}])
        try:
            data, rejections = read_folder(folder, max_rejected=1)
        except UserError:
            return  # the item of the only event was rejected
        rejected = {rejection.row for rejection in rejections.kept}
        kept = [row for number, row in enumerate(cells, start=1) if number not in rejected]
        assert data.item_ids == [row["item_id"] for row in kept]
        for row, item in zip(kept, data.items, strict=True):
            assert item["title"] == row["title"]
            for name in ("x", "y"):
                assert same(row[name], item["attributes"][name]) if name in item["attributes"] else not row[name]


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(st.lists(st.tuples(*[ANY] * len(COLUMNS)), min_size=1, max_size=5), st.sampled_from([1, 2, 100]))
def test_anything_is_loaded_rejected_or_refused(
    emptied: Connection, form: str, rows: list[tuple[Any, ...]], size: int
) -> None:
    with tempfile.TemporaryDirectory() as name, patch.object(contract, "BATCH_ROWS", size):
        folder = Path(name)
        cells = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        try:
            write_rows(folder / f"items.{form}", cells)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            return  # this format cannot hold it
        try:
            report = load_folder(emptied, folder, max_rejected=1)
        except UserError:
            return
        counts = report.counts
        kinds = ("new", "changed", "unchanged", "rejected")
        assert sum(counts[f"items_{kind}"] for kind in kinds) == counts["items_read"] == len(rows)


@settings(max_examples=50, deadline=None, suppress_health_check=SLOW)
@given(st.data(), st.sampled_from(ARROW), st.sampled_from(["user_id", "occurred_at", "value", "kind", "x", "title"]))
def test_every_arrow_type_in_every_column(emptied: Connection, data: st.DataObject, kind: Any, name: str) -> None:
    ints = data.draw(st.lists(st.integers(-3, 2**40), min_size=1, max_size=4))
    try:
        array = pa.array(ints, pa.int64()).cast(kind)
    except (pa.ArrowException, OverflowError):
        array = pa.nulls(len(ints), kind)
    with tempfile.TemporaryDirectory() as folder:
        table = "items" if name in ("x", "title") else "interactions"
        columns: dict[str, Any] = {"item_id": [str(n) for n in range(len(ints))], "user_id": ["u"] * len(ints)}
        columns["occurred_at"] = list(range(len(ints)))
        if table == "items":
            columns = {"item_id": columns["item_id"]}
        try:
            pq.write_table(pa.table({**columns, name: array}), Path(folder) / f"{table}.parquet")
        except (pa.ArrowException, OverflowError):
            return
        with suppress(UserError):
            load_folder(emptied, Path(folder), max_rejected=1)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(st.data())
def test_damaged_files_are_refused_in_words(emptied: Connection, form: str, data: st.DataObject) -> None:
    rows = [{"item_id": f"i{n}", "title": 'a "b", c', "n": n, "tags": ["x"]} for n in range(9)]
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder) / f"items.{form}", rows)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content) - 1))
            content[place : place + data.draw(st.integers(0, 3))] = data.draw(
                st.one_of(
                    st.binary(max_size=3), st.sampled_from([b'"', b"\n", b"\r", b",", b"{", b"]", b"\0", b"\xff"])
                )
            )
        path.write_bytes(content)
        with suppress(UserError):
            load_folder(emptied, Path(folder), max_rejected=1)
