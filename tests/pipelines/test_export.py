"""A generation as Parquet: what is in the files is what SQL answers, whole or not at all."""

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from pipelines.export import export
from pipelines.generation import lifecycle
from polytower.cli import cli
from polytower.errors import UserError
from polytower.postgres import connect
from tests.generation_factory import Synthetic, unit, write_generation


@pytest.fixture
def shop(database: str) -> str:
    """Twenty items (one without an ID embedding), two users who have seen some; generation 2 is live."""
    random = np.random.default_rng(2)
    data = Synthetic(
        [f"i{n:02d}" for n in range(20)],
        unit(random.standard_normal((20, 5))),
        {user: unit(random.standard_normal((3, 5))) for user in ("ada", "bob")},
        {"ada": [0.5, 0.3, 0.2]},
        seen={"ada": ["i01", "i02"]},
    )
    with connect(database) as connection:
        write_generation(connection, data)
        write_generation(connection, data)
        lifecycle.amends(connection)
        connection.execute("update item_embeddings set id_embedding = null where item_id = 'i07'")
        connection.execute("delete from user_interests where user_id = 'ada' and interest = 1")
    return database


def test_the_files_hold_what_sql_answers(shop: str, tmp_path: Path) -> None:
    with connect(shop) as connection:
        found = export(connection, tmp_path / "out", k=4)
        assert (found.generation, found.rows) == (
            2, {"items.parquet": 20, "interests.parquet": 5, "candidates.parquet": 8},
        )  # fmt: skip
        items = pq.read_table(found.folder / "items.parquet").to_pylist()
        for row, (item_id, title, vector, identity) in zip(
            items,
            connection.execute(
                "select item_id, title, e.embedding, e.id_embedding from item_embeddings e join items using (item_id)"
                " where generation = 2 order by 1"
            ),
            strict=True,
        ):
            assert (row["item_id"], row["title"]) == (item_id, title)
            np.testing.assert_array_equal(row["embedding"], vector.to_numpy())
            assert (row["id_embedding"] is None) is (identity is None) is (item_id == "i07")
        candidates = pq.read_table(found.folder / "candidates.parquet").to_pylist()
        for user in ("ada", "bob"):
            asked = connection.execute(
                "select rank, item_id, score::float8, interest, interest_rank from retrieve(%s, 4) order by rank",
                [user],
            ).fetchall()
            assert [tuple(row.values())[1:] for row in candidates if row["user_id"] == user] == asked
        interests = pq.read_table(found.folder / "interests.parquet").to_pylist()
        assert [(row["user_id"], row["interest"]) for row in interests] == [
            ("ada", 0), ("ada", 2), ("bob", 0), ("bob", 1), ("bob", 2),
        ]  # fmt: skip


def test_another_generation_and_no_candidates(shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_DATABASE_URL", shop)
    line = ["export", str(tmp_path / "out"), "--generation", "1", "-k", "0"]
    done = CliRunner().invoke(cli, line, catch_exceptions=False)
    assert "generation 1 in" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"items.parquet", "interests.parquet"}
    with pytest.raises(UserError, match="is there already"):
        CliRunner().invoke(cli, line, catch_exceptions=False)
    with pytest.raises(UserError, match="no generation 9"):
        CliRunner().invoke(cli, ["export", str(tmp_path / "x"), "--generation", "9"], catch_exceptions=False)


def test_a_failed_export_leaves_nothing(shop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise psycopg.OperationalError("gone")

    monkeypatch.setattr("pipelines.export._candidates_schema", fail)
    with connect(shop) as connection, pytest.raises(psycopg.OperationalError):
        export(connection, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("pipelines.export._array", fail)
    with connect(shop) as connection, pytest.raises(psycopg.OperationalError):
        export(connection, tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
