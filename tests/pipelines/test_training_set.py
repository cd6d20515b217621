"""The training set is the tables, in the order that the contract names."""

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from encoders.content.registry import CONTENT_ENCODERS
from pipelines.content_embeddings import encode_modality
from pipelines.generation.training import aligned
from pipelines.generation.training_set import read_catalogue, read_histories, read_training_set
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from tests.factories import tiny_folder


@pytest.fixture
def loaded(connection: psycopg.Connection[Any], tmp_path: Path) -> psycopg.Connection[Any]:
    load_folder(connection, tiny_folder(tmp_path / "data"))
    encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    connection.commit()
    return connection


def test_histories_are_the_interactions_oldest_first(
    loaded: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.generation.training_set.USERS_BATCH", 13)  # 40 users: three rounds and a remainder
    catalogue, _ = read_catalogue(loaded)
    histories = read_histories(loaded, catalogue)
    expected: dict[str, list[str]] = {}
    for user, item in loaded.execute("select user_id, item_id from interactions order by occurred_at, position"):
        expected.setdefault(user, []).append(item)
    found = {
        user: [catalogue.item_ids[item] for item in histories.of(row)] for row, user in enumerate(histories.user_ids)
    }
    assert found == expected
    assert histories.user_ids == sorted(expected)


def test_ids_that_need_quoting_survive(connection: psycopg.Connection[Any]) -> None:
    connection.execute(
        "create table interactions_y2020 partition of interactions for values from ('2020-01-01') to ('2021-01-01')"
    )
    odd = ['a"b', "c,d", "e\nf", "", "ü", "NULL", " "]
    for name in odd[:3] + odd[4:]:
        connection.execute("insert into items (item_id) values (%s)", [name])
        connection.execute(
            "insert into interactions (user_id, item_id, occurred_at) values (%s, %s, '2020-01-01Z')", [name, name]
        )
    catalogue, _ = read_catalogue(connection)
    histories = read_histories(connection, catalogue)
    assert histories.user_ids == [catalogue.item_ids[histories.of(row)[0]] for row in range(len(histories))]
    assert len(histories) == 6


def test_content_is_read_by_item_and_absence_is_told(
    loaded: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.generation.training_set.ITEMS_BATCH", 7)
    catalogue, revisions = read_catalogue(loaded)
    assert set(revisions) == {"attributes"}
    stored = dict(loaded.execute("select item_id, embedding from content_embeddings").fetchall())
    for row, item_id in enumerate(catalogue.item_ids):
        assert catalogue.present["attributes"][row] == (item_id in stored)
        if item_id in stored:
            np.testing.assert_array_equal(catalogue.content["attributes"][row], stored[item_id].to_numpy())


def test_an_empty_database_has_nothing_to_learn_from(connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(UserError, match="no interactions"):
        read_training_set(connection)


def test_a_snapshot_outlives_new_items_and_lost_ones(loaded: psycopg.Connection[Any]) -> None:
    catalogue, _ = read_catalogue(loaded)
    some = catalogue.item_ids[5:2:-1]
    cut = aligned(catalogue, some)
    assert cut.item_ids == some
    np.testing.assert_array_equal(cut.content["attributes"], catalogue.content["attributes"][5:2:-1])
    lost = aligned(catalogue, [*some, "gone"])
    assert lost.item_ids == [*some, "gone"]
    np.testing.assert_array_equal(lost.content["attributes"][:3], cut.content["attributes"])
    assert not lost.content["attributes"][3].any()
    assert not lost.present["attributes"][3]
