"""The part of a long history that matters for a candidate: the items most like it, found by content codes.

For rankers (SEMINAR's search over lifelong sequences, 2407.10714, §3.4; SimTier, MUSE): of the user's newest 10,000
events, the K items whose codes score highest with the candidate's, their attention, and a histogram of cosines over all
events. An item that was met often is found once, and counted often. Deviations: attention is a softmax of the scores,
not trained; the histogram has 20 bins of width .1, as serving/rank/similarity.py has them. Training and serving run the
same code: online is `at = now`. Codes say what an item is: they are taken as they are now.

Legend: N candidates, T items of a history, M modalities, C sub-spaces, D width.
"""

import asyncio
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from encoders.codes.codec import codebooks, coded
from encoders.codes.history import Codebooks, Coded, attention, best
from feature_repo.schema import LONG_HISTORY
from polytower.errors import UserError
from serving.rank.similarity import Floats, Pair, cosine_histogram, cosines

if TYPE_CHECKING:
    import pyarrow as pa

# Softmax of the scores: a score that is .1 higher weighs e times as much.
TEMPERATURE = 0.1
# Pairs of many users and moments whose histories are held at once, and candidates that are scored at once.
CHUNK, BLOCK = 100, 128
COLUMNS = ("relevant_items", "relevant_scores", "relevant_attention", "relevant_histogram", "semantic_id", "code_set")
WAY_OUT = "`polytower materialize --until content` makes them"

# The set in force, and the encoders in force: together they say whether it is stale.
CODE_SET = """
select code_set, dim, weights, revisions,
       (select jsonb_object_agg(modality, revision) from content_encoders where active) as in_force
from code_sets where active limit 1
"""

CODEBOOKS = """
select modality, subspaces, array_send(centroids)
from codebooks where code_set = %(code_set)s order by modality limit 100
"""

# Items of the newest events before a moment, newest first, each with how many of these events it has.
HISTORY = """
select q.n, h.item_ids, h.events
from unnest(%(user_ids)s::text[], %(ats)s::timestamptz[]) with ordinality q (user_id, at, n)
cross join lateral (
    select array_agg(item_id order by last desc, item_id collate "C") as item_ids,
           array_agg(events order by last desc, item_id collate "C") as events
    from (
        select item_id, max(occurred_at) as last, count(*)::int as events
        from (select item_id, occurred_at from interactions i
              where i.user_id = q.user_id and i.occurred_at < q.at
              order by occurred_at desc, position desc limit %(length)s) newest
        group by item_id
    ) met
) h
where h.item_ids is not null limit %(questions)s
"""

# One row a modality: which of the wanted items have codes, and the codes one after the other.
CODES = """
select b.modality, array_agg(wanted.n::int order by wanted.n) as places,
       string_agg(c.codes, ''::bytea order by wanted.n) as codes
from codebooks b
cross join unnest(%(item_ids)s::text[]) with ordinality wanted (item_id, n)
join content_codes c on c.codebook_id = b.codebook_id and c.item_id = wanted.item_id
where b.code_set = %(code_set)s group by b.modality limit 100
"""

NAMES = """
select item_id, semantic_id from semantic_ids where code_set = %(code_set)s and item_id = any(%(item_ids)s) limit 10000
"""

FetchedRows = list[tuple[Any, ...]]
_ELEMENT = np.dtype([("length", ">i4"), ("number", ">f4")])
_HEADER = 20  # of array_send, for one dimension


@dataclass(frozen=True)
class _CodeSet:
    number: int
    dim: int
    weights: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Asked:
    """All that was read for some pairs: questions are (user, moment), numbered from 1."""

    pairs: Sequence[Pair]
    numbers: Mapping[tuple[str, Any], int]
    histories: Mapping[int, tuple[list[str], list[int]]]
    code_set: int
    books: Codebooks
    coded: Coded
    place: Mapping[str, int]
    names: Mapping[str, list[int]]


Steps = Generator[tuple[str, dict[str, Any]], FetchedRows, _Asked]


def relevance_features(connection: psycopg.Connection[Any], pairs: Sequence[Pair], k: int) -> "pa.Table":
    """One row per pair, in order, with COLUMNS; the lists hold at most k items, best first.

    Null where the candidate has no codes; lists are empty where the history has none. semantic_id, code_set: of the
    candidate, and which set its numbers belong to. Raises UserError where there are no codes, or none of the encoders
    in force.
    """
    import pyarrow as pa

    tables = []
    for start in range(0, max(1, len(pairs)), CHUNK):
        steps = _steps(pairs[start : start + CHUNK])
        with connection.cursor(binary=True) as cursor:
            asked = next(steps)
            try:
                while True:
                    asked = steps.send(cursor.execute(*asked).fetchall())
            except StopIteration as done:
                tables.append(_table(done.value, k))
    return pa.concat_tables(tables)


async def relevances(connection: psycopg.AsyncConnection[Any], pairs: Sequence[Pair], k: int) -> "pa.Table":
    """The same over an asynchronous connection, for one request; computed in a thread."""
    steps = _steps(pairs)
    async with connection.cursor(binary=True) as cursor:
        asked = next(steps)
        while True:
            await cursor.execute(*asked)
            try:
                asked = steps.send(await cursor.fetchall())
            except StopIteration as done:
                return await asyncio.to_thread(_table, done.value, k)


