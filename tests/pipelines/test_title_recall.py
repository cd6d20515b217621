"""Titles as questions: each finds its item, unless the stored vectors are shuffled."""

from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from psycopg.types.json import Jsonb

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.content.registry import CONTENT_ENCODERS
from encoders.towers.towers import Towers
from encoders.training.checkpoint import content_tower_bytes
from pipelines.generation import lifecycle
from pipelines.generation.title_recall import TITLE_GATES, TitleRecall, title_gates, title_recall
from tests.encoders.checkpoints import WORDS, bert
from tests.generation_factory import Floats, Synthetic, write_generation, write_raw

Connection = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return CONTENT_ENCODERS["text"](model=str(bert(tmp_path_factory.mktemp("bert"))), device="cpu")


def _write(connection: Connection, encoder: Any, texts: Floats) -> None:
    """A live generation 1 over the words as titles, its text embeddings [V, E] as given, and its content tower."""
    item_ids = [f"w{n:02d}" for n in range(len(WORDS))]
    catalogue = Catalogue(item_ids, {"text": texts}, {"text": np.ones(len(WORDS), bool)})
    torch.manual_seed(0)
    towers = Towers(TowersConfig(dim=8, interests=2, modalities=catalogue.modalities), catalogue)
    found = towers.item_embeddings()
    write_generation(connection, Synthetic(item_ids, found.item.numpy(), content=found.content.numpy()))
    write_raw(connection, "text", item_ids, texts, encoder.revision)
    connection.execute("update generations set config = %s", [Jsonb({"encoders": {"text": encoder.revision}})])
    for item_id, title in zip(item_ids, WORDS, strict=True):
        connection.execute("update items set title = %s where item_id = %s", [title, item_id])
    stored = content_tower_bytes(towers)
    assert stored is not None
    connection.execute("insert into towers values (1, 'content', %s, %s)", [stored[0], Jsonb(stored[1])])


def test_titles_find_their_items_in_both_spaces(connection: Connection, encoder: Any) -> None:
    _write(connection, encoder, np.concatenate(list(encoder.encode(list(WORDS)))))
    found = title_recall(connection, 1, encoder)
    assert [(one.space, one.titles, one.at_1, one.at_10) for one in found] == [
        ("text", len(WORDS), 1, 1),
        ("content", len(WORDS), 1, 1),
    ]
    assert [gate.passed for gate, _ in title_gates(found).values()] == [True, True]


def test_shuffled_embeddings_are_found_out(connection: Connection, encoder: Any) -> None:
    _write(connection, encoder, np.roll(np.concatenate(list(encoder.encode(list(WORDS)))), 1, axis=0))
    text, content = title_recall(connection, 1, encoder)
    assert text.at_1 < 0.5
    assert content.at_1 < 0.5


def test_without_a_content_tower_one_space_is_measured(connection: Connection, encoder: Any) -> None:
    _write(connection, encoder, np.concatenate(list(encoder.encode(list(WORDS)))))
    lifecycle.amends(connection)
    connection.execute("delete from towers")
    found = title_recall(connection, 1, encoder)
    gates = title_gates(found)
    assert tuple(gates) == TITLE_GATES
    assert [None if gate.value is None else gate.passed for gate, _ in gates.values()] == [True, None]
    assert title_gates([])["title_recall_text"][0].passed


def test_a_content_space_that_gave_topics_up_is_told() -> None:
    text, content = TitleRecall("text", 200, 0.9, 0.95), TitleRecall("content", 200, 0.2, 0.8)
    gate, _ = title_gates([text, content])["title_recall_content"]
    assert (gate.passed, gate.severity, gate.threshold) == (False, "warn", pytest.approx(0.855))
