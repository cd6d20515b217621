"""Content codes on real Postgres: made once, kept while they fit, renewed when they do not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import psycopg
import pytest
from pgvector import HalfVector

from pipelines import content_codes
from pipelines.content_codes import CodesReport, code_content, read_codec
from pipelines.generation.quality import code_gates
from tests.generation_factory import unit

Connection = psycopg.Connection[Any]
WIDTHS = {"text": 12, "image": 20}
ITEMS = 400


def encoder(connection: Connection, modality: str, revision: str = "r") -> None:
    connection.execute("update content_encoders set active = false where modality = %s", [modality])
    connection.execute(
        "insert into content_encoders (modality, revision, model, dim, active) values (%s, %s, 'm', %s, true)",
        [modality, revision, WIDTHS[modality]],
    )


def embed(
    connection: Connection, modality: str, items: range, *, revision: str = "r", seed: int = 0, when: str = "1 day"
) -> None:
    """Content embeddings of these items: two views of the same few numbers, and some noise."""
    latent = np.random.default_rng(7).standard_normal((1_000, 6))[items.start : items.stop]
    random = np.random.default_rng([seed, WIDTHS[modality]])
    rows = latent @ random.standard_normal((6, WIDTHS[modality]))
    rows = unit(rows + 0.3 * random.standard_normal(rows.shape))
    connection.cursor().executemany(
        """insert into content_embeddings (item_id, modality, revision, content_hash, embedding, encoded_at)
           values (%s, %s, %s, 'h', %s, now() - %s::interval)
           on conflict (item_id, modality, revision)
           do update set embedding = excluded.embedding, encoded_at = excluded.encoded_at""",
        [(f"i{n:03d}", modality, revision, HalfVector(row), when) for n, row in zip(items, rows, strict=True)],
    )


@pytest.fixture
def embedded(connection: Connection) -> Connection:
    """400 items with text, every one but the last hundred with a picture."""
    for modality, items in (("text", range(ITEMS)), ("image", range(ITEMS - 100))):
        encoder(connection, modality)
        embed(connection, modality, items)
    connection.commit()
    return connection


def codes(connection: Connection) -> dict[tuple[str, str], bytes]:
    rows = connection.execute("select modality, item_id, codes from content_codes join codebooks using (codebook_id)")
    return {(modality, item_id): code for modality, item_id, code in rows}


def names(connection: Connection) -> Mapping[str, list[int]]:
    return dict(connection.execute("select item_id, semantic_id from item_semantic_ids").fetchall())


def test_every_item_has_sixteen_bytes_a_modality_and_a_name(embedded: Connection) -> None:
    report = code_content(embedded)
    assert report.run.trained
    assert (report.run.coded, report.items, report.run.why) == (ITEMS, ITEMS, "there were no codes")
    assert report.bytes == 16 * (2 * ITEMS - 100) + 4 * ITEMS
    assert report.centroids == {"image": 256, "text": 256}
    assert min(report.cosine.values()) > 0.95
    assert report.distinct > 0.95
    stored = codes(embedded)
    assert {len(code) for code in stored.values()} == {16}
    assert len(stored) == 2 * ITEMS - 100
    assert {len(name) for name in names(embedded).values()} == {4}
    assert [gate for gate in code_gates(embedded) if not gate.passed or gate.value is None] == []


def test_what_is_stored_decodes_to_the_embedding(embedded: Connection) -> None:
    report = code_content(embedded)
    assert report.code_set is not None
    codec = read_codec(embedded, report.code_set)
    (code,), (vector,) = (
        embedded.execute(query, {"item": "i123"}).fetchone() or ()
        for query in (
            "select codes from content_codes join codebooks using (codebook_id)"
            " where item_id = %(item)s and modality = 'image'",
            "select embedding from content_embeddings where item_id = %(item)s and modality = 'image'",
        )
    )
    placed = codec.placings["image"](vector.to_numpy()[None].astype(np.float32))[0]
    decoded = codec.quantisers["image"].decode(np.frombuffer(code, np.uint8)[None])[0]
    assert placed @ decoded / np.linalg.norm(decoded) > 0.9


def test_a_second_run_does_nothing(embedded: Connection) -> None:
    first, before = code_content(embedded), codes(embedded)
    second = code_content(embedded)
    assert (second.code_set, second.run.trained, second.run.coded) == (first.code_set, False, 0)
    assert second.cosine == first.cosine
    assert codes(embedded) == before


def test_what_is_new_or_changed_or_gone_is_coded_by_the_same_set(
    embedded: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before, named = code_content(embedded), codes(embedded), names(embedded)
    embed(embedded, "text", range(ITEMS, ITEMS + 20))
    embed(embedded, "text", range(5), seed=3, when="1 hour")
    embedded.execute("delete from content_embeddings where item_id = 'i010'")
    embedded.execute("delete from content_embeddings where item_id = 'i011' and modality = 'image'")
    monkeypatch.setattr(content_codes, "ITEMS_BATCH", 7)
    second = code_content(embedded)
    assert (second.code_set, second.run.trained) == (first.code_set, False)
    assert (second.run.coded, second.run.removed, second.items) == (20 + 5 + 1, 1, ITEMS + 19)
    after = codes(embedded)
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed <= {("text", f"i00{n}") for n in range(5)}
    assert len(changed) >= 4
    assert before.keys() - after.keys() == {("text", "i010"), ("image", "i010"), ("image", "i011")}
    assert {item for item, name in names(embedded).items() if named.get(item, name) != name} <= {
        *(f"i00{n}" for n in range(5)), "i011"
    }  # fmt: skip
    assert all(gate.passed for gate in code_gates(embedded))


def another_encoder(connection: Connection) -> str:
    encoder(connection, "text", "s")
    embed(connection, "text", range(ITEMS), revision="s")
    return "another encoder is in force for text"


def growth(connection: Connection) -> str:
    embed(connection, "text", range(ITEMS, 2 * ITEMS + 1))
    return "the catalogue grew from 400 to 801 items"


def no_more_pictures(connection: Connection) -> str:
    connection.execute("delete from content_embeddings where modality = 'image'")
    return "items have text now, and had image, text"


@pytest.mark.parametrize("change", [another_encoder, growth, no_more_pictures])
def test_a_set_that_does_not_fit_any_more_is_replaced(embedded: Connection, change: Any) -> None:
    first = code_content(embedded)
    why = change(embedded)
    assert not all(gate.passed for gate in code_gates(embedded)) or change is no_more_pictures
    second = code_content(embedded)
    assert (second.run.trained, second.run.why) == (True, why)
    assert second.code_set != first.code_set
    assert embedded.execute("select count(*) from code_sets").fetchone() == (1,)
    assert second.items == second.run.coded
    assert all(gate.passed for gate in code_gates(embedded))


def test_a_rare_modality_has_codes_too(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 items one has a picture, and a set is trained on fifty."""
    monkeypatch.setattr(content_codes, "TRAINED_ON", 50)
    for modality, items in (("text", range(ITEMS)), ("image", range(333, 334))):
        encoder(connection, modality)
        embed(connection, modality, items)
    found = code_content(connection).centroids
    assert (found["image"], found["text"] in (50, 51)) == (1, True)
    assert not code_content(connection).run.trained


def test_a_catalogue_without_content_has_no_codes(embedded: Connection) -> None:
    code_content(embedded)
    embedded.execute("delete from content_embeddings")
    report = code_content(embedded)
    assert report == CodesReport(None, report.run, seconds=report.seconds)
    assert report.run.why == "no item has content"
    assert codes(embedded) == {}
    assert [(gate.value, gate.passed) for gate in code_gates(embedded)] == [(None, True), (None, True)]


@pytest.mark.parametrize("items", [1, 2, 50])
def test_of_fewer_items_than_centroids_each_is_its_own(connection: Connection, items: int) -> None:
    encoder(connection, "text")
    embed(connection, "text", range(items))
    report = code_content(connection)
    assert report.centroids == {"text": items}
    assert report.cosine["text"] == pytest.approx(1, abs=1e-5)


def test_codes_that_lost_much_warn(embedded: Connection) -> None:
    code_content(embedded)
    embedded.execute("""update code_sets set metrics = '{"cosine": {"text": 0.5, "image": 0.9}}'""")
    found = {gate.name: gate for gate in code_gates(embedded)}
    assert (found["code_cosine"].passed, found["code_cosine"].severity) == (False, "warn")
    assert found["code_coverage"].passed
