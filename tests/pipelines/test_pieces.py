"""Files read in pieces, rejections beyond those that are kept, days beyond those that are marked."""

from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.csv as pacsv
import pytest

from pipelines.load.folder import load_folder
from pipelines.orchestration.data_assets import _newest
from polytower.postgres import connect
from tests.conftest import cloned
from tests.factories import tiny_folder, tiny_items, write_rows
from tests.test_pieces import EVENTS, ITEMS, USERS, tables

OPEN_CSV = pacsv.open_csv


@pytest.mark.parametrize("file_format", ["parquet", "jsonl", "csv"])
def test_every_format_is_read_in_pieces(
    server: str, file_format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / "data", USERS, ITEMS, file_format=file_format, events=EVENTS)
    found = []
    for size in (1 << 20, 7):
        monkeypatch.setattr("pipelines.load.contract.BATCH_ROWS", size)
        # CSV is cut by bytes: about seven rows of the log.
        options = pacsv.ReadOptions(block_size=size * 60)
        monkeypatch.setattr("pipelines.load.contract.pacsv.open_csv", partial(OPEN_CSV, read_options=options))
        with cloned(server, f"pieces_{file_format}") as url, connect(url) as connection:
            found.append((load_folder(connection, folder).counts, tables(connection)))
    assert found[0] == found[1]


def test_more_rejected_rows_than_are_kept_are_counted(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("rejections", "entities", "interactions"):
        monkeypatch.setattr(f"pipelines.load.{module}.KEPT_PER_FILE", 3)
    items = tiny_items(40)
    again = [{**row, "title": f"another {row['title']}"} for row in items[:10]]
    write_rows(tmp_path / "items.jsonl", [*items, *again])
    event = {"user_id": "u", "item_id": "i1"}
    good = [event | {"occurred_at": f"2024-01-01T00:00:{n:02d}Z"} for n in range(60)]
    unknown = [row | {"item_id": "nothing"} for row in good[:10]]
    timeless = [event | {"occurred_at": "yesterday"} for _ in range(10)]
    write_rows(tmp_path / "interactions.jsonl", [*good, *unknown, *timeless])
    with cloned(server, "pieces_rejected") as url, connect(url) as connection:
        counts = load_folder(connection, tmp_path, max_rejected=1.0).counts
        kept = connection.execute("select file, count(*) from rejected_rows group by file order by file").fetchall()
    assert (counts["items_rejected"], counts["items_new"]) == (10, 40)
    assert (counts["interactions_rejected"], counts["interactions_new"]) == (20, 60)
    assert kept == [("interactions.jsonl", 3), ("items.jsonl", 3)]


def test_the_newest_days_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.orchestration.data_assets.MARKED_DAYS", 3)
    first = date(2023, 12, 28)
    assert _newest((first, first + timedelta(days=9))) == [date(2024, 1, day) for day in (4, 5, 6)]
    assert _newest((first, first + timedelta(days=1))) == [first, first + timedelta(days=1)]
