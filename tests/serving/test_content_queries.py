"""Texts and pictures as questions: the encoder and the content tower of the live generation, and every way to miss."""

import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import psycopg
import pytest
import torch
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image
from psycopg.types.json import Jsonb

from encoders.catalogue import Catalogue
from encoders.config import TowersConfig
from encoders.content.registry import CONTENT_ENCODERS
from encoders.towers.towers import Towers
from encoders.training.checkpoint import content_tower_bytes
from pipelines.generation.lifecycle import amends
from polytower.cli import cli
from polytower.postgres import connect
from serving.http.app import create_app
from tests.conftest import as_server, cloned
from tests.encoders.checkpoints import WORDS, bert, vit
from tests.generation_factory import Synthetic, write_generation, write_raw
from tests.serving.conftest import PATIENT

COLOURS = [(200, 30, 30), (30, 30, 200), (30, 200, 30), (240, 240, 20)]


@dataclass(frozen=True)
class Shop:
    """A database with a live generation made of texts and pictures by tiny encoders; item n is WORDS[n]."""

    url: str
    text_encoder: str
    image_encoder: str
    towers: Towers
    embeddings: np.ndarray


def picture(n: int, size: int = 40, file_format: str = "PNG", height: int = 0) -> bytes:
    """A plain picture in one of the colours."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, height or size), COLOURS[n]).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shop(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    home = tmp_path_factory.mktemp("encoders")
    folders = {"text": str(bert(home / "bert")), "image": str(vit(home / "vit"))}
    encoders = {m: CONTENT_ENCODERS[m](model=folder, device="cpu") for m, folder in folders.items()}
    texts = next(iter(encoders["text"].encode(list(WORDS))))
    images = np.zeros((len(WORDS), encoders["image"].dim), np.float32)
    images[: len(COLOURS)] = np.concatenate([next(iter(encoders["image"].encode([picture(n)]))) for n in range(4)])
    present = {"text": np.ones(len(WORDS), bool), "image": np.arange(len(WORDS)) < len(COLOURS)}
    item_ids = [f"w{n:02d}" for n in range(len(WORDS))]
    catalogue = Catalogue(item_ids, {"text": texts, "image": images}, present)
    torch.manual_seed(0)
    towers = Towers(TowersConfig(dim=8, interests=2, modalities=catalogue.modalities), catalogue)
    found = towers.item_embeddings()
    ada = {"ada": found.item.numpy()[[4, 9]]}
    data = Synthetic(item_ids, found.item.numpy(), ada, content=found.content.numpy(), identity=found.id.numpy())
    with cloned(server, "test_content_queries") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            revisions = {m: encoder.revision for m, encoder in encoders.items()}
            connection.execute("update generations set config = %s", [Jsonb({"encoders": revisions})])
            for m, encoder in encoders.items():
                write_raw(connection, m, item_ids, catalogue.content[m] * present[m][:, None], encoder.revision)
                connection.execute("update content_encoders set model = %s where modality = %s", [encoder.model, m])
            stored = content_tower_bytes(towers)
            assert stored is not None
            connection.execute(
                "insert into towers (generation, part, weights, config) values (1, 'content', %s, %s)",
                [stored[0], Jsonb(stored[1])],
            )
        yield Shop(url, folders["text"], folders["image"], towers, found.content.numpy())


@pytest.fixture
def encoders(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is set to the encoders that filled the generation."""
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", shop.text_encoder)
    monkeypatch.setenv("POLYTOWER_IMAGE_ENCODER", shop.image_encoder)
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")


@pytest.fixture
def client(shop: Shop, encoders: None) -> Iterator[TestClient]:
    with TestClient(create_app(as_server(shop.url), caps=PATIENT), raise_server_exceptions=False) as opened:
        yield opened


def _ask(client: TestClient, **question: Any) -> dict[str, Any]:
    answer = client.post("/v1/retrieve", json=question)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def _order(body: dict[str, Any]) -> list[str]:
    return [candidate["item_id"] for candidate in body["candidates"]]


def _encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_text_finds_the_items_of_its_words(client: TestClient, shop: Shop) -> None:
    """Items without a picture are embedded from their text alone: the same text finds them exactly."""
    for n, space in product((5, 8, 10), (None, "text", "content")):
        body = _ask(client, text=f" {WORDS[n]}\n", k=3, space=space)
        assert body["interests"] == "content"
        assert body["candidates"][0]["item_id"] == f"w{n:02d}"
        assert body["candidates"][0]["score"] == pytest.approx(1, abs=2e-3)


