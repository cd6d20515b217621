"""A text asked of a generation whose encoder was trained: the adapter of that generation encodes it, and no other."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from psycopg.types.json import Jsonb

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.content.adapters import adapted_revision, adapter_bytes, attach, describe, wear
from encoders.content.text import TextEncoder
from encoders.towers.towers import Towers
from encoders.training.checkpoint import content_tower_bytes
from polytower.postgres import connect
from serving.http.app import create_app
from tests.conftest import as_server, cloned
from tests.encoders.checkpoints import WORDS, bert
from tests.generation_factory import Synthetic, promote, write_generation
from tests.serving.conftest import PATIENT


@dataclass(frozen=True)
class Shop:
    """A database whose generation 1 is frozen and 2 (live) adapted; both hold the items WORDS[n] and one tower."""

    url: str
    folder: str
    adapted: np.ndarray


def adapter_of(folder: str) -> bytes:
    """An adapter as training leaves it."""
    encoder = TextEncoder(folder, device="cpu")
    torch.manual_seed(1)
    for value in attach(encoder, rank=2).values():
        torch.nn.init.normal_(value, std=0.5)
    return adapter_bytes(encoder)


@pytest.fixture(scope="module")
def shop(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = str(bert(tmp_path_factory.mktemp("encoders") / "bert"))
    encoder, adapter = TextEncoder(folder, device="cpu"), adapter_of(folder)
    frozen, revision = next(iter(encoder.encode(list(WORDS)))), encoder.revision
    wear(encoder, adapter)
    adapted = next(iter(encoder.encode(list(WORDS))))
    item_ids = [f"w{n:02d}" for n in range(len(WORDS))]
    torch.manual_seed(0)
    config = TowersConfig(dim=8, interests=2, modalities=(("text", encoder.dim),))
    weights = None
    with cloned(server, "test_adapted_queries") as url:
        with connect(url) as connection:
            for generation, (rows, used) in enumerate(((frozen, revision), (adapted, encoder.revision)), 1):
                catalogue = Catalogue(item_ids, {"text": rows}, {"text": np.ones(len(WORDS), bool)})
                towers = Towers(config, catalogue)
                towers.load_state_dict(weights or towers.state_dict())
                weights = towers.state_dict()
                found = towers.item_embeddings()
                data = Synthetic(item_ids, found.item.numpy(), content=found.content.numpy(), identity=found.id.numpy())
                assert write_generation(connection, data) == generation
                connection.execute(
                    "update generations set config = %s where generation = %s",
                    [Jsonb({"encoders": {"text": used}}), generation],
                )
                connection.execute(
                    "insert into content_encoders (modality, revision, model, dim, active)"
                    " values ('text', %s, %s, %s, %s)",
                    [used, f"number {generation}", encoder.dim, generation == 1],
                )
                stored = content_tower_bytes(towers)
                assert stored is not None
                parts = {"content": stored}
                if generation == 2:
                    parts["adapter_text"] = adapter, describe(adapter)
                for part, (tensors, told) in parts.items():
                    connection.execute(
                        "insert into towers (generation, part, weights, config) values (%s, %s, %s, %s)",
                        [generation, part, tensors, Jsonb(told)],
                    )
        yield Shop(url, folder, adapted)


def live(url: str, generation: int) -> None:
    with connect(url) as connection:
        promote(connection, generation)


@pytest.fixture
def client(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", shop.folder)
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    live(shop.url, 2)
    with TestClient(create_app(as_server(shop.url), caps=PATIENT), raise_server_exceptions=False) as opened:
        yield opened


def best(client: TestClient, text: str) -> tuple[str, float]:
    answer = client.post("/v1/retrieve", json={"text": text, "space": "content", "k": 1})
    assert answer.status_code == 200, answer.text
    (candidate,) = answer.json()["candidates"]
    return candidate["item_id"], candidate["score"]


def test_a_text_goes_through_the_adapted_encoder(client: TestClient) -> None:
    for n in (2, 5, 8):
        item_id, score = best(client, WORDS[n])
        assert item_id == f"w{n:02d}"
        assert score == pytest.approx(1, abs=2e-3)


def test_each_generation_is_asked_through_its_own_encoder(client: TestClient, shop: Shop) -> None:
    for generation in (2, 1, 2):
        live(shop.url, generation)
        for n in (2, 5, 8):
            item_id, score = best(client, WORDS[n])
            assert item_id == f"w{n:02d}"
            assert score == pytest.approx(1, abs=2e-3)


def test_an_adapter_of_another_encoder_is_a_mismatch(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", str(bert(tmp_path / "other", seed=9)))
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    live(shop.url, 2)
    with TestClient(create_app(as_server(shop.url), caps=PATIENT), raise_server_exceptions=False) as client:
        answer = client.post("/v1/retrieve", json={"text": "shoe"})
    assert answer.status_code == 409
    assert adapted_revision(adapter_of(shop.folder)) in answer.text
    assert "POLYTOWER_TEXT_ENCODER" in answer.text
