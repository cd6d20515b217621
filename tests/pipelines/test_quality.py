"""Every gate over Postgres: silent on a sound generation or modality, and failing on the one fault it looks for."""

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector import HalfVector

from feature_repo.modalities import MODALITIES
from pipelines.generation import lifecycle, quality
from pipelines.generation.embedding_gates import Gate
from pipelines.generation.held_out import HELD_OUT_GATES
from pipelines.generation.integrity import INTEGRITY_GATES
from pipelines.generation.meanings import MEANINGS
from pipelines.generation.replay import REPLAY_GATES
from pipelines.generation.title_recall import TITLE_GATES
from polytower.errors import UserError
from tests.generation_factory import Floats, Synthetic, unit, write_generation

ITEMS, USERS, D = 240, 30, 16
Connection = psycopg.Connection[Any]
Fault = Callable[[Connection, int], object]


def vectors(seed: int = 0, items: int = ITEMS) -> Floats:
    return unit(np.random.default_rng(seed).standard_normal((items, D)))


def synthetic(embedding: Floats) -> Synthetic:
    """Items i0 .. (the last tenth is cold), users with two interests and five events each; i0 is everybody's."""
    random = np.random.default_rng(1)
    warm = len(embedding) * 9 // 10
    return Synthetic(
        item_ids=[f"i{n}" for n in range(len(embedding))],
        embedding=embedding,
        interests={f"u{n}": unit(random.standard_normal((2, D))) for n in range(USERS)},
        seen={f"u{n}": ["i0", *(f"i{1 + (n * 8 + step) % (warm - 1)}" for step in range(8))] for n in range(USERS)},
    )


def sound(connection: Connection, data: Synthetic) -> int:
    """A generation whose interests are dated by the newest event that they know, as a build dates them."""
    generation = write_generation(connection, data)
    lifecycle.amends(connection)
    connection.execute(
        """update user_interests u set as_of = (select max(occurred_at) from interactions i where i.user_id = u.user_id)
           where generation = %s""",
        [generation],
    )
    return generation


def gates(connection: Connection, generation: int) -> dict[str, Gate]:
    return {gate.name: gate for gate in quality.generation_gates(connection, generation)}


def test_a_sound_generation_passes_every_gate(connection: Connection) -> None:
    found = gates(connection, sound(connection, synthetic(vectors())))
    assert tuple(found) == quality.GENERATION_GATES
    assert [str(gate) for gate in found.values() if not gate.passed] == []
    # Nothing to compare with: the first generation has no predecessor, a synthetic one no checkpoint.
    unmeasured = [name for name, gate in found.items() if gate.value is None]
    assert unmeasured == [
        "neighbour_churn", "ndcg_over_popularity", "interest_variety", "content_placed", *REPLAY_GATES, *HELD_OUT_GATES
    ]  # fmt: skip


def offset(rows: Floats) -> Floats:
    return unit(rows + np.eye(D, dtype=np.float32)[0] * 20)


def line(rows: Floats) -> Floats:
    return unit(rows[:1] * np.where(np.arange(len(rows)) % 2, 1, -1)[:, None])


def dead(rows: Floats) -> Floats:
    return unit(rows * (np.arange(D) > 2))


def repeated(rows: Floats) -> Floats:
    return np.concatenate([rows[:100], np.repeat(rows[:1], len(rows) - 100, axis=0)])


VECTOR_FAULTS = {
    "item_mean_cosine": offset,
    "item_effective_rank": line,
    "item_dead_dimensions": dead,
    "item_duplicates": repeated,
}


def test_faulty_item_vectors_fail_their_gate(connection: Connection) -> None:
    for name, spoil in VECTOR_FAULTS.items():
        with connection.transaction(force_rollback=True):
            generation = write_generation(connection, synthetic(spoil(vectors())))
            assert not gates(connection, generation)[name].passed, name


def run(statement: str) -> Fault:
    return lambda connection, generation: connection.execute(statement, {"g": generation})  # type: ignore[arg-type]


