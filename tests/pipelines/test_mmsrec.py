"""MMSRec from load to served list: SQL and HTTP agree, and so do events, histories and texts of a moment ago."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import torch
from click.testing import CliRunner
from fastapi.testclient import TestClient

from encoders.content.registry import CONTENT_ENCODERS
from encoders.experiments.pretrain import pretrain
from encoders.training import checkpoint
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle, quality
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.training import train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.dataset import read_folder
from pipelines.load.folder import load_folder
from polytower.cli import cli
from polytower.errors import UserError
from polytower.postgres import connect
from serving.http.app import create_app
from tests.conftest import as_server
from tests.encoders.checkpoints import bert
from tests.factories import tiny_folder
from tests.serving.conftest import PATIENT

OPTIONS = {
    "towers.dim": 16, "towers.heads": 4, "towers.history": 8, "towers.whiten": 16, "epochs": 3, "pretrain_epochs": 10,
    "pretrain_items": 16, "batch_rows": 16, "validate_every": 3, "threads": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A live generation, the model behind it over today's catalogue, and a client of a server."""

    connection: psycopg.Connection[Any]
    client: TestClient
    home: Path
    generation: int

    def model(self) -> Any:
        path = lifecycle.get(self.connection, self.generation).checkpoint_path
        return checkpoint.load(Path(str(path)), read_catalogue(self.connection)[0])[0]

    def scores(self, history: list[str]) -> dict[str, float]:
        """What the model itself says of every item after this history."""
        model, (catalogue, _) = self.model(), read_catalogue(self.connection)
        rows = torch.tensor([[catalogue.item_ids.index(item_id) for item_id in history]])
        found = model.user_interests(model.events(rows, torch.empty(0)), torch.ones(rows.shape, dtype=torch.bool))
        items = model.item_embeddings()
        told = (items.item @ found.vectors[0, 0]).tolist()
        return {i: s for i, s, has in zip(catalogue.item_ids, told, items.has_content.tolist(), strict=True) if has}

    def ask(self, **question: Any) -> dict[str, Any]:
        answer = self.client.post("/v1/retrieve", json=question)
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body


@pytest.fixture(scope="module")
def served(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    encoder = str(bert(home / "bert"))
    with connect(module_database) as connection, pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYTOWER_TEXT_ENCODER", encoder)
        patch.setenv("POLYTOWER_DEVICE", "cpu")
        load_folder(connection, tiny_folder(home / "data"))
        # i5 has nothing at all, i6 no attributes; both have events
        connection.execute("update items set title = null, description = null, attributes = '{}' where item_id = 'i5'")
        connection.execute("update items set attributes = '{}' where item_id = 'i6'")
        for name, model in (("attributes", None), ("text", encoder)):
            encode_modality(
                connection, name, CONTENT_ENCODERS[name](**({"model": model} if model else {}), device="cpu")
            )
        trained = train_checkpoint(
            read_training_set(connection), "mmsrec", home / "checkpoints", options=OPTIONS, device="cpu"
        )
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation)
        connection.commit()
        with TestClient(create_app(as_server(module_database), caps=PATIENT), raise_server_exceptions=False) as client:
            yield Served(connection, client, home, generation)


def _agree(body: dict[str, Any], scores: dict[str, float], hidden: set[str]) -> None:
    found = {row["item_id"]: row["score"] for row in body["candidates"]}
    for item_id, score in found.items():
        assert score == pytest.approx(scores[item_id], abs=3e-3)
    best = sorted((score for item_id, score in scores.items() if item_id not in hidden), reverse=True)
    assert sorted(found.values(), reverse=True) == pytest.approx(best[: len(found)], abs=3e-3)


def test_what_is_left_out_is_counted_and_no_gate_holds_it_up(served: Served) -> None:
    assert quality.left_out(served.connection, served.generation) == 1
    kept = {
        row[0]
        for row in served.connection.execute(
            "select item_id from item_embeddings where generation = %s", [served.generation]
        )
    }
    assert "i5" not in kept
    assert {"i6", "i59"} <= kept  # one modality is enough, and so is no event
    gates = {gate.name: gate for gate in quality.generation_gates(served.connection, served.generation)}
    assert (gates["coverage_head"].value, gates["coverage_tail"].value) == (1.0, 1.0)


def test_sql_and_http_answer_what_the_model_says(served: Served) -> None:
    history = [
        row[0]
        for row in served.connection.execute(
            "select item_id from interactions where user_id = 'u3' order by occurred_at, position"
        )
    ]
    body = served.ask(user_id="u3", k=10)
    assert body["interests"] == "stored"
    _agree(body, served.scores(history[-8:]), {*history})
    by_sql = served.connection.execute("select item_id, score from retrieve('u3', 10)").fetchall()
    assert [row["item_id"] for row in body["candidates"]] == [item_id for item_id, _ in by_sql]
    assert [row["score"] for row in body["candidates"]] == pytest.approx([score for _, score in by_sql], abs=1e-6)


def test_a_raw_history_is_read_through_what_its_items_are(served: Served) -> None:
    history = ["i4", "i8", "i6", "i12"]
    body = served.ask(history=["unknown", "i4", "i5", *history[1:]], k=10)
    assert (body["interests"], body["skipped"]) == ("online", ["unknown", "i5"])
    _agree(body, served.scores(history), {*history, "i5"})


def test_an_event_of_a_moment_ago_counts(served: Served) -> None:
    before = served.ask(user_id="u7", k=5)
    target = before["candidates"][0]["item_id"]
    served.client.post("/v1/interactions", json={"interactions": [{"user_id": "u7", "item_id": target}]})
    history = [
        row[0]
        for row in served.connection.execute(
            "select item_id from interactions where user_id = 'u7' order by occurred_at, position"
        )
    ]
    assert history[-1] == target
    after = served.ask(user_id="u7", k=5)
    assert (after["interests"], after["degraded"]) == ("online", None)
    _agree(after, served.scores([item_id for item_id in history if item_id != "i5"][-8:]), {*history})