def test_text_and_picture_are_one_question(client: TestClient) -> None:
    for n in range(4):
        body = _ask(client, text=WORDS[n], image=_encoded(picture(n)), k=1)
        assert body["candidates"][0]["item_id"] == f"w{n:02d}"
        assert body["candidates"][0]["score"] == pytest.approx(1, abs=2e-3)
    alone = _ask(client, image=_encoded(picture(2)), k=5, space="content")
    assert alone["candidates"][0]["score"] < 1 - 1e-3
    assert _order(alone) == _order(_ask(client, image=_encoded(picture(2)), k=5, space="content"))


def test_a_picture_is_looked_for_among_pictures(client: TestClient) -> None:
    """As its encoder sees it: an item's own picture has a cosine of 1, and items without one are not there."""
    for n in range(4):
        body = _ask(client, image=_encoded(picture(n)), k=10)
        assert body["candidates"][0]["item_id"] == f"w{n:02d}"
        assert body["candidates"][0]["score"] == pytest.approx(1, abs=2e-3)
        assert sorted(_order(body)) == ["w00", "w01", "w02", "w03"]


def test_a_user_with_a_text_is_answered_by_both(client: TestClient, shop: Shop) -> None:
    """mix 0 is the user's own answer, mix 1 the text's; between them, scores are weighed."""
    ada, text = _ask(client, user_id="ada", k=11), _ask(client, text="shoe", k=11)
    assert _order(_ask(client, user_id="ada", text="shoe", mix=0, k=11)) == _order(ada)
    by_text = _ask(client, user_id="ada", text="shoe", mix=1, k=11)
    assert (_order(by_text), by_text["interests"]) == (_order(text), "stored")
    scores = [{c["item_id"]: c["score"] for c in body["candidates"]} for body in (ada, text)]
    for candidate in _ask(client, user_id="ada", text="shoe", mix=0.25, k=11)["candidates"]:
        own, said = (part[candidate["item_id"]] for part in scores)
        assert candidate["score"] == pytest.approx(0.75 * own + 0.25 * said, abs=1e-6)
        assert candidate["interest"] in (0, 1)
        assert len(candidate["found_by"]) == 2
    history = _ask(client, user_id="ada", text="shoe", mix=0.25, k=3, allow=["w01", "w02"], space="content")
    assert sorted(_order(history)) == ["w01", "w02"]


def test_the_item_space_mixes_behaviour_in(client: TestClient) -> None:
    content, item = (_ask(client, text="shoe", k=11, space=space) for space in ("content", "item"))
    assert sorted(_order(content)) == sorted(_order(item))
    assert [c["score"] for c in content["candidates"]] != [c["score"] for c in item["candidates"]]


def test_filters_and_exclusions_hold(client: TestClient) -> None:
    assert _order(_ask(client, text="red", k=1, exclude=["w00"])) != ["w00"]


def test_batches_mix_questions(client: TestClient, shop: Shop) -> None:
    vector = [float(x) for x in shop.embeddings[6]]
    questions = [
        {"text": "red", "k": 2},
        {"image": _encoded(b"nothing"), "k": 2},
        {"vectors": [vector], "space": "content", "k": 1},
        {"text": "hat", "k": 2},
    ]
    answers = client.post("/v1/retrieve:batch", json={"requests": questions}).json()["answers"]
    assert answers[0] == _ask(client, **questions[0])
    assert answers[1]["type"] == "/problems/unreadable-image"
    assert _order(answers[2]) == ["w06"]
    assert answers[3] == _ask(client, **questions[3])


def _bomb() -> bytes:
    """A PNG of some kilobytes whose header promises 30,000 × 30,000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("no picture", b"GIF89a but no more"),
        ("empty picture", b"\x89PNG\r\n\x1a\n"),
        ("truncated", picture(0, 400, "JPEG")[:500]),
        ("PostScript without an end", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"),
        ("AVIF", picture(0, 40, "AVIF")),
        ("line", picture(0, 1, "PNG", 201)),
        ("bomb", _bomb()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_pictures(client: TestClient, name: str, content: bytes) -> None:
    _refused(client.post("/v1/retrieve", json={"image": _encoded(content)}), 422, "unreadable-image")
    assert client.post("/v1/retrieve", json={"image": _encoded(picture(1))}).status_code == 200


def test_no_text_waits_for_a_picture(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped decoder stands for a picture that takes long: texts are answered, one picture too many is told so."""
    monkeypatch.setattr("serving.loaded.content_queries.PICTURES", 1)
    before = {child.pid for child in psutil.Process().children()}
    image = {"image": _encoded(picture(1)), "k": 1}
    _ask(client, **image)
    _ask(client, text="red")
    (decoder,) = [child for child in psutil.Process().children() if child.pid not in before]
    decoder.suspend()
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(_ask, client, **image)
        try:
            while client.app.state.services.content._pictures == 0:  # type: ignore[attr-defined]
                time.sleep(0.01)
            assert _order(_ask(client, text=WORDS[5], k=1)) == ["w05"]
            refused = client.post("/v1/retrieve", json=image)
            _refused(refused, 429, "too-many-requests")
            assert "Retry-After" in refused.headers
            assert not waiting.done()
        finally:
            decoder.resume()
        assert waiting.result(60)["candidates"]