ROW_FAULTS: dict[str, Fault] = {
    "item_norm_error": run("update item_embeddings set embedding = embedding + embedding where item_id = 'i5'"),
    "interest_norm_error": run("update user_interests set embedding = embedding + embedding where user_id = 'u5'"),
    "interest_collapse": run(
        """update user_interests set embedding = first.embedding from user_interests as first
           where first.user_id = user_interests.user_id and first.interest = 0"""
    ),
    "coverage_head": run("delete from item_embeddings where item_id = 'i0'"),
    "coverage_tail": run("delete from item_embeddings where item_id in ('i96', 'i97', 'i98', 'i99')"),
    "coverage_cold": run("delete from item_embeddings where item_id in ('i230', 'i231', 'i232')"),
    "coverage_users": run("delete from user_interests where user_id = 'u7'"),
    "stale_users": run(
        """insert into interactions (user_id, item_id, occurred_at)
           select user_id, 'i3', timestamptz '2026-02-01' from users limit 2"""
    ),
    "indexes": run("drop index item_embeddings_g1_id_embedding_idx"),
}


def test_a_fault_fails_its_gate_alone(connection: Connection) -> None:
    generation = sound(connection, synthetic(vectors()))
    for table in ("item_embeddings", "user_interests"):
        connection.execute(f"alter table {table} drop constraint {table}_unit_check")  # what older code left
    connection.execute("select ensure_interactions_year(2026)")
    failed = {}
    for name, spoil in ROW_FAULTS.items():
        with connection.transaction(force_rollback=True):
            spoil(connection, generation)
            failed[name] = [gate.name for gate in gates(connection, generation).values() if not gate.passed]
    assert failed == {name: [name] for name in ROW_FAULTS}


def test_every_gate_has_a_test_that_fails_it() -> None:
    elsewhere = {"item_finite", "neighbour_churn", "ann_recall", "ndcg_over_popularity"}
    elsewhere |= {*INTEGRITY_GATES, *REPLAY_GATES, *HELD_OUT_GATES}  # test_broken_generations.py
    assert {*VECTOR_FAULTS, *ROW_FAULTS, *elsewhere} == set(quality.GENERATION_GATES)


def test_churn_compares_with_the_live_generation(connection: Connection) -> None:
    write_generation(connection, synthetic(vectors()))
    same = write_generation(connection, synthetic(vectors()), live=False)
    assert gates(connection, same)["neighbour_churn"].value == 0
    other = write_generation(connection, synthetic(vectors(seed=9)), live=False)
    churn = gates(connection, other)["neighbour_churn"]
    assert churn.value is not None
    assert churn.value > 0.9


def test_recall_is_measured_with_users_and_finds_a_poor_index(connection: Connection) -> None:
    generation = write_generation(connection, synthetic(vectors(items=3000)))
    assert gates(connection, generation)["ann_recall"].value == pytest.approx(1, abs=0.03)
    connection.execute("drop index item_embeddings_g1_embedding_idx")
    connection.execute(
        """create index item_embeddings_g1_embedding_idx on item_embeddings_g1
           using hnsw ((embedding::halfvec(16)) halfvec_ip_ops) with (m = 2, ef_construction = 4)"""
    )
    found = gates(connection, generation)
    assert not found["ann_recall"].passed, found["ann_recall"]
    assert found["indexes"].passed
    # Measuring leaves no setting behind.
    assert connection.execute("show enable_seqscan").fetchone() == ("on",)
    assert connection.execute("show hnsw.ef_search").fetchone() == ("40",)


def test_the_gates_of_one_item_and_one_user_pass(connection: Connection) -> None:
    one = Synthetic(["i0"], vectors(items=1), interests={"u0": vectors(items=1)}, seen={"u0": ["i0"]})
    found = gates(connection, sound(connection, one))
    assert [str(gate) for gate in found.values() if not gate.passed] == []


