"""Gates on what lies in Postgres: content embeddings of a modality, and a whole generation before its promotion.

Vectors are sampled (by the hash of their key, so that two runs measure the same rows) and summed up in numpy; counts,
coverage and recall are SQL. Nothing here is larger than a few thousand vectors, whatever the size of the tables.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from encoders.content.encoder import ContentEncoder
from feature_repo.modalities import modality
from feature_repo.schema import SCHEMA, SPACES
from pipelines.generation.embedding_gates import (
    VECTOR_GATES,
    Floats,
    Gate,
    Limits,
    interest_collapse,
    norm_error,
    vector_gates,
)
from pipelines.generation.held_out import HELD_OUT_GATES, held_out_gates
from pipelines.generation.integrity import INTEGRITY_GATES, integrity_gates
from pipelines.generation.replay import REPLAY_GATES, replay_gates, smallest_cosine
from pipelines.item_content import content_of

SAMPLE = 5_000
RECALL_QUERIES = 100
RECALL_K = 50
# What serving asks for at least (docs/dagster.md): recall below the gate is a broken or starved index.
EF_SEARCH = 100
# The most popular items that together make the head: the usual fifth of the catalogue.
HEAD_SHARE = 0.2

CONTENT_GATES = (*(f"content_{name}" for name in VECTOR_GATES), "content_coverage", "content_replay")
CODE_GATES = ("code_coverage", "code_cosine")
# Items that an encoder is asked again of: half of them wrong escapes once in four thousand million times.
ENCODED_AGAIN = 32


def content_gates(
    connection: psycopg.Connection[Any], name: str, revision: str, encoder: ContentEncoder[Any] | None = None
) -> list[Gate]:
    """Gates on one modality's content embeddings by one encoder revision, in the order of CONTENT_GATES.

    encoder: of that revision, to be asked again. A modality that no item has passes without values.
    """
    record = modality(name)
    limits = Limits(dead_dimensions=record.dead_dimensions, duplicates=record.duplicates)
    gates = vector_gates("content", content_sample(connection, name, revision), limits)
    found = _row(
        connection,
        sql.SQL(
            """select count(*) filter (where exists (
                   select from content_embeddings e where e.item_id = c.item_id
                   and modality = %(modality)s and revision = %(revision)s)), count(*)
               from ({}) as c"""
        ).format(content_of(name)),
        {"modality": name, "revision": revision},
    )
    again = None if encoder is None else _encoded_again(connection, name, encoder)
    return [
        *gates,
        Gate("content_coverage", _ratio(*found), 0.8, "at least"),
        Gate("content_replay", again, 0.99, "at least"),
    ]


def _encoded_again(connection: psycopg.Connection[Any], name: str, encoder: ContentEncoder[Any]) -> float | None:
    """Smallest cosine between what the encoder says now of sampled items and what is stored; None without items."""
    rows = connection.execute(
        sql.SQL(
            """select c.content, e.embedding from ({}) as c join content_embeddings e using (item_id, content_hash)
               where modality = %(modality)s and revision = %(revision)s order by md5(item_id) limit %(sample)s"""
        ).format(content_of(name)),
        {"modality": name, "revision": encoder.revision, "sample": ENCODED_AGAIN},
    ).fetchall()
    if not rows:
        return None
    (encoded,) = encoder.encode_chunks([[content for content, _ in rows]])
    # A picture's file may be gone since.
    told = np.array([row not in encoded.failures for row in range(len(rows))])
    stored = np.stack([embedding.to_numpy() for _, embedding in rows]).astype(np.float32)
    return smallest_cosine(encoded.embeddings[told], stored[told]) if told.any() else None


def code_gates(connection: psycopg.Connection[Any]) -> list[Gate]:
    """Gates on the set of codes in force, in the order of CODE_GATES; without content they pass without values.

    Coverage counts the embeddings of encoders in force that have a code of their own; the cosine is the lowest of all
    modalities, as the run that coded measured it.
    """
    coded, embedded = _row(
        connection,
        """select count(*) filter (where c.encoded_at = e.encoded_at), count(*)
           from content_embeddings e join content_encoders using (modality, revision)
           left join (codebooks b join code_sets s on s.code_set = b.code_set and s.active)
               on b.modality = e.modality and b.revision = e.revision
           left join content_codes c on c.codebook_id = b.codebook_id and c.item_id = e.item_id
           where content_encoders.active""",
        {},
    )
    measured = connection.execute("select metrics -> 'cosine' from code_sets where active").fetchone()
    cosine = min(measured[0].values(), default=None) if measured and measured[0] else None
    return [
        Gate("code_coverage", _ratio(coded, embedded), 1.0, "at least"),
        Gate("code_cosine", cosine, 0.8, "at least", "warn"),
    ]


def generation_gates(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    """Gates on a filled generation (state building or later), in the order of GENERATION_GATES."""
    vectors = _sample(
        connection,
        """select embedding from item_embeddings where generation = %(generation)s
           order by md5(item_id) limit %(sample)s""",
        {"generation": generation},
    )
    gates = vector_gates("item", vectors, Limits(mean_cosine=0.9, duplicates=0.2, dead_dimensions=0.05))
    for measure in _MEASURES:
        gates.extend(measure(connection, generation))
    return gates


def _interests(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    rows = connection.execute(
        """select user_id, embedding from user_interests where generation = %(generation)s and user_id in (
               select user_id from user_interests where generation = %(generation)s and interest = 0
               order by md5(user_id) limit %(users)s)
           order by user_id, interest""",
        {"generation": generation, "users": SAMPLE // 4},
        binary=True,
    ).fetchall()
    by_user: dict[str, list[Floats]] = {}
    for user_id, embedding in rows:
        by_user.setdefault(user_id, []).append(embedding.to_numpy().astype(np.float32))
    stacked = [np.stack(own) for own in by_user.values()]
    worst = norm_error(np.concatenate(stacked)) if stacked else None
    return [
        Gate("interest_norm_error", worst, 0.01, "at most"),
        Gate("interest_collapse", interest_collapse(stacked), 0.99, "at most", "warn"),
    ]


# A generation without any ID is made of content alone: an item that has none by its encoders is not to be placed.
_UNPLACEABLE = sql.SQL("""unplaceable as (
    select item_id from items i
    where not exists (select from item_embeddings e where e.generation = %(generation)s and e.id_embedding is not null)
      and not exists (select from content_embeddings c
                      join jsonb_each_text((select config -> 'encoders' from generations
                                            where generation = %(generation)s)) as r (modality, revision)
                          on c.modality = r.modality and c.revision = r.revision
                      where c.item_id = i.item_id)
)""")


def left_out(connection: psycopg.Connection[Any], generation: int) -> int:
    """Items that a generation made of content alone leaves out, since they have none."""
    query = sql.SQL("with {} select count(*) from unplaceable").format(_UNPLACEABLE)
    (found,) = _row(connection, query, {"generation": generation})
    return int(found)


def _item_coverage(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    # A cold item without any content cannot be placed, so the cold segment only warns.
    counted = connection.execute(
        sql.SQL(
            """with {}, counted as (
               select item_id, count(i.item_id) as events,
                      row_number() over (order by count(i.item_id) desc, item_id) - 1.0 as standing,
                      exists (select from item_embeddings e
                              where e.generation = %(generation)s and e.item_id = items.item_id) as placed
               from items
               left join (select item_id from interactions where occurred_at < %(before)s::timestamptz) i
                    using (item_id)
               where not exists (select from unplaceable u where u.item_id = items.item_id) group by item_id
           ), segmented as (
               select placed, case when events = 0 then 'cold'
                                   when standing < %(head)s * (select count(*) from counted) then 'head'
                                   else 'tail' end as segment
               from counted
           )
           select segment, count(*) filter (where placed), count(*) from segmented group by segment"""
        ).format(_UNPLACEABLE),
        {"generation": generation, "head": HEAD_SHARE, "before": _before(connection, generation)},
    ).fetchall()
    shares = {segment: _ratio(placed, total) for segment, placed, total in counted}
    return [
        Gate("coverage_head", shares.get("head"), 1.0, "at least"),
        Gate("coverage_tail", shares.get("tail"), 0.99, "at least"),
        Gate("coverage_cold", shares.get("cold"), 0.9, "at least", "warn"),
    ]


def _users(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    covered, stale, total = _row(
        connection,
        """with arrived as (select user_id, count(*) as events from interactions join items using (item_id)
                            where occurred_at < %(before)s::timestamptz group by user_id),
                placed as (select user_id, max(events) as known from user_interests
                           where generation = %(generation)s group by user_id)
           select count(placed.user_id), count(*) filter (where known <> events), count(*)
           from arrived left join placed using (user_id)""",
        {"generation": generation, "before": _before(connection, generation)},
    )
    return [
        Gate("coverage_users", _ratio(covered, total), 0.99, "at least"),
        Gate("stale_users", _ratio(stale, covered), 0.05, "at most", "warn"),
    ]


def _before(connection: psycopg.Connection[Any], generation: int) -> Any:
    """The moment from which on events are unknown to a generation, and so nothing that it could be measured by."""
    from pipelines.generation.lifecycle import get

    return get(connection, generation).trained_before or "infinity"


def _churn(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    from pipelines.generation.lifecycle import has_partitions, live, neighbour_churn

    before = live(connection)
    churn = None
    if before is not None and before.generation != generation and has_partitions(connection, before.generation):
        churn = neighbour_churn(connection, before.generation, generation)
    return [Gate("neighbour_churn", churn, 0.95, "at most", "warn")]


def _index(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    (valid,) = _row(
        connection,
        """select count(*) from pg_index join pg_class on pg_class.oid = indexrelid join pg_am on pg_am.oid = relam
           where indrelid = to_regclass(%(table)s) and amname = 'hnsw' and indisvalid and indisready""",
        {"table": f"{SCHEMA}.item_embeddings_g{generation}"},
    )
    return [
        Gate("indexes", float(valid), float(len(SPACES)), "at least"),
        Gate("ann_recall", ann_recall(connection, generation), 0.9, "at least"),
    ]


def ann_recall(connection: psycopg.Connection[Any], generation: int) -> float | None:
    """Mean share of the exact RECALL_K nearest items that the index finds, asked with users' interests.

    Users' vectors lie elsewhere than items' do, so recall measured with items as queries flatters the index. Ties at
    the last place count as found (the distance decides, not the id). None without users or items.
    """
    queries = connection.execute(
        """select embedding from user_interests where generation = %(generation)s
           order by md5(user_id), interest limit %(queries)s""",
        {"generation": generation, "queries": RECALL_QUERIES},
    ).fetchall()
    (dim,) = _row(connection, "select dim from generations where generation = %(g)s", {"g": generation})
    statement = sql.SQL(
        """select (embedding::halfvec({dim})) <#> %(query)s::halfvec({dim}) as distance from {table}
           order by 1 limit %(k)s"""
    ).format(dim=sql.Literal(dim), table=sql.Identifier(SCHEMA, f"item_embeddings_g{generation}"))
    shares = []
    for (query,) in queries:
        exact = _distances(connection, statement, query, indexed=False)
        found = _distances(connection, statement, query, indexed=True)
        if len(exact):
            # The index answers the same rows' distances bit for bit; half a rounding step absorbs nothing but noise.
            shares.append(float((found <= exact[-1] + 1e-6).sum()) / len(exact))
    return float(np.mean(shares)) if shares else None


def _distances(connection: psycopg.Connection[Any], statement: sql.Composed, query: Any, *, indexed: bool) -> Floats:
    # Rolled back, so that the settings end with the question; unprepared, since a prepared plan would outlive them.
    with connection.transaction(force_rollback=True):
        for name, value in (
            ("enable_indexscan", "on" if indexed else "off"),
            ("enable_seqscan", "off" if indexed else "on"),
            ("hnsw.ef_search", str(EF_SEARCH)),
        ):
            connection.execute("select set_config(%s, %s, true)", [name, value])
        rows = connection.execute(statement, {"query": query, "k": RECALL_K}, prepare=False).fetchall()
    return np.array([row[0] for row in rows], np.float32)


def _baseline(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    # Told, not blocking: on a handful of users the order of two models is chance.
    from pipelines.generation.lifecycle import get
    from pipelines.generation.training import located

    found = get(connection, generation)
    own = found.metrics.get("validation", {}).get("ndcg@10")
    directory = located(found.checkpoint_path)
    over = None
    if own is not None and directory is not None:
        over = float(own) - _popularity_ndcg(directory)
    return [Gate("ndcg_over_popularity", over, 0.0, "at least", "warn")]


def _popularity_ndcg(directory: Path) -> float:
    """NDCG@10 of popularity on the validation items of a checkpoint's own snapshot, seen items masked."""
    from encoders.evaluation.baselines import Popularity
    from encoders.evaluation.evaluate import validation_ndcg
    from encoders.evaluation.splits import leave_one_out
    from pipelines.generation.training import read_snapshot

    item_ids, histories = read_snapshot(directory)
    split = leave_one_out(histories)
    return validation_ndcg(Popularity(split.train, len(item_ids)), split.validation, len(item_ids))[0]


