"""The HNSW index of a content encoder's own space: one per modality and revision, over content_embeddings.

It is built after the embeddings are written. A few new items are inserted into it; a large part of the catalogue is
written without it, and it is built again: inserting into a live HNSW index was measured six times slower.
"""

from time import perf_counter
from typing import Any

import psycopg
from psycopg import sql

from feature_repo.modalities import modality

# Fewer items than this are scanned by retrieval (migrations/sql/retrieve_vectors): no index would be read.
SCANNED = 2000
# What pgvector indexes of a halfvec.
MAX_DIM = 4000
# Above this share of new rows, building costs less than inserting.
REBUILT = 0.1

_VALID = """
select coalesce((select indisvalid from pg_index where indexrelid = to_regclass(%(name)s)), false)
"""
_CREATE = sql.SQL("""
    create index {name} on content_embeddings using hnsw ((embedding::halfvec({dim})) halfvec_ip_ops)
    where modality = {modality} and revision = {revision}
""")


def index_name(name: str, revision: str) -> str:
    """As migrations/sql/searched_space looks for it."""
    return f"content_embeddings_{name}_{revision}_hnsw"


def drop_before(connection: psycopg.Connection[Any], name: str, revision: str, *, items: int, missing: int) -> None:
    """Drops the index if so many of the items are about to be written that building it again is cheaper. Commits."""
    if missing > REBUILT * items:
        connection.execute(sql.SQL("drop index if exists {}").format(sql.Identifier(index_name(name, revision))))
    connection.commit()


def ensure(connection: psycopg.Connection[Any], name: str, revision: str, *, dim: int, items: int) -> float:
    """Builds the index where it is wanted and missing, and answers the seconds that it took. Commits.

    items: that have the modality. Questions meanwhile are answered by scans; writers of other modalities wait.
    """
    wanted = modality(name).indexed and items > SCANNED and dim <= MAX_DIM
    row = connection.execute(_VALID, {"name": index_name(name, revision)}).fetchone()
    assert row is not None
    if not wanted or row[0]:
        connection.commit()
        return 0.0
    started = perf_counter()
    connection.execute("set local max_parallel_maintenance_workers = 2")
    values = {"modality": sql.Literal(name), "revision": sql.Literal(revision), "dim": sql.Literal(dim)}
    connection.execute(_CREATE.format(name=sql.Identifier(index_name(name, revision)), **values))
    connection.execute("analyze content_embeddings")
    connection.commit()
    return perf_counter() - started
