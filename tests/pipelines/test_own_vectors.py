"""The user's own embeddings: from a column that the load names to neighbours that are served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from encoders.content.registry import encoder_of
from encoders.experiments.experiment import encoded_catalogue, run_experiment
from pipelines.content_embeddings import encode_modality
from pipelines.generation.build import build
from pipelines.generation.lifecycle import promote
from pipelines.generation.training import train_checkpoint
from pipelines.generation.training_set import read_training_set
from pipelines.item_content import model_of
from pipelines.load.dataset import read_folder
from pipelines.load.folder import LoadReport, load_folder
from pipelines.load.vectors import MAX_WIDTH
from polytower.errors import UserError
from polytower.settings import settings
from tests.factories import Format, tiny_folder, tiny_items, write_rows

Connection = psycopg.Connection[Any]
WIDTH = 16
FORMATS: tuple[Format, ...] = ("parquet", "csv", "jsonl")


def vectors(items: int, width: int = WIDTH, seed: int = 0) -> np.ndarray[Any, Any]:
    """Near one of four directions, as the tastes of `tiny_folder` are."""
    random = np.random.default_rng(seed)
    tastes = random.standard_normal((4, width))
    return (tastes[np.arange(items) % 4] + 0.2 * random.standard_normal((items, width))).astype(np.float32)


def with_vectors(path: Path, file_format: Format = "parquet", items: int = 60, width: int = WIDTH) -> Path:
    """A tiny folder whose items have a column `emb`; the last item's cell is empty."""
    folder = tiny_folder(path, items=items, file_format=file_format)
    rows = tiny_items(items)
    for row, vector in zip(rows, vectors(items, width), strict=True):
        row["emb"] = vector.tolist()
    rows[-1]["emb"] = None
    write_rows(folder / f"items.{file_format}", rows)
    return folder


def some(path: Path, cells: dict[str, Any], column: str = "emb") -> Path:
    """A folder of items alone, as JSON lines: item id → cell."""
    write_rows(path / "items.jsonl", [{"item_id": item, column: cell} for item, cell in cells.items()])
    return path


def load(connection: Connection, folder: Path, column: str = "emb", max_rejected: float = 0.05) -> LoadReport:
    return load_folder(connection, folder, own={"vector": column}, max_rejected=max_rejected)


def stored(connection: Connection) -> dict[str, list[float] | None]:
    rows = connection.execute("select item_id, vector from items order by item_id").fetchall()
    return dict(rows)


def encode(connection: Connection) -> Any:
    encoder = encoder_of("vector", settings(), model_of(connection, "vector"))
    return encode_modality(connection, "vector", encoder)


@pytest.mark.parametrize("file_format", FORMATS)
def test_all_formats_give_the_same_directions(connection: Connection, tmp_path: Path, file_format: Format) -> None:
    folder = with_vectors(tmp_path / "data", file_format)
    report = load(connection, folder)
    assert (report.rejected, report.warnings) == ([], [])
    assert "emb" not in report.attributes["items"]
    found = stored(connection)
    assert found["i59"] is None
    for number, vector in enumerate(vectors(60)[:-1]):
        assert np.array_equal(np.array(found[f"i{number}"], np.float32), vector)
    assert connection.execute("select count(*) from items where attributes ? 'emb'").fetchone() == (0,)
    assert connection.execute("select distinct vector_model from items where vector is not null").fetchall() == [
        (f"emb/{WIDTH}",)
    ]
    assert load(connection, folder).counts["items_unchanged"] == 60


def test_they_are_encoded_trained_with_and_served(connection: Connection, tmp_path: Path) -> None:
    load(connection, with_vectors(tmp_path / "data"))
    report = encode(connection)
    assert (report.items, report.encoded, report.failed, report.model) == (59, 59, 0, f"emb/{WIDTH}")
    (kept,) = connection.execute("select embedding from content_embeddings where item_id = 'i0'").fetchone()  # type: ignore[misc]
    first = vectors(60)[0]
    np.testing.assert_allclose(kept.to_numpy().astype(np.float32), first / np.linalg.norm(first), atol=1e-3)
    assert encode(connection).encoded == 0
    training_set = read_training_set(connection)
    assert training_set.catalogue.modalities == (("vector", WIDTH),)
    options = {"epochs": 2, "threads": 1}
    trained = train_checkpoint(training_set, "tiny", tmp_path / "checkpoints", options=options, device="cpu")
    promote(connection, build(connection, trained.directory))
    near = connection.execute("select item_id from similar_items('i0', 10, 'content')").fetchall()
    assert sum(int(item[1:]) % 4 == 0 for (item,) in near) >= 8, near
    assert connection.execute("select vector_dims(vector_embedding) from item_content limit 1").fetchone() == (WIDTH,)


def test_an_experiment_learns_from_them(tmp_path: Path) -> None:
    folder = with_vectors(tmp_path / "data", "csv")
    data, rejections = read_folder(folder, own={"vector": "emb"})
    assert rejections.kept == []
    catalogue = encoded_catalogue(data, ["vector"])
    assert catalogue.present["vector"].sum() == 59
    np.testing.assert_allclose(np.linalg.norm(catalogue.content["vector"][:-1], axis=1), 1, atol=1e-5)
    options = {"epochs": 1, "threads": 1}
    report = run_experiment(data, "tiny", [0], directory=tmp_path / "runs", modalities=["vector"], options=options)
    assert report["modalities"] == ["vector"]
    with pytest.raises(UserError, match="--vectors COLUMN"):
        encoded_catalogue(read_folder(folder)[0], ["vector"])


