"""Each way to break a generation is stopped by the gate that is named for it, and a good one passes them all.

One good generation is built; what a build could have written instead is put in its place inside a transaction that is
rolled back. Checkpoints are damaged in copies, and built from.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector import HalfVector

from encoders.content.registry import CONTENT_ENCODERS
from pipelines.content_embeddings import encode_modality
from pipelines.generation import lifecycle, quality
from pipelines.generation.build import build
from pipelines.generation.embedding_gates import Gate
from pipelines.generation.held_out import HELD_OUT_GATES, held_out_gates
from pipelines.generation.integrity import INTEGRITY_GATES, integrity_gates
from pipelines.generation.replay import REPLAY_GATES, replay_gates
from pipelines.generation.training import train_checkpoint
from pipelines.generation.training_set import read_training_set
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from polytower.postgres import connect
from tests.factories import tiny_folder
from tests.generation_factory import Floats
from tests.pipelines.damages import CHECKPOINTS, ITEMS, STORED, half_shuffled, half_turned, random

USERS = 200
Connection = psycopg.Connection[Any]
MEASURED = {integrity_gates: INTEGRITY_GATES, replay_gates: REPLAY_GATES, held_out_gates: HELD_OUT_GATES}


@dataclass(frozen=True)
class Good:
    """A live generation that passed, and the folder of its checkpoint."""

    connection: Connection
    directory: Path
    generation: int


@pytest.fixture(scope="module")
def good(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Good]:
    home = tmp_path_factory.mktemp("home")
    with connect(module_database) as connection, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.generation.held_out.QUESTIONS", 100)
        load_folder(connection, tiny_folder(home / "data", users=USERS, items=ITEMS))
        encode_modality(connection, "attributes", CONTENT_ENCODERS["attributes"](device="cpu"))
        trained = train_checkpoint(read_training_set(connection), "tiny", home / "checkpoints", device="cpu")
        generation = build(connection, trained.directory)
        lifecycle.promote(connection, generation)
        yield Good(connection, trained.directory, generation)


def test_a_good_generation_passes_and_everything_is_measured(good: Good) -> None:
    gates = lifecycle.get(good.connection, good.generation).quality["gates"]
    assert [gate["name"] for gate in gates] == list(quality.GENERATION_GATES)
    assert [gate for gate in gates if not gate["passed"]] == []
    # The first generation has none to be compared with.
    unmeasured = [gate["name"] for gate in gates if gate["value"] is None]
    assert unmeasured == ["neighbour_churn", "recall_over_live"]


def stopped_by(
    connection: Connection, generation: int, spoil: Callable[[Connection], object], suspect: str
) -> set[str]:
    """The names of what stops a generation that is written so: what refuses the rows, or blocking gates, of those that
    are measured together with the suspect."""
    with connection.transaction(force_rollback=True):
        try:
            with connection.transaction():
                lifecycle.amends(connection)
                spoil(connection)
        except psycopg.errors.CheckViolation as error:
            return {str(error.diag.constraint_name)}
        except psycopg.errors.DataException as error:
            return {"width" if "dimensions" in str(error) else "halfvec"}
        measure = next((m for m, names in MEASURED.items() if suspect in names), quality.generation_gates)
        return blocking(gate.as_json() for gate in measure(connection, generation))


def blocking(gates: Iterable[dict[str, Any]]) -> set[str]:
    return {gate["name"] for gate in gates if gate["severity"] == "error" and not gate["passed"]}


@pytest.mark.parametrize("damage", STORED)
def test_what_is_stored_wrongly_is_stopped_by_its_gate(good: Good, damage: str) -> None:
    gate, spoil = STORED[damage]
    assert gate in stopped_by(good.connection, good.generation, spoil, gate)


def test_every_gate_on_what_is_found_fails_where_nothing_is(good: Good) -> None:
    with good.connection.transaction(force_rollback=True):
        lifecycle.amends(good.connection)
        good.connection.execute("delete from item_embeddings")
        failed = {gate.name for gate in held_out_gates(good.connection, good.generation) if not gate.passed}
    assert failed == {*HELD_OUT_GATES} - {"reported_ndcg", "recall_over_live"}


@pytest.mark.parametrize("change", [half_turned, half_shuffled])
def test_content_of_another_space_or_item_is_found_by_asking_the_encoder(
    good: Good, change: Callable[[Floats, np.random.Generator], Floats]
) -> None:
    encoder = CONTENT_ENCODERS["attributes"](device="cpu")

    def replayed() -> Gate:
        gates = quality.content_gates(good.connection, "attributes", encoder.revision, encoder)
        return next(gate for gate in gates if gate.name == "content_replay")

    assert replayed().passed
    with good.connection.transaction(force_rollback=True):
        rows = good.connection.execute("select item_id, embedding from content_embeddings order by item_id").fetchall()
        changed = change(np.stack([vector.to_numpy() for _, vector in rows]).astype(np.float32), random())
        good.connection.cursor().executemany(
            "update content_embeddings set embedding = %s where item_id = %s",
            [(HalfVector(vector), item_id) for vector, (item_id, _) in zip(changed, rows, strict=True)],
        )
        assert not replayed().passed


@pytest.mark.parametrize(
    "statement",
    [
        "update item_embeddings set embedding = content_embedding",
        "update item_embeddings_g1 set id_embedding = null where item_id = 'i1'",
        "delete from item_embeddings where item_id = 'i1'",
        "insert into user_interests select generation, 'new', 0, embedding, 1, as_of, 0 from user_interests limit 1",
        "delete from user_interests_g1",
        "truncate user_interests_g1",
        "truncate item_embeddings",
        "update towers set weights = ''",
        "delete from towers",
    ],
)
def test_nobody_writes_to_a_generation_that_is_built(good: Good, statement: str) -> None:
    with (
        pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match=r"is built|is part of a generation"),
        good.connection.transaction(),
    ):
        good.connection.execute(statement)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("delete from item_embeddings where abs(hashtext(item_id)) % 2 = 0", "item_embeddings had rows 200"),
        ("update item_embeddings set embedding = content_embedding where item_id = 'i7'", "item_embeddings"),
        ("update user_interests set weight = 1 - weight where user_id = 'u7'", "user_interests"),
        ("update towers set weights = '' where part = 'content'", "towers.content"),
        ("delete from towers where part = 'user_tower'", "towers.user_tower had .* and has nothing now"),
    ],
)
def test_what_was_damaged_after_its_gates_is_not_promoted(good: Good, statement: str, part: str) -> None:
    with good.connection.transaction(force_rollback=True):
        good.connection.execute("update generations set state = 'ready' where state = 'live'")
        lifecycle.switch(good.connection, good.generation)
        good.connection.execute("update generations set state = 'ready' where state = 'live'")
        lifecycle.amends(good.connection)
        good.connection.execute(statement)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"changed after its gates had measured it: {part}"):
            lifecycle.switch(good.connection, good.generation, force=True)


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_damaged_checkpoint_is_stopped_by_its_gate(
    good: Good, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same weights over the same data would be found again, good as they are.
    monkeypatch.setattr("pipelines.generation.build._kept", lambda *_: None)
    reason, spoil = CHECKPOINTS[damage]
    directory = Path(shutil.copytree(good.directory, tmp_path / good.directory.name))
    spoil(directory)
    if " " in reason:
        with pytest.raises((UserError, psycopg.DataError, psycopg.errors.CheckViolation), match=reason):
            build(good.connection, directory)
        return
    generation = build(good.connection, directory)
    try:
        assert reason in blocking(lifecycle.get(good.connection, generation).quality["gates"])
        if damage == "random weights":  # the other damage is to the report alone
            assert "recall_over_live" in blocking(lifecycle.get(good.connection, generation).quality["gates"])
        with pytest.raises(UserError, match="failed its quality gates"):
            lifecycle.promote(good.connection, generation)
    finally:
        good.connection.rollback()
        lifecycle.drop(good.connection, generation)