@pytest.mark.parametrize(
    ("question", "status", "slug"),
    [
        ({"text": ""}, 422, "invalid-request"),
        ({"text": " \u200b "}, 422, "invalid-request"),
        ({"text": "a\x00b"}, 422, "invalid-request"),
        ({"text": "x" * 10_001}, 422, "invalid-request"),
        ({"image": "no base64!"}, 422, "invalid-request"),
        ({"image": ""}, 422, "invalid-request"),
        ({"image": 5}, 422, "invalid-request"),
        ({"text": "red", "vectors": [[1, 0]]}, 422, "invalid-request"),
        ({"text": "red", "user_id": "ada", "mix": 2}, 422, "invalid-request"),
        ({"text": "red", "user_id": "ada", "merge": "rrf"}, 409, "no-personalised-search"),
        ({"text": "red", "user_id": "ada", "merge": "rrf", "mix": 0.5}, 422, "invalid-request"),
        ({"text": "red", "space": "id"}, 422, "invalid-request"),
        ({"user_id": "ada", "space": "content"}, 422, "invalid-request"),
        ({"text": "red", "filter": {"gnere": 1}}, 422, "unknown-attribute"),
        ({"image": "A" * 1_000_000}, 413, "body-too-large"),
    ],
    ids=str,
)
def test_bad_questions(client: TestClient, question: dict[str, Any], status: int, slug: str) -> None:
    _refused(client.post("/v1/retrieve", json=question), status, slug)


def test_another_encoder_is_refused(
    shop: Shop, encoders: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", str(bert(tmp_path / "other", seed=1)))
    with TestClient(create_app(as_server(shop.url), caps=PATIENT)) as client:
        answer = client.post("/v1/retrieve", json={"text": "red"})
    _refused(answer, 409, "encoder-mismatch")
    assert "POLYTOWER_TEXT_ENCODER" in answer.json()["detail"]
    assert shop.text_encoder in answer.json()["detail"]


def test_an_encoder_that_is_not_there(shop: Shop, encoders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", "/nowhere/at/all")
    with TestClient(create_app(as_server(shop.url), caps=PATIENT)) as client:
        _refused(client.post("/v1/retrieve", json={"text": "red"}), 503, "no-encoder")


@pytest.mark.parametrize(
    ("damage", "status", "slug"),
    [
        ("update generations set config = '{}'", 422, "no-such-content"),
        ("delete from towers", 409, "no-content-tower"),
        ("update towers set weights = 'no safetensors'", 409, "no-content-tower"),
        ("update generations set state = 'retired'", 503, "no-live-generation"),
    ],
)
def test_what_a_generation_may_lack(shop: Shop, encoders: None, damage: str, status: int, slug: str) -> None:
    with psycopg.connect(shop.url, options="-c search_path=polytower,public") as connection:
        saved = connection.execute("select weights, config from towers").fetchone()
        config = connection.execute("select config from generations").fetchone()
        assert saved is not None
        assert config is not None
        try:
            amends(connection)
            connection.execute(damage)  # type: ignore[call-overload]
            connection.commit()
            with TestClient(create_app(as_server(shop.url), caps=PATIENT), raise_server_exceptions=False) as client:
                _refused(client.post("/v1/retrieve", json={"text": "red", "space": "content"}), status, slug)
                if slug == "no-content-tower":  # the encoder's own space needs none
                    assert _ask(client, text="red", k=1)["candidates"][0]["item_id"] == "w00"
        finally:
            connection.execute("update generations set state = 'live', config = %s", [Jsonb(config[0])])
            amends(connection)
            connection.execute("delete from towers")
            connection.execute(
                "insert into towers (generation, part, weights, config) values (1, 'content', %s, %s)",
                [saved[0], Jsonb(saved[1])],
            )
            connection.commit()


def test_command_line(shop: Shop, encoders: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", shop.url)
    (tmp_path / "red.png").write_bytes(picture(0))
    arguments = ["retrieve", "--text", "red", "--image", str(tmp_path / "red.png"), "-k", "1", "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert json.loads(done.stdout.splitlines()[-1])["candidates"][0]["item_id"] == "w00"


def _refused(response: httpx.Response, status: int, slug: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["type"] == f"/problems/{slug}"