def test_content_that_is_gone_is_said(served: Served) -> None:
    connection = served.connection
    kept = connection.execute("select * from content_embeddings where item_id = 'i4'").fetchall()
    assert kept
    connection.execute("create temp table kept as select * from content_embeddings where item_id = 'i4'")
    connection.execute("delete from content_embeddings where item_id = 'i4'")
    connection.commit()
    try:
        body = served.ask(history=["i4", "i8"], k=5)
        assert body["skipped"] == ["i4"]
        assert body["degraded"].startswith("content of 1 items of the history is no longer")
        refused = served.client.post("/v1/retrieve", json={"history": ["i4"], "k": 5})
        assert "content of 1 items" in refused.json()["detail"]
    finally:
        connection.execute("insert into content_embeddings select * from kept")
        connection.execute("drop table kept")
        connection.commit()


def test_a_text_is_a_question(served: Served) -> None:
    body = served.ask(text="red shoe", space="content", k=5)
    assert body["interests"] == "content"
    encoder = CONTENT_ENCODERS["text"](model=str(served.home / "bert"), device="cpu")
    rows = torch.from_numpy(np.concatenate(list(encoder.encode(["red shoe"]))))
    model = served.model()
    with torch.no_grad():
        asked = model.user_tower(
            {"text": rows, "attributes": torch.zeros(1, dict(model.config.modalities)["attributes"])},
            {"text": torch.tensor([True]), "attributes": torch.tensor([False])},
        )[0]
    best = (model.item_embeddings().item @ asked).topk(5).values.tolist()
    assert [row["score"] for row in body["candidates"]] == pytest.approx(best, abs=3e-3)


def test_it_is_evaluated_beside_the_baselines(served: Served) -> None:
    report = evaluate_generation(served.connection, served.generation)
    assert report.preset == "mmsrec"
    assert 0 < report.metrics["masked"]["recall@10"] <= 1


def test_an_item_that_came_later_is_built_from_its_content(served: Served) -> None:
    connection, before = served.connection, served.generation
    connection.execute(
        "insert into items (item_id, attributes) select 'late', attributes from items where item_id = 'i8'"
    )
    encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
    path = lifecycle.get(connection, before).checkpoint_path
    later = build(connection, Path(str(path)))
    kept = connection.execute("select item_id from item_embeddings where generation = %s", [later]).fetchall()
    assert later != before
    assert ("late",) in kept


def test_a_pretrained_model_serves_a_catalogue_that_it_has_never_seen(served: Served) -> None:
    """Pretrained on another folder without a database, then served with no training, or by other encoders refused."""
    folders = [tiny_folder(served.home / name, 20, 24, seed=seed) for seed, name in enumerate(("one", "two"))]
    sets = [read_folder(folder)[0] for folder in folders]
    into = served.home / "pretrained"
    options = {name: value for name, value in OPTIONS.items() if name != "epochs"} | {"pretrain_epochs": 2}
    given: dict[str, Any] = {"options": options, "device": "cpu", "modalities": ["text", "attributes"]}
    report = pretrain(sets, "mmsrec", into, **given)
    assert (report["items"], report["reused"], len(report["losses"])) == (48, False, 2)
    assert pretrain(sets, "mmsrec", into, **given)["reused"]
    with pytest.raises(UserError, match="holds another pretraining"):
        pretrain(sets[:1], "mmsrec", into, **given)
    training_set = read_training_set(served.connection)
    ready = train_checkpoint(
        training_set, "mmsrec", served.home / "checkpoints", options={**OPTIONS, "epochs": 0}, device="cpu", start=into
    )
    assert (ready.start, ready.curves, ready.metrics["ndcg@10"] > 0) == (str(into), [], True)
    weights = [checkpoint.read_tensors(folder / "towers.safetensors") for folder in (into, ready.directory)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    generation = build(served.connection, ready.directory)
    assert lifecycle.get(served.connection, generation).config["start"] == str(into)
    with pytest.raises(UserError, match="another shape: its dim is 16, not 128"):
        train_checkpoint(training_set, "mmsrec", served.home / "checkpoints", device="cpu", start=into)
    whole = pretrain(sets, "mmsrec", served.home / "sequences", sequences=True, **{**given, "options": OPTIONS})
    assert whole["metrics"]["ndcg@10"] > 0


def test_commands_pretrain_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")
    folders = [str(tiny_folder(tmp_path / name, 20, 24)) for name in ("one", "two")]
    into = str(tmp_path / "model")
    small = [argument for name, value in OPTIONS.items() for argument in ("--option", f"{name}={value}")]

    def run(*arguments: str) -> dict[str, Any]:
        result = CliRunner().invoke(cli, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
        return found

    report = run("pretrain", *folders, "--content", "attributes", "--into", into, *small)
    assert (report["items"], report["data"], [*report["encoders"]]) == (48, ["one", "two"], ["attributes"])
    assert report["told"] == ["2 of 48 items have no content and are left out"]
    start = ["--preset", "mmsrec", "--content", "attributes", "--start", into, *small, "--option", "epochs=0"]
    report = run("experiment", folders[0], *start)
    assert report["epochs"] == [0]
    assert report["metrics"]["masked"]["recall@10"]["mean"] > 0
    wrong = CliRunner().invoke(cli, ["pretrain", *folders, "--into", into, *["--images", folders[0]] * 3])
    assert "3 for 2 folders" in wrong.output
