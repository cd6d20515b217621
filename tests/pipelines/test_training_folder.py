"""The training set's folder holds what the database held, under a name that its content decides."""

import dataclasses
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import psycopg
import pytest

from encoders.catalogue import Histories
from encoders.content.registry import CONTENT_ENCODERS
from pipelines.content_embeddings import encode_modality
from pipelines.generation import training_folder
from pipelines.generation.training import read_snapshot
from pipelines.generation.training_set import TrainingSet, read_training_set
from pipelines.load.folder import load_folder
from pipelines.orchestration.materialize import materialize
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import tiny_folder

WIDTH = 16
NEW_YEAR = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def loaded(connection: psycopg.Connection[Any], tmp_path: Path) -> psycopg.Connection[Any]:
    load_folder(connection, tiny_folder(tmp_path / "data"))
    encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    connection.execute("""insert into users (user_id, attributes) values ('idle ü', '{"age": 41, "of": ["a", "b"]}')""")
    connection.commit()
    return connection


def assert_same(one: TrainingSet, other: TrainingSet) -> None:
    for field in dataclasses.fields(Histories):
        np.testing.assert_array_equal(getattr(one.histories, field.name), getattr(other.histories, field.name))
    assert one.catalogue.item_ids == other.catalogue.item_ids
    assert one.catalogue.modalities == other.catalogue.modalities
    assert one.catalogue.modalities
    np.testing.assert_array_equal(one.catalogue.content["attributes"], other.catalogue.content["attributes"])
    np.testing.assert_array_equal(one.catalogue.present["attributes"], other.catalogue.present["attributes"])
    assert (one.encoders, one.until, one.before) == (other.encoders, other.until, other.before)


@pytest.mark.parametrize("width", [0, WIDTH])
@pytest.mark.parametrize("before", [None, NEW_YEAR], ids=str)
def test_the_folder_says_what_the_database_says(
    loaded: psycopg.Connection[Any], tmp_path: Path, width: int, before: datetime | None
) -> None:
    written = training_folder.save(loaded, tmp_path / "sets", before=before)
    found = training_folder.load(written.directory, width)
    assert_same(found, read_training_set(loaded, width, before=before))
    assert not found.catalogue.present["attributes"].all()
    assert (written.events, written.until) == (len(found.histories.items), found.until)
    assert written.users == len(found.histories.active())
    if before is not None:
        assert found.histories.times.max() < before.timestamp() * 1e6
        assert 0 < written.events < len(read_training_set(loaded).histories.items)


def test_nobody_else_reads_it(loaded: psycopg.Connection[Any], tmp_path: Path) -> None:
    directory = training_folder.save(loaded, tmp_path / "sets").directory
    modes = {each.name: each.stat().st_mode & 0o777 for each in (directory.parent, directory, *directory.iterdir())}
    assert modes == {"sets": 0o700, directory.name: 0o700} | dict.fromkeys(training_folder.FILES, 0o600)


def test_content_decides_the_name_and_the_newest_stay(loaded: psycopg.Connection[Any], tmp_path: Path) -> None:
    root = tmp_path / "sets"
    first = training_folder.save(loaded, root)
    again = training_folder.save(loaded, root)
    assert (first.reused, again.reused, again.directory) == (False, True, first.directory)
    others = []
    for day in range(1, 1 + training_folder.KEPT):
        loaded.execute(
            "insert into interactions (user_id, item_id, occurred_at) values ('u1', 'i1', %s)",
            [datetime(2024, 2, day, tzinfo=UTC)],
        )
        others.append(training_folder.save(loaded, root).directory)
    assert len({first.directory, *others}) == 1 + training_folder.KEPT
    assert {each for each in root.iterdir() if each.is_dir()} == set(others)


def test_a_write_that_fails_or_is_killed_leaves_nothing(
    loaded: psycopg.Connection[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "sets"
    left = root / ".partial-killed"
    left.mkdir(parents=True)
    (left / "items.arrow").write_text("half")
    with monkeypatch.context() as patch:
        patch.setattr(training_folder, "read_profiles", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            training_folder.save(loaded, root)
    assert not [each for each in root.iterdir() if each.is_dir()]


def _interrupted(_: Any) -> Iterator[Any]:
    yield from ()
    raise KeyboardInterrupt


def test_what_is_gone_or_damaged_is_refused(loaded: psycopg.Connection[Any], tmp_path: Path) -> None:
    directory = training_folder.save(loaded, tmp_path / "sets").directory
    events = bytearray((directory / "events.arrow").read_bytes())
    events[len(events) // 2] ^= 1
    (directory / "events.arrow").write_bytes(events)
    with pytest.raises(UserError, match="damaged"):
        training_folder.load(directory)
    (directory / "events.arrow").unlink()
    with pytest.raises(UserError, match="damaged"):
        training_folder.load(directory)
    with pytest.raises(UserError, match="no such training set"):
        training_folder.load(tmp_path / "sets" / "0123456789abcdef")


def test_a_moment_before_all_events_is_refused(loaded: psycopg.Connection[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no interactions before 1999-01-01T00:00:00"):
        training_folder.save(loaded, tmp_path / "sets", before=datetime(1999, 1, 1, tzinfo=UTC))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_checkpoint_learns_from_the_folder_alone(platform: str, tmp_path: Path) -> None:
    """The lineage that Dagster draws is the way that the data takes: the database may be empty meanwhile."""
    with dg.DagsterInstance.ephemeral() as instance, connect(platform) as connection:
        load_folder(connection, tiny_folder(tmp_path / "data"))
        given = {"preset": "tiny", "options": {"epochs": 1}, "progress": False, "instance": instance}
        made = materialize(selection=["training_set"], **given)["assets"]["training_set"]
        connection.execute("truncate interactions, items, users")
        connection.commit()
        trained = materialize(selection=["checkpoint"], **given)["assets"]["checkpoint"]
    assert trained["training set"] == made["path"]
    item_ids, histories = read_snapshot(Path(trained["directory"]))
    assert (len(item_ids), len(histories.items)) == (60, made["dagster/row_count"]) == (60, 640)
