"""Encoding into Postgres: only what is new, resumed, cleaned up, and the hash in SQL equal to the one in Python."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from encoders.content.attributes import AttributesEncoder
from encoders.content.encoder import Encoded, Rows
from encoders.content.registry import CONTENT_ENCODERS, encoder_of
from feature_repo.modalities import BLANK, MODALITIES, TEXT_SEPARATOR, content_hash
from pipelines.content_embeddings import encode_modality, gpu_lock
from pipelines.item_content import content_of, model_of
from polytower.locks import holder
from polytower.postgres import connect
from polytower.settings import settings as read_settings

ROOT = Path(__file__).parents[2]
Connection = psycopg.Connection[Any]


class Letters:
    """A text encoder that counts letters: exact, instant, and it remembers what it was asked."""

    modality = "text"
    model = "letters"
    device = "cpu"

    def __init__(self, dim: int = 8, fail_after: int | None = None) -> None:
        self.dim = dim
        self.revision = f"letters{dim}"
        self.config: Mapping[str, Any] = {"dim": dim}
        self.seen: list[str] = []
        self._fail_after = fail_after

    def encode(self, contents: Sequence[str], batch_size: int | None = None) -> Iterator[Rows]:
        yield np.stack([self._row(text) for text in contents])

    def encode_chunks(self, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        for chunk in chunks:
            if self._fail_after is not None and len(self.seen) >= self._fail_after:
                raise KeyboardInterrupt
            self.seen += chunk
            rows = next(self.encode(chunk))
            failures = {place: "unreadable" for place, text in enumerate(chunk) if "BAD" in text}
            rows[[place for place, text in enumerate(chunk) if "NAN" in text]] = np.nan
            yield Encoded(rows, failures)

    def _row(self, text: str) -> Rows:
        counts = np.bincount([ord(letter) % self.dim for letter in text], minlength=self.dim)
        return (counts / np.linalg.norm(counts)).astype(np.float32)


def _add(connection: Connection, items: Iterable[tuple[str, str | None, str | None]]) -> None:
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into items (item_id, title, description) values (%s, %s, %s)"
            " on conflict (item_id) do update set title = excluded.title, description = excluded.description",
            list(items),
        )
    connection.commit()


def _rows(connection: Connection, modality: str = "text") -> dict[str, tuple[str, str]]:
    return {
        item_id: (revision, str(embedding))
        for item_id, revision, embedding in connection.execute(
            "select item_id, revision, embedding from content_embeddings where modality = %s", [modality]
        )
    }


def _active(connection: Connection) -> list[tuple[str, str]]:
    query = "select modality, revision from content_encoders where active order by modality"
    return connection.execute(query).fetchall()


def test_a_second_run_encodes_nothing(connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(10)])
    encoder = Letters()
    first = encode_modality(connection, "text", encoder, chunk=4)
    assert (first.items, first.encoded, first.skipped, first.failed) == (10, 10, 0, 0)
    assert sorted(encoder.seen) == sorted(f"title {n}" for n in range(10))
    before = connection.execute("select item_id, encoded_at, xmin::text from content_embeddings").fetchall()
    again = Letters()
    second = encode_modality(connection, "text", again)
    assert (second.items, second.encoded, second.skipped) == (10, 0, 10)
    assert again.seen == []
    assert connection.execute("select item_id, encoded_at, xmin::text from content_embeddings").fetchall() == before
    assert _active(connection) == [("text", "letters8")]


def test_embeddings_are_those_of_the_encoder(connection: Connection) -> None:
    _add(connection, [("a", "Heat", "A heist."), ("b", None, "鞋 \U0001f45f"), ("c", "x" * 10_000, None)])
    encode_modality(connection, "text", Letters(), chunk=2)
    texts = {"a": f"Heat{TEXT_SEPARATOR}A heist.", "b": "鞋 \U0001f45f", "c": "x" * 10_000}
    for item_id, embedding in connection.execute("select item_id, embedding from content_embeddings"):
        expected = next(Letters().encode([texts[item_id]]))[0]
        np.testing.assert_allclose(embedding.to_numpy().astype(np.float32), expected, atol=1e-3)


def test_a_changed_item_is_encoded_alone(connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(10)])
    encode_modality(connection, "text", Letters())
    before = _rows(connection)
    _add(connection, [("i3", "another", "story"), ("new", "arrived", None)])
    encoder = Letters()
    report = encode_modality(connection, "text", encoder)
    assert sorted(encoder.seen) == ["another. story", "arrived"]
    assert (report.encoded, report.skipped, report.items) == (2, 9, 11)
    after = _rows(connection)
    assert {item_id for item_id in before if before[item_id] != after[item_id]} == {"i3"}


def test_items_that_lost_the_modality_lose_their_row(connection: Connection) -> None:
    _add(connection, [("a", "one", None), ("b", "two", None), ("c", "three", None)])
    encode_modality(connection, "text", Letters())
    _add(connection, [("a", " \u00a0\n", "")])
    connection.execute("delete from items where item_id = 'b'")
    report = encode_modality(connection, "text", Letters())
    assert (report.removed, report.items, report.encoded) == (2, 1, 0)
    assert set(_rows(connection)) == {"c"}


def test_an_interrupted_run_resumes(database: str, connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(20)])
    encode_modality(connection, "text", Letters(4))
    broken = Letters(fail_after=12)
    with pytest.raises(KeyboardInterrupt), connect(database) as other:
        encode_modality(other, "text", broken, chunk=4)
    assert len(broken.seen) == 12
    kept = connection.execute("select count(*) from content_embeddings where revision = 'letters8'").fetchone()
    assert kept == (12,)
    assert _active(connection) == [("text", "letters4")], "a half-encoded revision is not in force"
    encoder = Letters()
    report = encode_modality(connection, "text", encoder, chunk=4)
    assert report.encoded == len(encoder.seen) == 8
    assert not set(encoder.seen) & set(broken.seen)
    assert _active(connection) == [("text", "letters8")]


class Hanging(Letters):
    """Says on stdout that it has given three chunks, and waits for its end."""

    def encode_chunks(self, chunks: Iterable[Sequence[str]]) -> Iterator[Encoded]:
        yield from islice(super().encode_chunks(chunks), 3)
        print("hanging", flush=True)
        threading.Event().wait()


def test_a_killed_process_leaves_its_chunks_and_no_lock(database: str, connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(20)])
    code = (
        "import sys; from polytower.postgres import connect; from pipelines.content_embeddings import encode_modality\n"
        "from tests.pipelines.test_content import Hanging\n"
        "with connect(sys.argv[1]) as connection: encode_modality(connection, 'text', Hanging(), chunk=4)"
    )
    with subprocess.Popen([sys.executable, "-c", code, database], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"hanging\n"
        process.kill()
    kept = len(_rows(connection))
    assert kept in (8, 12), "all but the chunk that may be on its way"
    connection.execute("set lock_timeout = '20s'")
    report = encode_modality(connection, "text", Letters(), chunk=4)
    assert (report.skipped, report.encoded) == (kept, 20 - kept)


def test_an_error_leaves_the_connection_of_use_and_the_lock_free(database: str, connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(8)])
    with pytest.raises(KeyboardInterrupt):
        encode_modality(connection, "text", Letters(fail_after=4), chunk=4)
    with connect(database) as other:
        other.execute("set lock_timeout = '2s'")
        assert encode_modality(other, "text", Letters(), chunk=4).encoded == 4
    assert encode_modality(connection, "text", Letters()).skipped == 8


def test_an_embedding_that_postgres_refuses_stops_the_run(connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(8)])
    encode_modality(connection, "text", Letters())
    with pytest.raises(psycopg.errors.DatabaseError, match="16000"):
        encode_modality(connection, "text", Letters(16_001), chunk=2)
    assert _active(connection) == [("text", "letters8")]
    assert encode_modality(connection, "text", Letters()).skipped == 8


def test_a_failed_item_is_reported_and_keeps_no_stale_embedding(connection: Connection) -> None:
    _add(connection, [(f"i{n}", f"title {n}", None) for n in range(5)])
    encode_modality(connection, "text", Letters())
    _add(connection, [("i1", "BAD", None), ("i2", "NAN", None), ("i3", "good", None)])
    report = encode_modality(connection, "text", Letters())
    assert (report.encoded, report.failed) == (1, 2)
    assert {failure.item_id: failure.reason for failure in report.failures} == {
        "i1": "unreadable",
        "i2": "letters gave no usable vector (zero, or not finite)",
    }
    assert set(_rows(connection)) == {"i0", "i3", "i4"}
    assert encode_modality(connection, "text", Letters()).failed == 2, "the next run tries again"


def test_a_new_revision_encodes_all_and_takes_over(connection: Connection) -> None:
    _add(connection, [("a", "one", None), ("b", "two", None)])
    encode_modality(connection, "text", Letters(4))
    report = encode_modality(connection, "text", Letters(16))
    assert (report.encoded, report.revision) == (2, "letters16")
    assert _active(connection) == [("text", "letters16")]
    back = encode_modality(connection, "text", Letters(4))
    assert (back.encoded, _active(connection)) == (0, [("text", "letters4")])


@pytest.mark.parametrize("modality", MODALITIES)
def test_no_items_at_all(connection: Connection, modality: str) -> None:
    encoder = AttributesEncoder() if modality == "attributes" else Letters()
    report = encode_modality(connection, modality, encoder)
    assert (report.items, report.encoded, report.items_per_second) == (0, 0, 0.0)


def _named(connection: Connection, modality: str) -> Any:
    return encoder_of(modality, read_settings(), model_of(connection, modality))


def test_every_registered_encoder_end_to_end(platform: str, tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    Image.linear_gradient("L").convert("RGB").save(picture)
    broken = tmp_path / "b.jpg"
    broken.write_bytes(picture.read_bytes()[:100])
    rows = [
        ("full", "Heat", str(picture), "aa", {"year": 1995, "genres": ["Crime"]}),
        ("broken", "Heat 2", str(broken), "bb", {}),
        ("bare", None, None, None, {"year": None}),
    ]
    with connect(platform) as connection:
        for row in rows:
            connection.execute(
                "insert into items (item_id, title, image_path, image_sha256, attributes) values (%s, %s, %s, %s, %s)",
                [*row[:4], Jsonb(row[4])],
            )
        connection.execute("update items set vector = '{3, 4}', vector_model = 'own/2' where item_id = 'full'")
        reports = {
            modality: encode_modality(connection, modality, _named(connection, modality))
            for modality in CONTENT_ENCODERS
        }
        assert {modality: (r.items, r.encoded, r.failed) for modality, r in reports.items()} == {
            "text": (2, 2, 0),
            "image": (2, 1, 1),
            "attributes": (1, 1, 0),
            "vector": (1, 1, 0),
        }
        (failure,) = reports["image"].failures
        assert (failure.item_id, failure.source) == ("broken", str(broken))
        wide = connection.execute(
            "select item_id, vector_dims(text_embedding), vector_dims(image_embedding),"
            " vector_dims(attributes_embedding) from item_content order by item_id"
        ).fetchall()
        assert wide == [("broken", 384, None, None), ("full", 384, 1280, 256)]
        again = [
            encode_modality(connection, modality, _named(connection, modality)).encoded for modality in CONTENT_ENCODERS
        ]
        assert again == [0, 0, 0, 0]


def test_the_settings_choose_the_encoder(platform: str, tmp_path: Path) -> None:
    from tests.encoders import checkpoints

    config = replace(
        read_settings(),
        text_encoder=str(checkpoints.bert(tmp_path / "bert")),
        image_encoder=str(checkpoints.vit(tmp_path / "vit")),
    )
    assert [encoder_of(modality, config).dim for modality in ("text", "image", "attributes")] == [16, 16, 256]


def test_ten_thousand_unchanged_items_are_passed_over_in_less_than_a_second(connection: Connection) -> None:
    connection.execute(
        "insert into items (item_id, title, description)"
        " select n::text, 'title ' || n, repeat('a description of some length ', 10)"
        " from generate_series(1, 10000) as n"
    )
    report = encode_modality(connection, "text", Letters())
    assert report.encoded == 10_000
    started = perf_counter()
    assert encode_modality(connection, "text", Letters()).skipped == 10_000
    assert perf_counter() - started < 5, "unchanged content is told apart in SQL, without encoding"


def test_the_gpu_is_held_alone(database: str, connection: Connection) -> None:
    with connect(database) as other:
        with gpu_lock(connection, "cuda"):
            assert holder(other, f"cuda:0 of {socket.gethostname()}") is not None
            with gpu_lock(other, "cuda:1"), gpu_lock(other, "cpu"):
                pass
        with gpu_lock(other, "cuda:0"):
            pass


_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6) | st.text(
    st.sampled_from(BLANK), max_size=3
)
_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=8,
)


@given(
    title=st.none() | _text,
    description=st.none() | _text,
    attributes=st.dictionaries(_text, _value, max_size=4),
    vector=st.none() | st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=4),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sql_and_python_say_the_same_of_any_content(
    connection: Connection,
    title: str | None,
    description: str | None,
    attributes: dict[str, Any],
    vector: list[float] | None,
) -> None:
    connection.execute("delete from items")
    connection.execute(
        "insert into items (item_id, title, description, attributes, vector, vector_model)"
        " values ('i', %s, %s, %s, %s, %s)",
        [title, description, Jsonb(attributes), vector, vector and "own"],
    )
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            "select title, description, image_path, image_sha256, attributes, vector from items"
        ).fetchone()
    assert row is not None
    for modality in MODALITIES:
        found = connection.execute(content_of(modality)).fetchone()
        assert (found and found[2]) == content_hash(modality, row)
