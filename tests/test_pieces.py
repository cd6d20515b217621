"""Work is cut into pieces everywhere; what comes out does not depend on where the cuts are.

A constant that says how large a piece is has CHUNK, BATCH or BLOCK among the words of its name, and stands in PIECES of
pieces.py; two tests hold that none is forgotten and that none is written as a bare number.
"""

import ast
import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq
import pytest
from feast.protos.feast.types.Value_pb2 import Value as ValueProto

from encoders.content.attributes import AttributesEncoder
from encoders.content.image import ImageEncoder
from encoders.content.text import TextEncoder
from encoders.evaluation.evaluate import TowersScorer, interests_report
from encoders.evaluation.splits import leave_one_out
from encoders.experiments.experiment import _encoded
from feature_repo.views.online_writes import Row, write_rows
from pipelines.content_codes import code_content
from pipelines.content_embeddings import encode_modality
from pipelines.export import export
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.evaluation import evaluate_generation
from pipelines.generation.past_interests import past_interests
from pipelines.generation.training import aligned, read_snapshot, train_checkpoint
from pipelines.generation.training_set import read_catalogue, read_training_set
from pipelines.load.dataset import read_folder
from pipelines.load.folder import load_folder
from pipelines.query_embeddings import encode_queries
from pipelines.sequences import changed_days, refresh_sequences
from polytower.postgres import connect
from serving.database import Database
from serving.loaded.content_queries import ContentQueries
from serving.loaded.loader import Loader
from serving.loaded.user_towers import History, UserTowers
from serving.memory.fill import read
from serving.metrics import ServerMetrics
from serving.question import Interests, Question
from serving.rank.relevance import relevance_features
from serving.rank.similarity import Pair, similarity_features
from tests.conftest import cloned
from tests.encoders.checkpoints import bert, vit
from tests.factories import tiny_folder
from tests.pieces import EVENTS, ITEMS, PIECES, USERS

ROOT = Path(__file__).parents[1]
FOLDERS = ("encoders", "feature_repo", "migrations", "pipelines", "polytower", "serving")

# What only a GPU takes.
ELSEWHERE = {"encoders.towers.losses._CHUNK_GPU"}
WORDS = re.compile(r"(^|_)(CHUNK|BATCH|BLOCK)(_|$)")


@dataclass(frozen=True)
class Given:
    """What both runs of the flow read."""

    folder: Path
    text: TextEncoder
    image: ImageEncoder


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    home = tmp_path_factory.mktemp("pieces")
    folder = tiny_folder(home / "data", USERS, ITEMS, images=True, events=EVENTS, queries=True)
    return Given(folder, *_encoders(home))