# One function per question; each answers its gates always, and in this order.
_MEASURES: tuple[Callable[[psycopg.Connection[Any], int], list[Gate]], ...] = (
    _interests,
    _item_coverage,
    _users,
    _churn,
    _index,
    _baseline,
    integrity_gates,
    replay_gates,
    held_out_gates,
)
GENERATION_GATES = (
    *(f"item_{name}" for name in VECTOR_GATES),
    "interest_norm_error",
    "interest_collapse",
    "coverage_head",
    "coverage_tail",
    "coverage_cold",
    "coverage_users",
    "stale_users",
    "neighbour_churn",
    "indexes",
    "ann_recall",
    "ndcg_over_popularity",
    *INTEGRITY_GATES,
    *REPLAY_GATES,
    *HELD_OUT_GATES,
)


def encodable(connection: psycopg.Connection[Any], name: str) -> bool:
    """Whether a modality has anything to do: items that have it, or embeddings of items that lost it."""
    (found,) = _row(
        connection,
        sql.SQL(
            """select exists (select from ({}) as c)
                   or exists (select from content_embeddings where modality = %(modality)s)"""
        ).format(content_of(name)),
        {"modality": name},
    )
    return bool(found)


def content_sample(connection: psycopg.Connection[Any], modality: str, revision: str) -> Floats:
    """Up to SAMPLE content embeddings [N, D] of one modality and encoder revision."""
    return _sample(
        connection,
        """select embedding from content_embeddings where modality = %(modality)s and revision = %(revision)s
           order by md5(item_id) limit %(sample)s""",
        {"modality": modality, "revision": revision},
    )


def _sample(connection: psycopg.Connection[Any], query: str, parameters: dict[str, Any]) -> Floats:
    rows = connection.execute(query, {**parameters, "sample": SAMPLE}, binary=True).fetchall()
    if not rows:
        return np.zeros((0, 1), np.float32)
    return np.stack([row[0].to_numpy() for row in rows]).astype(np.float32)


def _row(connection: psycopg.Connection[Any], query: Any, parameters: dict[str, Any]) -> tuple[Any, ...]:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return tuple(row)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
