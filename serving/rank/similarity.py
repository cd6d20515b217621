"""Similarity of candidates to what a user did: cosine histograms per modality, and closeness to the user's interests.

SimTier (MUSE, Taobao): for a candidate, how many events of the history fall into each bin of the cosine between the two
contents; a ranker reads log(1 + count) per bin. Deviations: 20 bins of width .1 over [-1, 1], and no learned embedding
of the tiers, which is the ranker's own. Training and serving run the same code: online is `at = now`.

Legend: N candidates, T events, K interests, D width.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from feature_repo.modalities import MODALITIES
from feature_repo.views.user_sequence import ORDER, newest_events

if TYPE_CHECKING:
    import pyarrow as pa

BINS = 20
CHUNK = 2_000  # rows whose vectors are held at once

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """A candidate for a user. at: the moment of the question (aware); nothing that happened then or later is seen."""

    user_id: str
    item_id: str
    at: datetime


# The newest events before a moment, oldest first.
HISTORY = (
    sql.SQL("""
select q.n, h.item_ids
from unnest(%(user_ids)s::text[], %(ats)s::timestamptz[]) with ordinality q (user_id, at, n)
cross join lateral (select array_agg(item_id order by {order}) as item_ids from ({events}) newest) h
where h.item_ids is not null limit %(questions)s
""")
    .format(order=sql.SQL(ORDER), events=newest_events("q.user_id", "q.at"))
    .as_string()
)

# The interests of the generation that was live at that moment.
INTERESTS = """
select q.n, p.generation, array_agg(u.embedding order by u.interest) as interests
from unnest(%(user_ids)s::text[], %(ats)s::timestamptz[]) with ordinality q (user_id, at, n)
join promotions p on p.live_from <= q.at and (p.live_until is null or q.at < p.live_until)
join user_interests u on u.generation = p.generation and u.user_id = q.user_id
group by q.n, p.generation limit %(questions)s
"""

# The interests of one generation.
INTERESTS_OF = """
select q.n, u.generation, array_agg(u.embedding order by u.interest) as interests
from unnest(%(user_ids)s::text[]) with ordinality q (user_id, n)
join user_interests u on u.generation = %(generation)s and u.user_id = q.user_id
group by q.n, u.generation limit %(questions)s
"""

CONTENT = """
select e.modality, e.item_id, e.embedding, e.encoded_at
from content_embeddings e join content_encoders c using (modality, revision)
where c.active and e.item_id = any (%(item_ids)s) limit 10000000
"""

ITEM_EMBEDDINGS = """
select e.generation, e.item_id, e.embedding
from unnest(%(generations)s::bigint[], %(item_ids)s::text[]) wanted (generation, item_id)
join item_embeddings e on e.generation = wanted.generation and e.item_id = wanted.item_id limit 10000000
"""


def cosine_histogram(candidates_ND: Floats, history_TD: Floats, events_T: NDArray[np.int64] | None = None) -> Floats:
    """log(1 + count) of the cosines that fall into [-1 + .1·b, -1 + .1·(b + 1)), b = 0 … 19: float32 [N, 20].

    Rows have unit length. The last bin holds 1 as well. T may be 0: then all counts are. events_T: how often each row
    of the history counts (default: once).
    """
    millionths_NT = np.rint((cosines(candidates_ND, history_TD) + 1) * 1e6).astype(np.int64)
    bins_NT = (millionths_NT // (2_000_000 // BINS)).clip(0, BINS - 1)
    flat = bins_NT + BINS * np.arange(len(candidates_ND))[:, None]
    weights = None if events_T is None else np.broadcast_to(events_T, flat.shape).ravel()
    counts = np.bincount(flat.ravel(), weights, minlength=BINS * len(candidates_ND)).reshape(-1, BINS)
    histogram: Floats = np.log1p(counts).astype(np.float32)
    return histogram


def interest_closeness(candidates_ND: Floats, interests_KD: Floats) -> tuple[Floats, Floats]:
    """(max, mean) over the interests of their cosine with each candidate: two float32 [N]. K is at least 1."""
    cosines_NK = cosines(candidates_ND, interests_KD)
    return cosines_NK.max(axis=1).astype(np.float32), cosines_NK.mean(axis=1).round(6).astype(np.float32)


def cosines(rows_ND: Floats, others_MD: Floats) -> NDArray[np.float64]:
    """Products [N, M] to six places: a product's last digits depend on how many rows it was computed with."""
    products: NDArray[np.float64] = (rows_ND.astype(np.float64) @ others_MD.astype(np.float64).T).round(6)
    return products


def similarity_features(
    connection: psycopg.Connection[Any], pairs: Sequence[Pair], *, recorded_only: bool = False
) -> "pa.Table":
    """One row per pair, in order: `similarity_MODALITY` [20] for every modality, `interest_max`, `interest_mean`.

    Histograms count the newest 200 events before `at`, by the active encoders' content embeddings; null where the
    candidate has no content of the modality. Interests are those of the generation that was live at `at`; null where
    none was, or where it knows the user or the candidate not. Content says what an item is, not what happened to it, so
    it is taken as it is now; recorded_only leaves out what was encoded after `at`, as Feast's `item_content` does.
    """
    import pyarrow as pa

    tables = []
    for start in range(0, max(1, len(pairs)), CHUNK):
        steps = _steps(pairs[start : start + CHUNK], recorded_only)
        with connection.cursor(binary=True) as cursor:
            tables.append(_table(_run(steps, cursor)))
    return pa.concat_tables(tables)