def write_content(connection: Connection, rows: Floats, *, items: int | None = None) -> None:
    """Items with titles, and text embeddings for the first len(rows) of them."""
    connection.cursor().executemany(
        "insert into items (item_id, title) values (%s, %s)", [(f"i{n}", f"t{n}") for n in range(items or len(rows))]
    )
    connection.execute("insert into content_encoders values ('text', 'r', 'model', %s, '{}', true)", [rows.shape[1]])
    connection.cursor().executemany(
        "insert into content_embeddings (item_id, modality, revision, content_hash, embedding)"
        " values (%s, 'text', 'r', '', %s)",
        [(f"i{n}", HalfVector(row)) for n, row in enumerate(rows)],
    )


def content_gates(connection: Connection) -> dict[str, Gate]:
    return {gate.name: gate for gate in quality.content_gates(connection, "text", "r")}


def test_every_gate_says_what_it_means() -> None:
    gates = {*quality.CONTENT_GATES, *quality.CODE_GATES, *quality.GENERATION_GATES, *TITLE_GATES}
    assert gates == set(MEANINGS)


def test_sound_content_passes(connection: Connection) -> None:
    write_content(connection, vectors())
    found = content_gates(connection)
    assert tuple(found) == quality.CONTENT_GATES
    unmeasured = [name for name, gate in found.items() if gate.value is None]
    assert unmeasured == ["content_replay"]  # no encoder is asked here
    assert all(gate.passed for gate in found.values()), found


def test_collapsed_content_fails(connection: Connection) -> None:
    write_content(connection, np.repeat(vectors()[:1], ITEMS, axis=0))
    failed = {name for name, gate in content_gates(connection).items() if not gate.passed}
    assert failed == {
        "content_mean_cosine", "content_effective_rank", "content_dead_dimensions", "content_duplicates"
    }  # fmt: skip


def test_content_coverage_counts_the_items_that_have_the_modality(connection: Connection) -> None:
    write_content(connection, vectors(), items=ITEMS * 2)
    assert content_gates(connection)["content_coverage"] == Gate("content_coverage", 0.5, 0.8, "at least")
    connection.execute("update items set title = ' ' where item_id not in (select item_id from content_embeddings)")
    assert content_gates(connection)["content_coverage"].value == 1


def test_a_modality_that_nothing_has_is_not_encodable(connection: Connection) -> None:
    connection.execute("insert into items (item_id, attributes) values ('i0', '{\"a\": null}')")
    assert [modality for modality in MODALITIES if quality.encodable(connection, modality)] == []
    connection.execute(
        """update items set title = 't', image_path = 'p', image_sha256 = 's', attributes = '{"a": 1}',
           vector = '{1}', vector_model = 'own/1'"""
    )
    assert [modality for modality in MODALITIES if quality.encodable(connection, modality)] == list(MODALITIES)


def test_a_title_that_prints_nothing_is_nothing_to_encode(connection: Connection) -> None:
    connection.execute("insert into items (item_id, title) values ('a', %s)", ["\u200b \ufeff"])
    assert not quality.encodable(connection, "text")


def test_an_unknown_modality_is_refused_by_name(connection: Connection) -> None:
    with pytest.raises(UserError, match="unknown modality 'audio'"):
        quality.encodable(connection, "audio")


def test_limits_are_looser_for_hashed_attributes(connection: Connection) -> None:
    rows = unit(vectors() * (np.arange(D) > D // 2))
    write_content(connection, rows)
    assert not content_gates(connection)["content_dead_dimensions"].passed
    connection.execute("insert into content_encoders values ('attributes', 'r', 'model', %s, '{}', true)", [D])
    connection.execute("update content_embeddings set modality = 'attributes'")
    attributes = {gate.name: gate for gate in quality.content_gates(connection, "attributes", "r")}
    assert attributes["content_dead_dimensions"].passed
    assert attributes["content_dead_dimensions"].value == pytest.approx(9 / 16)
