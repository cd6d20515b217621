"""Encoders trained with the towers, on the product's path: load, encode, train, encode anew, build, serve."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from psycopg.sql import SQL

from encoders.content.adapters import wear
from encoders.content.encoder import ContentEncoder
from encoders.content.registry import CONTENT_ENCODERS
from encoders.training import checkpoint
from encoders.training.checkpoint import load_content_tower
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle
from pipelines.generation.adapted import encode_adapted
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.training import Checkpoint, train_checkpoint
from pipelines.generation.training_set import TrainingSet, read_catalogue, read_contents, read_training_set
from pipelines.item_content import content_of
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from polytower.postgres import connect
from tests.encoders.checkpoints import bert
from tests.factories import tiny_folder

OPTIONS = {
    "towers.interests": 1, "towers.content_dim": 12, "towers.fusion": "qformer", "towers.linear": True,
    "towers.cold": "ridge", "towers.contrast_dim": 8, "content_weight": 0, "kappa": 0.8, "lora_rank": 2,
    "encoder_budget": 8, "encoder_rate": 5.0, "epochs": 3, "threads": 1,
}  # fmt: skip
ACTIVE = "select modality, revision from content_encoders where active order by modality"
ROWS = "select count(*) from content_embeddings where modality = 'text' and revision = %s"


@dataclass(frozen=True)
class Adapted:
    """A live generation whose text encoder was trained; load: loads an encoder as the settings would name it."""

    connection: psycopg.Connection[Any]
    trained: Checkpoint
    generation: int
    checkpoints: Path
    load: Callable[[str], ContentEncoder[Any]]


def with_contents(connection: psycopg.Connection[Any]) -> TrainingSet:
    """The training set, and what its encoders read."""
    found = read_training_set(connection)
    return replace(found, contents=read_contents(connection, found.catalogue))


@pytest.fixture(scope="module")
def adapted(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    home = tmp_path_factory.mktemp("home")
    folder = str(bert(home / "bert"))

    def load(name: str) -> ContentEncoder[Any]:
        return CONTENT_ENCODERS[name](device="cpu", model=folder if name == "text" else "default")

    with connect(module_database) as connection:
        load_folder(connection, tiny_folder(home / "data"))
        for name in ("text", "attributes"):
            encode_modality(connection, name, load(name))
        train = partial(train_checkpoint, preset_name="tiny", root=home / "checkpoints", options=OPTIONS, device="cpu")
        trained = train(with_contents(connection), load=load)
        with pytest.raises(UserError, match="has not encoded the catalogue yet"):
            build(connection, trained.directory)
        assert [report.modality for report in encode_adapted(connection, trained.directory, load)] == ["text"]
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation, force=True)
        yield Adapted(connection, trained, generation, home / "checkpoints", load)


def test_the_frozen_embeddings_stay_in_force(adapted: Adapted) -> None:
    active = dict(adapted.connection.execute(ACTIVE).fetchall())
    assert active == {name: adapted.load(name).revision for name in ("text", "attributes")}
    assert adapted.trained.adapters.keys() == {"text"}
    assert adapted.trained.adapters["text"] != active["text"]
    counts = [
        adapted.connection.execute(ROWS, [one]).fetchone() for one in (active["text"], adapted.trained.adapters["text"])
    ]
    assert counts == [(60,), (60,)]
    found = lifecycle.get(adapted.connection, adapted.generation)
    assert found.config["encoders"] == {**active, "text": adapted.trained.adapters["text"]}


def test_what_is_served_was_embedded_by_the_adapted_encoder(adapted: Adapted) -> None:
    """A text, through the adapter and content tower that Postgres keeps, is the content embedding of its item."""
    stored = {
        part: (bytes(weights), config)
        for part, weights, config in adapted.connection.execute(
            "select part, weights, config from towers where generation = %s", [adapted.generation]
        )
    }
    assert set(stored) == {"user_tower", "content", "adapter_text"}
    encoder = adapted.load("text")
    assert stored["adapter_text"][1]["base"] == encoder.revision
    wear(encoder, stored["adapter_text"][0])
    assert encoder.revision == adapted.trained.adapters["text"]
    tower = load_content_tower(*stored["content"])
    catalogue, _ = read_catalogue(adapted.connection, adapted.trained.adapters)
    rows = {
        item_id: embedding.to_numpy().astype(np.float32)
        for item_id, embedding in adapted.connection.execute(
            "select item_id, content_embedding from item_embeddings where generation = %s", [adapted.generation]
        )
    }
    contents = dict(adapted.connection.execute(SQL("select item_id, content from ({}) c").format(content_of("text"))))
    place = catalogue.item_ids.index("i3")
    mine = next(iter(encoder.encode([contents["i3"]])))
    np.testing.assert_allclose(mine[0], catalogue.content["text"][place], atol=2e-3)
    content = {
        "text": torch.from_numpy(mine),
        "attributes": torch.from_numpy(catalogue.content["attributes"][place : place + 1]),
    }
    with torch.inference_mode():
        found = tower(content, {name: torch.tensor([True]) for name in content})[0].numpy()
    np.testing.assert_allclose(found, rows["i3"], atol=3e-3)


def test_the_same_again_trains_and_encodes_nothing(adapted: Adapted) -> None:
    again = train_checkpoint(
        with_contents(adapted.connection), "tiny", adapted.checkpoints,
        options=OPTIONS, device="cpu", load=adapted.load,
    )  # fmt: skip
    assert again.reused
    assert [report.encoded for report in encode_adapted(adapted.connection, again.directory, adapted.load)] == [0]
    assert build(adapted.connection, again.directory) == adapted.generation


def test_evaluation_reads_what_the_adapted_encoder_encoded(adapted: Adapted) -> None:
    report = evaluate_generation(adapted.connection, adapted.generation)
    towers, _, metrics = checkpoint.load(
        adapted.trained.directory, read_catalogue(adapted.connection, adapted.trained.adapters)[0]
    )
    assert towers.adapters
    assert report.questions > 0
    assert 0 <= metrics["ndcg@10"] <= 1


def test_a_new_item_is_encoded_by_the_adapted_encoder(adapted: Adapted) -> None:
    connection = adapted.connection
    connection.execute(
        """insert into items (item_id, title, description, attributes)
           select 'late', title, description, attributes from items where item_id = 'i5'"""
    )
    connection.commit()
    try:
        for name in ("text", "attributes"):
            encode_modality(connection, name, adapted.load(name))
        assert [one.encoded for one in encode_adapted(connection, adapted.trained.directory, adapted.load)] == [1]
        later = build(connection, adapted.trained.directory)
        rows = dict(
            connection.execute(
                "select item_id, content_embedding from item_embeddings where generation = %s", [later]
            ).fetchall()
        )
        np.testing.assert_allclose(rows["late"].to_numpy(), rows["i5"].to_numpy(), atol=2e-3)
        lifecycle.drop(connection, later)
        kept = connection.execute(ROWS, [adapted.trained.adapters["text"]]).fetchone()
        assert kept == (61,)  # the live generation needs them
    finally:
        connection.execute("delete from items where item_id = 'late'")
        connection.commit()


def test_another_encoder_than_the_one_that_encoded_is_refused(adapted: Adapted, tmp_path: Path) -> None:
    other = CONTENT_ENCODERS["text"](device="cpu", model=str(bert(tmp_path / "other", seed=3)))
    with pytest.raises(UserError, match=r"was encoded by revision \w+, and the encoder that is set"):
        train_checkpoint(
            with_contents(adapted.connection), "tiny", tmp_path, options=OPTIONS, device="cpu",
            load=lambda name: other if name == "text" else adapted.load(name),
        )  # fmt: skip


def test_a_catalogue_without_anything_to_adapt_is_refused_in_words(adapted: Adapted, tmp_path: Path) -> None:
    alone = read_training_set(adapted.connection)
    with pytest.raises(UserError, match=r"no content at all.*lora_rank=0"):
        train_checkpoint(alone, "tiny", tmp_path, options=OPTIONS, device="cpu", load=adapted.load)


def test_dropping_the_last_generation_forgets_its_embeddings(adapted: Adapted) -> None:
    connection = adapted.connection
    frozen = adapted.load("text").revision
    plain = train_checkpoint(
        read_training_set(connection), "tiny", adapted.checkpoints, options={"epochs": 1, "threads": 1}, device="cpu"
    )
    lifecycle.promote(connection, build(connection, plain.directory), force=True)
    before = connection.execute(ROWS, [frozen]).fetchone()
    lifecycle.drop(connection, adapted.generation)
    assert connection.execute(ROWS, [adapted.trained.adapters["text"]]).fetchone() == (0,)
    assert connection.execute(ROWS, [frozen]).fetchone() == before
