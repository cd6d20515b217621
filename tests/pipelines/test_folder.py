"""A contract folder as arrays: the ids, rows and clock that `polytower load` gives."""

import json
from datetime import date, timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import psycopg
import pytest

from encoders.experiments.experiment import with_users
from pipelines.generation.training_set import read_training_set
from pipelines.load.dataset import read_folder
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import FIRST_DAY, Format, tiny_folder, write_rows

FORMATS = get_args(Format)
EVENTS = [
    {"user_id": user, "item_id": item, "occurred_at": FIRST_DAY + timedelta(seconds=seconds), **more}
    for user, item, seconds, more in (
        ("007", "01", 9, {}),
        ("7", "1", 3, {"kind": "view"}),
        ("7", "1", 3, {"kind": "view"}),
        ("7", "1", 3, {"kind": "buy"}),
        ("7", "01", 3, {"query": "red"}),
        ("7", "01", 3, {"query": "blue"}),
        ("ann", "1", 1, {"event_id": "e1"}),
        ("ann", "1", 1, {"event_id": "e2"}),
        ("ann", "1", 1, {"event_id": "e1"}),
    )
]


def loaded(connection: psycopg.Connection[Any], folder: Path) -> dict[str, list[tuple[str, int]]]:
    """User → (item, µs) of each event, in order, as the towers learn from a database."""
    load_folder(connection, folder, max_rejected=0.5)
    snapshot = read_training_set(connection)
    return histories(snapshot.catalogue.item_ids, snapshot.histories)


def histories(item_ids: list[str], found: Any) -> dict[str, list[tuple[str, int]]]:
    times = np.split(found.times, found.offsets[1:-1])
    return {
        user: [(item_ids[item], int(time)) for item, time in zip(found.of(row), times[row], strict=True)]
        for row, user in enumerate(found.user_ids)
    }


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_folder_and_a_database_say_the_same(emptied: psycopg.Connection, tmp_path: Path, file_format: str) -> None:
    write_rows(tmp_path / f"items.{file_format}", [{"item_id": "1"}, {"item_id": "01"}])
    write_rows(tmp_path / f"interactions.{file_format}", EVENTS)
    data, _ = read_folder(tmp_path)
    assert histories(data.item_ids, data.histories) == loaded(emptied, tmp_path)
    assert data.histories.lengths.tolist() == [1, 4, 2]


def test_numbers_are_seconds_and_ids_are_text_in_both(emptied: psycopg.Connection, tmp_path: Path) -> None:
    rows = ["user_id,item_id,occurred_at", "007,01,1700000000", "7,1,1700000001", "7,01,x", "7,nosuch,1700000002"]
    (tmp_path / "interactions.csv").write_text("\n".join(rows))
    (tmp_path / "items.csv").write_text("item_id,title\n01,one\n1,two\n1,three\n")
    data, rejections = read_folder(tmp_path, max_rejected=0.5)
    found = histories(data.item_ids, data.histories)
    assert found == {"007": [("01", 1_700_000_000_000_000)], "7": [("1", 1_700_000_001_000_000)]}
    assert found == loaded(emptied, tmp_path)
    assert [(rejection.row, rejection.column) for rejection in rejections.kept] == [(3, "occurred_at"), (4, "item_id")]
    with pytest.raises(UserError, match="2 of 4 rows are faulty"):
        read_folder(tmp_path)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_format_reads_the_same(tmp_path: Path, file_format: Format) -> None:
    found, _ = read_folder(tiny_folder(tmp_path / "one", file_format=file_format))
    expected, _ = read_folder(tiny_folder(tmp_path / "other"))
    assert found.item_ids == expected.item_ids == [f"i{item}" for item in range(60)]
    assert found.items == expected.items
    assert found.users == expected.users
    assert found.histories.fingerprint() == expected.histories.fingerprint()


def test_a_folder_without_items_has_the_items_of_its_events(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "interactions.parquet",
        [{"user_id": 1, "item_id": 7, "occurred_at": 5}, {"user_id": 1, "item_id": 12, "occurred_at": 5}],
    )
    data, _ = read_folder(tmp_path)
    assert (data.item_ids, data.items, data.users) == (["12", "7"], [], None)
    assert data.histories.items.tolist() == [1, 0]


def test_what_is_known_of_users_is_in_the_order_of_the_histories(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "users.parquet",
        [{"user_id": "b", "born": date(1990, 5, 1), "scores": [1.0, float("nan")]}, {"user_id": "b", "born": None}],
    )
    write_rows(
        tmp_path / "interactions.csv", [{"user_id": user, "item_id": "i", "occurred_at": 5} for user in ("b", "a")]
    )
    data, _ = read_folder(tmp_path)
    assert data.users == [{}, {"born": "1990-05-01", "scores": [1.0]}]
    assert with_users(data, 32).attributes.any(axis=1).tolist() == [False, True]  # type: ignore[union-attr]
    (tmp_path / "users.parquet").unlink()
    with pytest.raises(UserError, match="holds no users"):
        with_users(read_folder(tmp_path)[0], 32)


def test_bad_folders_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no interactions"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_folder(tmp_path / "nosuch")
    path = tmp_path / "interactions.jsonl"
    path.write_text(json.dumps({"user_id": "a", "item_id": "b", "occurred_at": "yesterday"}))
    with pytest.raises(UserError, match="1 of 1 rows are faulty"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="no row is left"):
        read_folder(tmp_path, max_rejected=1)