def _encoders(home: Path) -> tuple[TextEncoder, ImageEncoder]:
    return TextEncoder(str(bert(home / "bert")), device="cpu"), ImageEncoder(
        str(vit(home / "vit")), device="cpu", workers=1
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pieces are small."""
    for name, (size, _) in PIECES.items():
        module, _, constant = name.rpartition(".")
        found = getattr(__import__(module, fromlist=[constant]), constant)
        monkeypatch.setattr(name, dict.fromkeys(found, size) if isinstance(found, dict) else size)


def test_every_loop_has_three_rounds_and_a_remainder() -> None:
    assert {name for name, (size, whole) in PIECES.items() if 3 * size >= whole or whole % size == 0} == set()


def test_no_piece_is_forgotten() -> None:
    found = {name for name, value in _constants() if WORDS.search(name.rpartition(".")[2]) and _is_size(value)}
    assert found == {*PIECES, *ELSEWHERE}


def test_no_piece_is_a_bare_number() -> None:
    """Steps of range, and what fetchmany, itersize, islice, split and iter_batches are given, have names."""
    bare = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            bare += [
                f"{path.relative_to(ROOT)}:{node.lineno}" for size in _sizes(node) if isinstance(size, ast.Constant)
            ]
    assert bare == []


def test_the_flow_does_not_depend_on_where_it_is_cut(
    server: str, given: Given, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, image = _encoders(tmp_path)  # batch sizes are read when an encoder is made
    with cloned(server, "pieces_small") as url:
        cut = Flow(url, Given(given.folder, text, image), tmp_path / "small", monkeypatch).run()
    monkeypatch.undo()
    with cloned(server, "pieces_whole") as url:
        whole = Flow(url, given, tmp_path / "whole", monkeypatch).run()
    assert cut.keys() == whole.keys()
    for name, value in whole.items():
        _same(name, cut[name], value)


class Flow:
    """The product path by its functions: from a folder to answers, with what each step made."""

    def __init__(self, url: str, given: Given, home: Path, patch: pytest.MonkeyPatch) -> None:
        self.url = url
        self.given = given
        self.home = home
        patch.setenv("POLYTOWER_TEXT_ENCODER", given.text.model)
        patch.setenv("POLYTOWER_DEVICE", "cpu")

    def run(self) -> dict[str, Any]:
        """Name → rows, or arrays that may differ by rounding."""
        with connect(self.url) as connection:
            return {
                **self.loaded(connection),
                **self.encoded(connection),
                **self.built(connection),
                **self.asked(connection),
                **self.written(connection),
            }

    def loaded(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """Tables and sequences."""
        counts = load_folder(connection, self.given.folder, self.given.folder / "images").counts
        days = changed_days(connection)
        assert days is not None
        refresh_sequences(connection, *days)
        return {"counts": counts, **tables(connection)}

    def encoded(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """Content embeddings, and what the encoders make of a plain list."""
        found: dict[str, Any] = {}
        contents = connection.execute("select title, image_path, attributes from items order by item_id").fetchall()
        titles, paths, attributes = (list(column) for column in zip(*contents, strict=True))
        for encoder, listed in (
            (self.given.text, titles),
            (self.given.image, [path for path in paths if path]),
            (AttributesEncoder(), attributes),
        ):
            encode_modality(connection, encoder.modality, encoder)
            found[f"list of {encoder.modality}"] = np.concatenate(list(encoder.encode(listed)))  # type: ignore[attr-defined]
        rows = connection.execute(
            "select modality, item_id, embedding from content_embeddings order by modality, item_id"
        ).fetchall()
        assert encode_queries(connection, self.given.text).encoded > ITEMS // 2
        queries = connection.execute("select query_key, embedding from query_embeddings order by 1").fetchall()
        directly, *_ = _encoded("attributes", read_folder(self.given.folder)[0], "cpu", None)
        return found | {
            "attributes of an experiment": directly,
            "queries": [key for key, _ in queries],
            "query embeddings": [vector.to_numpy().astype(np.float32) for _, vector in queries],
            "content of": [row[:2] for row in rows],
            "content": [row[2].to_numpy().astype(np.float32) for row in rows],
            "coded": code_content(connection).bytes,
        }

    def built(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """A generation, from training to evaluation."""
        training_set = read_training_set(connection, 8)
        options = {
            "epochs": 2, "batch_rows": 4, "negatives": 16, "table_optimiser": "rowwise", "towers.user_attributes": 8,
            "towers.dropout": 0.0, "towers.content_dropout": 0.0, "threads": 1,
        }  # fmt: skip
        trained = train_checkpoint(training_set, "tiny", self.home, options=options, device="cpu")
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation)
        report = evaluate_generation(connection, generation)
        rows = connection.execute(
            "select user_id, interest, embedding, weight, as_of from user_interests order by user_id, interest"
        ).fetchall()
        items = connection.execute("select item_id, embedding from item_embeddings order by item_id").fetchall()
        users = [f"u{n}" for n in range(USERS)]
        connection.execute("update generations set trained_before = '2020-01-01Z'")
        past = past_interests(connection, generation, users, [datetime(2024, 1, 2, tzinfo=UTC)] * USERS)
        connection.rollback()
        return {
            "past interests": past.vectors,
            "histories": training_set.histories.items.tolist(),
            "user attributes": training_set.histories.attributes,
            "item ids": [item for item, _ in items],
            "items": [vector.to_numpy().astype(np.float32) for _, vector in items],
            "interests of": [(row[0], row[1], row[4]) for row in rows],
            "interests": [row[2].to_numpy().astype(np.float32) for row in rows],
            "weights": np.array([row[3] for row in rows]),
            "questions": report.questions,
            "popularity": [np.array([*metrics.values()]) for metrics in report.baselines["popularity"].values()],
            "shares of interests": _shares(connection, trained.directory),
        }

    def asked(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """Answers: from memory, by many at once, and what a ranker is told of candidates."""
        index = read(connection, 1 << 30)
        assert index is not None
        _, tower, config = self._tower(connection)
        users = [f"u{n}" for n in range(USERS)]
        stored = connection.execute(
            "select array_agg(embedding order by interest) from user_interests group by user_id order by user_id"
        ).fetchall()
        vectors = [np.stack([v.to_numpy() for v in row[0]]).astype(np.float32) for row in stored]
        answers = [
            index.answer(
                Question(vectors=each.tolist(), k=ITEMS, fields=["title"]),
                Interests("stored", each, None, range(len(each))),
            )
            for each in vectors
        ]
        assert all(answer is not None for answer in answers)
        pairs = [
            Pair(user, f"i{n}", datetime(2024, 1, 20, tzinfo=UTC) + timedelta(days=1)) for n, user in enumerate(users)
        ]
        similar = similarity_features(connection, pairs).to_pydict()
        files = export(connection, self.home / "exported", k=ITEMS).folder
        of_one = [Pair("u0", f"i{n}", pairs[0].at) for n in range(ITEMS)]
        relevant = relevance_features(connection, of_one, 3)["relevant_scores"].to_pylist()
        return {
            "exported": [pq.read_table(files / name).num_rows for name in ("items.parquet", "candidates.parquet")],
            "exported ids": pq.read_table(files / "items.parquet", columns=["item_id"]).column(0).to_pylist(),
            "ids from memory": [sorted(candidate.item_id for candidate in answer or ()) for answer in answers],
            "best in memory": np.array([[c.score for c in answer or ()] for answer in answers]),
            "titles in memory": [sorted(str(c.title) for c in answer or ()) for answer in answers],
            "similarities": [_filled(similar[name]) for name in sorted(similar) if name.startswith("similarity")],
            "relevant": np.array(relevant),
            "at once": asyncio.run(_at_once(self.url, tower, config, vectors)),
        }

    def written(self, connection: psycopg.Connection[Any]) -> dict[str, Any]:
        """Rows that Feast writes online."""
        moment = datetime(2024, 3, 1, tzinfo=UTC)
        rows = [
            Row(f"u{n}", moment, {
                "user_interactions": ValueProto(int64_val=n), "user_distinct_items": ValueProto(int64_val=n),
                "user_mean_value": ValueProto(double_val=n / 4), "user_first_at": ValueProto(int64_val=n),
            })
            for n in range(USERS)
        ]  # fmt: skip
        assert write_rows(connection, "user_stats", rows) == USERS
        found = connection.execute("select * from user_stats where day = '2024-03-01' order by user_id").fetchall()
        return {"written": found}

    def _tower(self, connection: psycopg.Connection[Any]) -> tuple[Any, bytes, Any]:
        row = connection.execute("select 1, weights, config from towers where part = 'user_tower'").fetchone()
        assert row is not None
        return row


async def _at_once(url: str, weights: bytes, config: Any, histories: Sequence[Any]) -> list[Any]:
    """Interests of all histories and vectors of as many texts, asked in one moment."""
    metrics, loader = ServerMetrics(), Loader(patience=60)
    towers, database = UserTowers(metrics, loader, window=0), Database(url, metrics, size=2, timeout=60)
    content = ContentQueries(database, metrics, loader)
    await database.open()
    try:
        await towers.load(1, weights, config)
        found = await asyncio.gather(*(towers.interests(History(1, list(history), None)) for history in histories))
        texts = [Question(text=f"red shoe {'a ' * n}") for n in range(ITEMS)]
        embedded = await asyncio.gather(*(content.embed(question) for question in texts))
        return [np.concatenate([each.vectors for each in found]), np.stack([each.vector for each in embedded])]
    finally:
        await database.close()
        for each in (towers, content, loader):
            each.close()  # type: ignore[attr-defined]


def tables(connection: psycopg.Connection[Any]) -> dict[str, Any]:
    """What a load and a refresh wrote, in order."""
    statements = {
        "items": "select item_id, title, description, available, attributes from items order by item_id",
        "users": "select user_id, attributes from users order by user_id",
        "interactions": "select user_id, item_id, occurred_at, kind, value from interactions order by position",
        "sequences": "select user_id, day, item_ids from user_sequences order by user_id, day",
    }
    return {name: connection.execute(statement).fetchall() for name, statement in statements.items()}


def _shares(connection: psycopg.Connection[Any], directory: Path) -> Any:
    from encoders.training import checkpoint

    item_ids, histories = read_snapshot(directory)
    towers, _, _ = checkpoint.load(directory, aligned(read_catalogue(connection)[0], item_ids))
    return np.array(interests_report(TowersScorer(towers), leave_one_out(histories).test)["weights"])


def _filled(column: list[Any]) -> Any:
    return np.array([[0.0] * 20 if value is None else value for value in column])


def _same(name: str, cut: Any, whole: Any) -> None:
    """Vectors by their directions, numbers by rounding, everything else exactly.

    Adam amplifies a rounding; a row in the wrong place would be far off.
    """
    arrays = [cut, whole]
    if isinstance(whole, list) and whole and isinstance(whole[0], np.ndarray):
        assert len(cut) == len(whole), name
        for one, other in zip(cut, whole, strict=True):
            _same(name, one, other)
    elif isinstance(whole, np.ndarray):
        np.testing.assert_allclose(*arrays, atol=0.02, err_msg=name)
    else:
        assert cut == whole, name


def _sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def _constants() -> Iterator[tuple[str, Any]]:
    """(dotted name, expression) of all that modules assign."""
    for path in _sources():
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AnnAssign)
                else []
            )
            for target in targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(names)  # type: ignore[union-attr]
                yield from (
                    (f"{module}.{name.id}", value)
                    for name, value in zip(names, values, strict=False)
                    if isinstance(name, ast.Name)
                )


def _is_size(value: Any) -> bool:
    """A number, an expression of numbers, or a dict of them."""
    if isinstance(value, ast.Dict):
        return all(map(_is_size, value.values))
    if isinstance(value, ast.BinOp):
        return _is_size(value.left) and _is_size(value.right)
    return isinstance(value, ast.Constant) and isinstance(value.value, int)


def _sizes(node: ast.AST) -> list[ast.expr]:
    """The sizes of pieces that a call or assignment names."""
    if isinstance(node, ast.Assign) and any(
        isinstance(t, ast.Attribute) and t.attr == "itersize" for t in node.targets
    ):
        return [node.value]
    if not isinstance(node, ast.Call):
        return []
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called == "range" and len(node.args) == 3:
        return [] if isinstance(node.args[2], ast.UnaryOp) else [node.args[2]]
    if called in ("fetchmany", "islice", "split", "array_split") and called != "split":
        return node.args[-1:]
    return [keyword.value for keyword in node.keywords if keyword.arg == "batch_size" and called == "iter_batches"]