async def similarities(
    connection: psycopg.AsyncConnection[Any], pairs: Sequence[Pair], generation: int | None
) -> "pa.Table":
    """The same over an asynchronous connection, for one request; interests are those of this generation, if any."""
    steps = _steps(pairs, recorded_only=False, statement=INTERESTS_OF, generation=generation)
    async with connection.cursor(binary=True) as cursor:
        asked = next(steps)
        while True:
            await cursor.execute(*asked)
            try:
                asked = steps.send(await cursor.fetchall())
            except StopIteration as done:
                return _table(done.value)


FetchedRows = list[tuple[Any, ...]]
Columns = dict[str, list[Any]]
# A computation that asks for rows of the database and is told them: the same for both kinds of connection.
Steps = Generator[tuple[str, dict[str, Any]], FetchedRows, Columns]


def _run(steps: Steps, cursor: psycopg.Cursor[Any]) -> Columns:
    asked = next(steps)
    while True:
        rows = cursor.execute(*asked).fetchall()
        try:
            asked = steps.send(rows)
        except StopIteration as done:
            columns: Columns = done.value
            return columns


def _steps(
    pairs: Sequence[Pair], recorded_only: bool, statement: str = INTERESTS, generation: int | None = None
) -> Steps:
    questions = list(dict.fromkeys((pair.user_id, pair.at) for pair in pairs))
    asked = {"user_ids": [user_id for user_id, _ in questions], "ats": [at for _, at in questions]}
    asked |= {"questions": len(questions), "generation": generation}
    histories: dict[int, list[str]] = dict((yield HISTORY, asked))
    interests = {n: (of, _matrix(vectors)) for n, of, vectors in (yield statement, asked)}
    item_ids = sorted({pair.item_id for pair in pairs}.union(*histories.values()))
    content = {
        (modality, item_id): (embedding.to_numpy().astype(np.float32), encoded_at)
        for modality, item_id, embedding, encoded_at in (yield CONTENT, {"item_ids": item_ids})
    }
    number = {question: n for n, question in enumerate(questions, start=1)}
    groups: dict[int, list[int]] = {}
    for row, pair in enumerate(pairs):
        groups.setdefault(number[pair.user_id, pair.at], []).append(row)
    wanted = {(interests[n][0], pairs[row].item_id) for n, rows in groups.items() if n in interests for row in rows}
    keys = sorted(wanted)
    parameters = {"generations": [of for of, _ in keys], "item_ids": [item for _, item in keys]}
    items = {
        (of, item_id): embedding.to_numpy().astype(np.float32)
        for of, item_id, embedding in (yield ITEM_EMBEDDINGS, parameters)
    }
    columns: Columns = {name: [None] * len(pairs) for name in _names()}
    for n, rows in groups.items():
        at = questions[n - 1][1] if recorded_only else None
        candidates = [pairs[row].item_id for row in rows]
        for modality in MODALITIES.values():
            found = {
                item: vector
                for item in {*candidates, *histories.get(n, ())}
                for vector, encoded_at in [content.get((modality.name, item), (None, None))]
                if vector is not None and (at is None or encoded_at <= at)
            }
            _fill_histograms(columns[modality.similarity], rows, candidates, histories.get(n, ()), found)
        if n in interests:
            _fill_closeness(columns, rows, candidates, *interests[n], items)
    return columns


def _fill_histograms(
    column: list[Any],
    rows: Sequence[int],
    candidates: Sequence[str],
    history: Sequence[str],
    content: Mapping[str, Floats],
) -> None:
    known = [(row, content[item]) for row, item in zip(rows, candidates, strict=True) if item in content]
    if not known:
        return
    events = [content[item] for item in history if item in content]
    width = len(known[0][1])
    history_TD = np.stack(events) if events else np.zeros((0, width), np.float32)
    histograms = cosine_histogram(np.stack([vector for _, vector in known]), history_TD)
    for (row, _), histogram in zip(known, histograms, strict=True):
        column[row] = histogram


def _fill_closeness(
    columns: Columns,
    rows: Sequence[int],
    candidates: Sequence[str],
    generation: int,
    interests_KD: Floats,
    items: Mapping[tuple[int, str], Floats],
) -> None:
    known = [(row, items[generation, i]) for row, i in zip(rows, candidates, strict=True) if (generation, i) in items]
    if not known:
        return
    highest, mean = interest_closeness(np.stack([vector for _, vector in known]), interests_KD)
    for (row, _), most, average in zip(known, highest, mean, strict=True):
        columns["interest_max"][row], columns["interest_mean"][row] = float(most), float(average)


def _matrix(vectors: Sequence[Any]) -> Floats:
    return np.stack([vector.to_numpy().astype(np.float32) for vector in vectors])


def _names() -> Iterator[str]:
    yield from (modality.similarity for modality in MODALITIES.values())
    yield from ("interest_max", "interest_mean")


def _table(columns: Columns) -> "pa.Table":
    import pyarrow as pa

    kinds = {name: pa.list_(pa.float32()) if name.startswith("similarity") else pa.float32() for name in columns}
    return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
