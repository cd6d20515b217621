"""From a training set to a live generation on tiny data: the towers' word is stored, and cold items are found."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from encoders.content.registry import CONTENT_ENCODERS
from encoders.evaluation.evaluate import padded
from encoders.training import checkpoint
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.training import aligned, located, read_checkpoint, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import tiny_folder


@dataclass(frozen=True)
class Built:
    """A live generation and the folder of its checkpoint."""

    connection: psycopg.Connection[Any]
    checkpoints: Path
    directory: Path
    generation: int


@pytest.fixture(scope="module")
def built(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    home = tmp_path_factory.mktemp("home")
    with connect(module_database) as connection, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.generation.build.USER_CHUNK", 13)  # 40 users: three rounds and a remainder
        load_folder(connection, tiny_folder(home / "data"))
        encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
        trained = train_checkpoint(read_training_set(connection), "tiny", home / "checkpoints", device="cpu")
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation)
        yield Built(connection, home / "checkpoints", trained.directory, generation)


def stored(connection: psycopg.Connection[Any], generation: int, column: str = "embedding") -> dict[str, np.ndarray]:
    rows = connection.execute(
        "select item_id, embedding, id_embedding from item_embeddings where generation = %s", [generation]
    )
    place = {"embedding": 1, "id_embedding": 2}[column]
    return {row[0]: row[place].to_numpy().astype(np.float32) for row in rows if row[place] is not None}


def test_the_width_of_the_search_is_tuned_and_used(built: Built) -> None:
    kept = lifecycle.get(built.connection, built.generation).quality["index"]
    assert kept["objective"] <= kept["recall"] <= 1
    served = built.connection.execute("select ef_search from served_generation()").fetchone()
    assert served == (kept["ef_search"],)


def test_what_is_stored_is_what_the_towers_say(built: Built) -> None:
    catalogue, _ = read_catalogue(built.connection)
    item_ids, histories = read_snapshot(built.directory)
    towers, _, _ = checkpoint.load(built.directory, aligned(catalogue, item_ids))
    items = towers.item_embeddings().item
    kept = stored(built.connection, built.generation)
    for row, item_id in enumerate(item_ids):
        if item_id in kept:
            np.testing.assert_allclose(kept[item_id], items[row].numpy(), atol=1e-3)
    rows, mask = padded(histories, towers.config.history)
    interests = towers.user_interests(items[rows], mask).vectors.numpy()
    found = built.connection.execute(
        "select user_id, interest, embedding from user_interests where generation = %s", [built.generation]
    ).fetchall()
    assert len(found) == interests.shape[0] * interests.shape[1]
    for user_id, interest, embedding in found:
        np.testing.assert_allclose(
            embedding.to_numpy(), interests[histories.user_ids.index(user_id), interest], atol=1e-3
        )


def test_both_towers_that_a_server_needs_travel_with_the_generation(built: Built) -> None:
    rows = built.connection.execute(
        "select part, weights, config from towers where generation = %s order by part", [built.generation]
    ).fetchall()
    assert [part for part, _, _ in rows] == ["content", "user_tower"]
    (_, weights, config), _ = rows
    assert checkpoint.load_content_tower(weights, config).projections.keys() == {"attributes"}


def test_an_item_nobody_met_is_retrieved_from_its_content(built: Built) -> None:
    cold = {
        row[0]
        for row in built.connection.execute(
            """select item_id from items where exists (select from content_embeddings c where c.item_id = items.item_id)
               and not exists (select from interactions i where i.item_id = items.item_id)"""
        )
    }
    assert cold
    assert not cold & set(stored(built.connection, built.generation, "id_embedding"))
    assert cold <= set(stored(built.connection, built.generation))
    found = built.connection.execute("select item_id from retrieve('u0', 1000)").fetchall()
    assert cold <= {row[0] for row in found}


def test_nobody_else_reads_who_did_what(built: Built) -> None:
    assert (built.directory / "snapshot.json").is_file()
    assert [folder.stat().st_mode & 0o077 for folder in (built.checkpoints, built.directory)] == [0, 0]


def test_the_same_again_is_found_not_made(built: Built) -> None:
    again = train_checkpoint(read_training_set(built.connection), "tiny", built.checkpoints, device="cpu")
    assert again.reused
    assert again.directory == built.directory
    assert build(built.connection, built.directory) == built.generation


def test_an_item_that_came_after_the_training_is_cold_and_served(built: Built) -> None:
    source = built.connection.execute(
        "select item_id from items where attributes <> '{}' order by item_id limit 1"
    ).fetchone()
    assert source is not None
    built.connection.execute(
        """insert into items (item_id, title, attributes)
           select 'late', 'late', attributes from items where item_id = %s""",
        source,
    )
    encode_modality(built.connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    later = build(built.connection, built.directory)
    assert later != built.generation
    vectors = stored(built.connection, later)
    # The content of its twin, and the same item embedding for everything else as before.
    content = dict(
        built.connection.execute(
            "select item_id, content_embedding from item_embeddings where generation = %s and item_id = any(%s)",
            [later, ["late", source[0]]],
        ).fetchall()
    )
    np.testing.assert_allclose(vectors["late"], content[source[0]].to_numpy(), atol=1e-3)
    for item_id, vector in stored(built.connection, built.generation).items():
        np.testing.assert_allclose(vectors[item_id], vector, atol=1e-3)
    lifecycle.drop(built.connection, later)
    built.connection.execute("delete from items where item_id = 'late'")
    built.connection.execute("delete from content_embeddings where item_id = 'late'")
    built.connection.commit()


def test_a_build_that_fails_leaves_nothing_behind(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.generation.build._kept", lambda *_: None)
    monkeypatch.setattr("pipelines.generation.build.interest_rows", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(built.connection, built.directory)
    newest = lifecycle.listing(built.connection)[0]
    assert newest.state == "failed"
    assert not lifecycle.has_partitions(built.connection, newest.generation)
    live = lifecycle.live(built.connection)
    assert live is not None
    assert live.generation == built.generation


def _interrupted(*_: Any, **__: Any) -> Iterator[tuple[Any, ...]]:
    yield from ()
    raise KeyboardInterrupt


def test_evaluation_reports_the_model_beside_the_baselines(built: Built) -> None:
    report = evaluate_generation(built.connection)
    assert report.generation == built.generation
    assert set(report.baselines) == {"popularity", "item_knn"}
    for metrics in (report.metrics, *report.baselines.values()):
        for masking in ("masked", "unmasked"):
            assert 0 <= metrics[masking]["recall@10"] <= metrics[masking]["recall@50"] <= 1
    assert report.questions == 40


def test_a_moved_home_has_its_checkpoints_still(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built.directory, tmp_path / "moved" / "checkpoints" / built.directory.name)
    monkeypatch.setenv("POLYTOWER_HOME", str(tmp_path / "moved"))
    recorded = str(tmp_path / "as it was" / "checkpoints" / built.directory.name)
    assert located(recorded) == tmp_path / "moved" / "checkpoints" / built.directory.name
    assert located(str(built.directory)) == built.directory
    assert located("/nowhere") is None
    change = "update generations set checkpoint_path = %s where generation = %s"
    built.connection.execute(change, [recorded, built.generation])
    try:
        assert evaluate_generation(built.connection).questions == 40
    finally:
        built.connection.rollback()


def test_what_cannot_be_evaluated_or_read_says_so(
    built: Built, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no generation is live"):
        evaluate_generation(connection)
    with pytest.raises(UserError, match="train first"):
        read_checkpoint(tmp_path)
    lifecycle.begin(
        connection, dim=4, interests=1, config={}, metrics={}, checkpoint_path="/nowhere", checkpoint_sha256=""
    )
    with pytest.raises(UserError, match="is not on this machine"):
        evaluate_generation(connection, 1)