def _steps(pairs: Sequence[Pair]) -> Steps:
    code_set = _fresh((yield CODE_SET, {}))
    questions = list(dict.fromkeys((pair.user_id, pair.at) for pair in pairs))
    asked = {"user_ids": [user_id for user_id, _ in questions], "ats": [at for _, at in questions]}
    asked |= {"length": LONG_HISTORY, "questions": len(questions)}
    histories = {n: (item_ids, events) for n, item_ids, events in (yield HISTORY, asked)}
    candidates = list(dict.fromkeys(pair.item_id for pair in pairs))
    item_ids = list(dict.fromkeys([*candidates, *(item for items, _ in histories.values() for item in items)]))
    quantisers = yield CODEBOOKS, {"code_set": code_set.number}
    codes = yield CODES, {"code_set": code_set.number, "item_ids": item_ids}
    names = yield NAMES, {"code_set": code_set.number, "item_ids": candidates}
    return _Asked(
        pairs,
        {question: n for n, question in enumerate(questions, start=1)},
        histories,
        code_set.number,
        _codebooks(quantisers, code_set),
        _coded(codes, {name: count for name, count, _ in quantisers}, len(item_ids)),
        {item_id: row for row, item_id in enumerate(item_ids)},
        dict(names),
    )


def _fresh(rows: FetchedRows) -> _CodeSet:
    """The set in force. Raises UserError without one, or where it is stale."""
    if not rows:
        raise UserError(f"there are no content codes: {WAY_OUT}")
    number, dim, weights, revisions, in_force = rows[0]
    others = sorted(name for name, revision in (in_force or {}).items() if revisions.get(name) != revision)
    if others:
        raise UserError(
            f"the content codes are older than the content embeddings: another encoder is in force for"
            f" {', '.join(others)}; {WAY_OUT} anew"
        )
    return _CodeSet(number, dim, weights)


def _codebooks(rows: FetchedRows, code_set: _CodeSet) -> Codebooks:
    centroids = {
        name: np.frombuffer(sent[_HEADER:], _ELEMENT)["number"]
        .astype(np.float32)
        .reshape(count, -1, code_set.dim // count)
        for name, count, sent in rows
    }
    return codebooks(centroids, code_set.weights)


def _coded(rows: FetchedRows, subspaces: Mapping[str, int], size: int) -> Coded:
    """Codes of `size` items; items and modalities without any are absent."""
    codes = {name: np.zeros((size, count), np.uint8) for name, count in subspaces.items()}
    present = {name: np.zeros(size, bool) for name in subspaces}
    for name, places, packed in rows:
        found = np.array(places) - 1
        codes[name][found] = np.frombuffer(packed, np.uint8).reshape(len(found), subspaces[name])
        present[name][found] = True
    return coded(codes, present)


def _table(asked: _Asked, k: int) -> "pa.Table":
    import pyarrow as pa

    columns: dict[str, list[Any]] = {name: [None] * len(asked.pairs) for name in COLUMNS}
    groups: dict[int, list[int]] = {}
    for row, pair in enumerate(asked.pairs):
        if asked.coded.present[asked.place[pair.item_id]].any():
            groups.setdefault(asked.numbers[pair.user_id, pair.at], []).append(row)
    for n, rows in groups.items():
        items, events = asked.histories.get(n, ([], []))
        history = _History(asked, items, events)
        for start in range(0, len(rows), BLOCK):
            _fill(columns, rows[start : start + BLOCK], asked, history, k)
    kinds = {
        "relevant_items": pa.list_(pa.string()),
        "semantic_id": pa.list_(pa.int16()),
        "code_set": pa.int64(),
    }
    return pa.table(
        {name: pa.array(values, kinds.get(name, pa.list_(pa.float32()))) for name, values in columns.items()}
    )


class _History:
    """What a user met and has codes, newest first, folded to one vector an item."""

    def __init__(self, asked: _Asked, items: Sequence[str], events: Sequence[int]) -> None:
        places = np.array([asked.place[item] for item in items], np.int64)
        there = np.flatnonzero(asked.coded.present[places].any(axis=1))
        self.items = [items[row] for row in there.tolist()]
        self.events = np.array(events, np.int64)[there]
        self.folded_TD = asked.books.fold(asked.coded.take(places[there]))


def _fill(columns: dict[str, list[Any]], rows: Sequence[int], asked: _Asked, history: _History, k: int) -> None:
    """Columns of one user's candidates."""
    candidates = [asked.pairs[row].item_id for row in rows]
    folded_ND = asked.books.fold(asked.coded.take(np.array([asked.place[item] for item in candidates])))
    places, scores = best(cosines(folded_ND, history.folded_TD), k)
    histograms = cosine_histogram(_unit(folded_ND), _unit(history.folded_TD), history.events)
    shares = attention(scores, TEMPERATURE)
    for at, row in enumerate(rows):
        found = (
            [history.items[place] for place in places[at].tolist()],
            scores[at],
            shares[at],
            histograms[at],
            asked.names.get(candidates[at]),
            asked.code_set,
        )
        for name, value in zip(COLUMNS, found, strict=True):
            columns[name][row] = value


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit
