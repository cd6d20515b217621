"""Embeddings of what users searched for: each distinct text once, by the text encoder, kept in Postgres.

What is missing is a question to Postgres, and each chunk is committed as it is written: an interrupted run goes on
where it stopped. The key of a query is made by the SQL function query_key.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector
from psycopg.types.json import Jsonb
from tqdm import tqdm

from encoders.content.encoder import ContentEncoder
from feature_repo.modalities import item_text
from pipelines.content_embeddings import gpu_lock
from polytower import locks

MODALITY = "text"
# Queries between two commits.
QUERY_CHUNK = 2048

_REGISTER = """
    insert into content_encoders (modality, revision, model, dim, config)
    values (%(modality)s, %(revision)s, %(model)s, %(dim)s, %(config)s)
    on conflict (modality, revision) do nothing
"""
# One that encoded no item serves queries alone.
_ACTIVATE = """
    update content_encoders set active = true
    where modality = %(modality)s and revision = %(revision)s
      and not exists (select from content_encoders where modality = %(modality)s and active)
"""
_COUNT = """
    select count(distinct query_key(query)),
           count(distinct query_key(query)) filter (where not exists (
               select from query_embeddings e where e.revision = %(revision)s and e.query_key = query_key(i.query)))
    from interactions i
"""
_MISSING = """
    select query_key, min(query) from (select query_key(query) as query_key, query from interactions) i
    where query_key is not null and not exists (
        select from query_embeddings e where e.revision = %(revision)s and e.query_key = i.query_key)
    group by query_key
"""
_COPY = "copy query_embeddings (modality, revision, query_key, embedding) from stdin (format binary)"


@dataclass(frozen=True)
class QueryReport:
    """queries: distinct texts of the interactions. encoded: of these, the new ones. skipped: those that gave no usable
    vector, and count as no query.
    """

    revision: str
    model: str
    queries: int
    encoded: int
    skipped: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def encode_queries(
    connection: psycopg.Connection[Any],
    encoder: ContentEncoder[Any],
    *,
    progress: bool = False,
    take_over: bool = False,
) -> QueryReport:
    """Encodes the queries of interactions that are new to the encoder. Commits what the caller left open, and chunks.

    take_over: from another run that encodes.
    """
    started, encoded, skipped = perf_counter(), 0, 0
    values = {
        "modality": MODALITY, "revision": encoder.revision, "model": encoder.model, "dim": encoder.dim,
        "config": Jsonb(dict(encoder.config)),
    }  # fmt: skip
    with locks.held(connection, "polytower.encode.queries", take_over=take_over):
        connection.execute(_REGISTER, values)
        connection.execute(_ACTIVATE, values)
        counts = connection.execute(_COUNT, values).fetchone()
        assert counts is not None
        queries, missing = counts
        connection.commit()
        bar = tqdm(total=missing, desc="encode queries", unit="query", disable=None if progress and missing else True)
        with bar, gpu_lock(connection, encoder.device, take_over=take_over):
            for rows in _chunks(connection, values) if missing else ():
                kept = _encode(connection, encoder, rows)
                encoded, skipped = encoded + kept, skipped + len(rows) - kept
                bar.update(len(rows))
    return QueryReport(encoder.revision, encoder.model, queries, encoded, skipped, perf_counter() - started)


def _chunks(connection: psycopg.Connection[Any], values: dict[str, Any]) -> Iterator[list[tuple[str, str]]]:
    """(key, a text with that key), as they were missing when this began."""
    with connection.cursor("missing_queries", withhold=True) as cursor:
        cursor.execute(_MISSING, values)
        connection.commit()
        while rows := cursor.fetchmany(QUERY_CHUNK):
            yield rows


def _encode(connection: psycopg.Connection[Any], encoder: ContentEncoder[Any], rows: list[tuple[str, str]]) -> int:
    """One transaction; answers how many embeddings were written."""
    vectors = np.concatenate(list(encoder.encode([item_text(text, None) for _, text in rows])))
    usable = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    with connection.cursor() as cursor, cursor.copy(_COPY) as copy:
        copy.set_types(["text", "text", "text", "halfvec"])
        for (key, _), vector, kept in zip(rows, vectors, usable, strict=True):
            if kept:
                copy.write_row((MODALITY, encoder.revision, key, HalfVector(vector)))
    connection.commit()
    return int(usable.sum())