GOOD = [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ([1.0, 2.0], "holds 2 numbers, where the rows before hold 3"),
        ([1.0, None, 2.0], "holds nan among its numbers"),
        ([0.0, 0.0, 0.0], "is all zeros, which is no direction"),
        ([1e-60, 0.0, 0.0], "is all zeros, which is no direction"),
        ([1e300, 0.0, 0.0], "holds a number that single precision does not reach"),
        ([], "holds no numbers"),
        ([1.0, True, 2.0], "is not a list of numbers"),
        ([1.0, "two", 2.0], "is not a list of numbers"),
        ("1, 2, 3", "is not a list of numbers"),
        ([1.0] * (MAX_WIDTH + 1), f"holds {MAX_WIDTH + 1:,} numbers; at most {MAX_WIDTH:,} can be kept"),
    ],
)
def test_what_is_no_direction_is_a_rejected_row(connection: Connection, tmp_path: Path, cell: Any, reason: str) -> None:
    report = load(connection, some(tmp_path, {"a": GOOD, "b": cell, "c": None}), max_rejected=0.5)
    assert [(r.row, r.column, r.reason) for r in report.rejected] == [(2, "emb", reason)]
    assert stored(connection) == {"a": GOOD, "c": None}


@pytest.mark.parametrize("cell", ["[1, NaN, 2]", "[1, -Infinity, 2]", "[1, 2", "{}", "7"])
def test_json_text_in_csv_is_checked_as_well(connection: Connection, tmp_path: Path, cell: str) -> None:
    write_rows(tmp_path / "items.csv", [{"item_id": "a", "emb": GOOD}, {"item_id": "b", "emb": cell}])
    assert len(load(connection, tmp_path, max_rejected=0.5).rejected) == 1
    assert stored(connection) == {"a": GOOD}


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.int32()), pa.list_(pa.float32(), 3)],
)
def test_parquet_s_kinds_of_lists(connection: Connection, tmp_path: Path, kind: pa.DataType) -> None:
    cells = [np.array(GOOD, np.float16) if kind == pa.list_(pa.float16()) else [int(n) for n in GOOD], None]
    pq.write_table(pa.table({"item_id": ["a", "b"], "emb": pa.array(cells, kind)}), tmp_path / "items.parquet")
    load(connection, tmp_path)
    assert stored(connection) == {"a": GOOD, "b": None}


def test_what_a_load_does_not_name_stays_and_what_it_empties_goes(connection: Connection, tmp_path: Path) -> None:
    load(connection, some(tmp_path / "first", {"a": GOOD, "b": GOOD, "c": GOOD}))
    write_rows(tmp_path / "titles" / "items.csv", [{"item_id": "a", "title": "A"}])
    load_folder(connection, tmp_path / "titles")
    write_rows(tmp_path / "some" / "items.jsonl", [{"item_id": "b", "emb": None}, {"item_id": "c", "title": "C"}])
    load(connection, tmp_path / "some")
    assert stored(connection) == {"a": GOOD, "b": None, "c": GOOD}
    encode(connection)
    load(connection, some(tmp_path / "none", {"a": None, "c": None}))
    report = encode(connection)
    assert (report.items, report.removed) == (0, 2)


def test_another_width_or_column_has_to_come_for_all(connection: Connection, tmp_path: Path) -> None:
    load(connection, some(tmp_path / "first", {"a": GOOD, "b": GOOD}))
    before = encode(connection).revision
    with pytest.raises(UserError, match=r"--vectors: .* 1 emb/2 \(such as 'a'\), 1 emb/3 \(such as 'b'\)"):
        load(connection, some(tmp_path / "part", {"a": [1.0, 2.0]}))
    assert stored(connection) == {"a": GOOD, "b": GOOD}
    load(connection, some(tmp_path / "all", {"a": [1.0, 2.0], "b": [2.0, 1.0]}))
    report = encode(connection)
    assert (report.encoded, report.model, report.revision != before) == (2, "emb/2", True)


def test_a_column_that_is_not_there_is_refused(connection: Connection, tmp_path: Path) -> None:
    folder = some(tmp_path, {"a": GOOD})
    with pytest.raises(UserError, match=r"--vectors embb: items\.jsonl has no such column \(it has: item_id, emb\)"):
        load(connection, folder, "embb")
    with pytest.raises(UserError, match="--vectors title: that column has a meaning of its own"):
        load(connection, folder, "title")
    pq.write_table(pa.table({"item_id": ["a"], "emb": [1.5]}), tmp_path / "items.parquet")
    (tmp_path / "items.jsonl").unlink()
    with pytest.raises(UserError, match="column emb holds double; lists of numbers are expected"):
        load(connection, tmp_path)
    (tmp_path / "items.parquet").rename(tmp_path / "users.parquet")
    with pytest.raises(UserError, match="holds no items"):
        load(connection, tmp_path)


def test_embeddings_that_nobody_named_are_told(connection: Connection, tmp_path: Path) -> None:
    folder = with_vectors(tmp_path / "data")
    (warning,) = load_folder(connection, folder).warnings
    assert "column emb holds lists of 16 numbers" in warning
    assert "looks like embeddings: --vectors emb" in warning
    assert load(connection, folder).warnings == []
    assert connection.execute("select count(*) from items where attributes ? 'emb'").fetchone() == (0,)
    few = some(tmp_path / "few", {"a": [0.5] * 15}, "scores")
    assert load_folder(connection, few).warnings == []


def test_the_command_line_takes_the_column(platform: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from polytower.cli import cli

    done = CliRunner().invoke(cli, ["load", str(some(tmp_path, {"a": GOOD})), "--vectors", "emb", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["counts"]["items_new"] == 1
