"""Items in blocks and cold items by a ridge, from load to served list: what is stored is what the towers say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch

from encoders.content.registry import CONTENT_ENCODERS
from encoders.training import checkpoint
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.training import aligned, read_checkpoint, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.folder import load_folder
from polytower.postgres import connect
from tests.factories import tiny_folder

BLOCKS = {
    "towers.content_dim": 12, "towers.fusion": "none", "towers.linear": True, "towers.cold": "ridge",
    "content_weight": 0, "cold_loss": 1.0, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def served(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, int, Path]]:
    """(connection, live generation, checkpoint folder) of towers in blocks."""
    home = tmp_path_factory.mktemp("home")
    with connect(module_database) as connection:
        load_folder(connection, tiny_folder(home / "data"))
        encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
        trained = train_checkpoint(
            read_training_set(connection), "tiny", home / "checkpoints", options=BLOCKS, device="cpu"
        )
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation)
        yield connection, generation, trained.directory


def vectors(connection: psycopg.Connection[Any], generation: int) -> dict[str, tuple[np.ndarray, ...]]:
    """item id → (item, content, ID embedding), zeros where one is missing."""
    rows = connection.execute(
        """select item_id, embedding, content_embedding, id_embedding from item_embeddings where generation = %s""",
        [generation],
    ).fetchall()
    return {
        item_id: tuple(np.zeros(32, np.float32) if one is None else one.to_numpy().astype(np.float32) for one in found)
        for item_id, *found in rows
    }


def test_what_is_served_is_what_the_towers_say(served: tuple[Any, int, Path]) -> None:
    connection, generation, directory = served
    catalogue, _ = read_catalogue(connection)
    item_ids, histories = read_snapshot(directory)
    towers, config, metrics = checkpoint.load(directory, aligned(catalogue, item_ids))
    assert config.towers.content_dim == 12
    assert metrics["kappa"] == pytest.approx(float(towers.item_tower.kappa))
    assert read_checkpoint(directory).metrics["kappa"] == metrics["kappa"]
    items = towers.item_embeddings()
    kept = vectors(connection, generation)
    for row, item_id in enumerate(item_ids):
        if item_id in kept:
            for stored, said in zip(kept[item_id], (items.item, items.content, items.id), strict=True):
                np.testing.assert_allclose(stored, said[row].numpy(), atol=1e-3)
    user = histories.user_ids.index("u0")
    history = items.item[torch.from_numpy(histories.of(user)[-config.towers.history :])]
    found = towers.user_interests(history[None], torch.ones(1, len(history), dtype=torch.bool)).vectors[0]
    scores = (items.item @ found.T).amax(dim=1)
    answer = connection.execute("select item_id, score from retrieve('u0', 10)").fetchall()
    assert len(answer) == 10
    for item_id, score in answer:
        assert score == pytest.approx(float(scores[item_ids.index(item_id)]), abs=2e-3)
    unseen = [row for row in scores.argsort(descending=True).tolist() if row not in set(histories.of(user).tolist())]
    assert float(scores[unseen[9]]) <= min(score for _, score in answer) + 2e-3


def test_an_item_after_the_training_takes_the_foretold_id_at_once(served: tuple[Any, int, Path]) -> None:
    connection, generation, directory = served
    catalogue, _ = read_catalogue(connection)
    item_ids, _ = read_snapshot(directory)
    towers, _, _ = checkpoint.load(directory, aligned(catalogue, item_ids))
    before = vectors(connection, generation)
    (twin,) = connection.execute(
        "select item_id from items where attributes <> '{}' order by item_id limit 1"
    ).fetchone()
    connection.execute(
        """insert into items (item_id, title, attributes)
           select 'late', 'late', attributes from items where item_id = %s""",
        [twin],
    )
    encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    later = build(connection, directory)
    found = vectors(connection, later)
    item, content, own = found["late"]
    assert not own.any()
    np.testing.assert_allclose(content, before[twin][1], atol=1e-3)
    row = torch.tensor([item_ids.index(twin)])
    foretold = towers.item_tower.foretold(
        *towers.source.read(row),
    )[0].numpy()
    np.testing.assert_allclose(item, 0.5**0.5 * (foretold + content), atol=2e-3)
    assert np.linalg.norm(item) == pytest.approx(1, abs=2e-3)
    lifecycle.promote(connection, later)
    assert "late" in {row[0] for row in connection.execute("select item_id from retrieve('u0', 1000)").fetchall()}
    for space in ("content", "item"):
        near = connection.execute("select item_id from similar_items(%s, 5, %s)", [twin, space]).fetchall()
        assert len(near) == 5
    lifecycle.promote(connection, generation)
    lifecycle.drop(connection, later)
    connection.execute("delete from items where item_id = 'late'")
    connection.execute("delete from content_embeddings where item_id = 'late'")
    connection.commit()


def test_a_question_by_content_lies_in_the_contents_block(served: tuple[Any, int, Path]) -> None:
    connection, generation, _ = served
    weights, config = connection.execute(
        "select weights, config from towers where generation = %s and part = 'content'", [generation]
    ).fetchone()
    tower = checkpoint.load_content_tower(weights, config)
    catalogue, _ = read_catalogue(connection)
    row = catalogue.item_ids.index("i0")
    asked = tower(
        {"attributes": torch.from_numpy(catalogue.content["attributes"][row : row + 1])},
        {"attributes": torch.tensor([True])},
    )[0]
    stored = vectors(connection, generation)["i0"][1]
    np.testing.assert_allclose(asked.detach().numpy(), stored, atol=1e-3)
