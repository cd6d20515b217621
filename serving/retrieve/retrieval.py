"""One question, one answer: where the interests come from, then one search.

A user's stored interests serve as long as they know all events that arrived; else the user tower computes them now.
The index in memory answers where it is of the very state that the question sees, else SQL does: same question, same
answer. A question to a warm server is one statement.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from psycopg.rows import dict_row

from feature_repo.schema import SEQUENCE_LENGTH
from polytower.errors import UserError
from serving import queries
from serving.database import Session
from serving.errors import LOADING, NO_TOWER, PROBLEMS, UNKNOWN_HISTORY, UNREADABLE, Problem
from serving.loaded.content_queries import ContentVector, Embedded, QueryVector
from serving.loaded.user_towers import History, UserTowers
from serving.memory.item_index import ItemIndex
from serving.memory.live_index import LiveIndex
from serving.metrics import ServerMetrics
from serving.queries import Candidates, Found, State
from serving.question import Interests, Question, Source
from serving.retrieve.nothing import why_nothing
from serving.retrieve.shadow import Shadow

# Merges whose answer is a prefix by score: the others may rightly prefer a lower score.
SHADOWED = ("max",)
STALE = "interests are older than what arrived of the user's events: "
UNENCODED = (
    "{} queries of the user's newest events are not encoded yet and count as none: `polytower materialize` does it"
)
REPLACED = "another generation went live while the question was read; try again"
LOST = "content of {} items of the history is no longer as the encoders of generation {} left it; build another"
UNKNOWN = "{} items of the user's newest events are unknown to generation {}: they came later, or have nothing it reads"


@dataclass(frozen=True)
class Answer:
    """Candidates with what the caller must know about them. skipped: items of the history that were unknown."""

    generation: int
    interests: Source
    candidates: Candidates
    skipped: list[str] = field(default_factory=list)
    degraded: str | None = None


@dataclass(frozen=True)
class Retrieval:
    """Answers questions over connections that the caller lends."""

    towers: UserTowers
    metrics: ServerMetrics
    live_index: LiveIndex
    shadow: Shadow | None = None

    async def answer(self, connection: Session, question: Question, content: Embedded | None = None) -> Answer:
        """Raises Problem, or psycopg.Error with a SQLSTATE of errors.PROBLEMS.

        content: what the question's text or picture was embedded as (ContentQueries.embed).
        """
        mixed = question.is_mixed
        asked = content.vector if isinstance(content, QueryVector) else None
        if asked is not None:  # the tower reads the text: what is left is a question of the user
            question = question.model_copy(update={"text": None})
        state = await self._state(connection, question, searches=asked is not None)
        # a text or picture was embedded before this snapshot was taken: it stays with the generation that embedded it
        generation = state.generation if content is None else content.generation
        if mixed and generation != state.generation:
            raise Problem(PROBLEMS["PT013"], REPLACED)
        index = self.live_index.current(generation, state.version)
        if isinstance(content, ContentVector) and not question.is_mixed:
            interests = Interests("content", [half_precision(content.vector)], None, [0])
        elif question.vectors is not None:
            interests = _given(question)
        elif question.history is not None or question.attributes is not None:
            interests = await self._of_history(connection, question, state, index, asked)
        else:
            interests = await self._of_user(connection, question, state, index, asked)
        if isinstance(content, ContentVector) and question.is_mixed:
            interests = replace(interests, content=half_precision(content.vector))
        candidates = await self._search(connection, question, generation, index, interests)
        self.metrics.candidates(interests.source, len(candidates))
        degraded = interests.degraded
        if not len(candidates):
            nothing = await why_nothing(connection, question, interests, generation)
            degraded = nothing if degraded is None else f"{degraded}; {nothing}"
        return Answer(generation, interests.source, candidates, interests.skipped, degraded)

    async def _state(self, connection: Session, question: Question, *, searches: bool) -> State:
        with self.metrics.stage("state"):
            statement = queries.STATE if question.user_id is None else queries.USER_STATE
            asked = {
                "user_id": question.user_id,
                "exclude_seen": question.exclude_seen,
                "length": SEQUENCE_LENGTH,
                "searches": searches,
            }
            row = await connection.first(statement, asked)
        if row is None:
            raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
        return State(*row)

    async def _of_history(
        self,
        connection: Session,
        question: Question,
        state: State,
        index: ItemIndex | None,
        asked: NDArray[np.float32] | None,
    ) -> Interests:
        history = question.history or []
        known = await self._vectors(connection, state.generation, index, history)
        if not known and asked is None and not await self._reads(connection, state.generation, question.attributes):
            raise Problem(
                UNKNOWN_HISTORY,
                f"generation {state.generation} knows none of the {len(history)} items of the history"
                + ("" if question.attributes is None else ", and reads no attributes"),
            )
        items = [item_id for item_id in history if item_id in known][-SEQUENCE_LENGTH:]
        read = History(state.generation, (), None, question.attributes or {}, asked=asked)
        interests = await self._computed(connection, items, known, read)
        skipped = [item_id for item_id in dict.fromkeys(history) if item_id not in known]
        return replace(
            interests, banned=history if question.exclude_seen else (), skipped=[*skipped, *interests.skipped]
        )

    async def _of_user(
        self,
        connection: Session,
        question: Question,
        state: State,
        index: ItemIndex | None,
        asked: NDArray[np.float32] | None,
    ) -> Interests:
        if not state.stale:
            return await self._stored(connection, question, state)
        history, unknown = state.history or [], state.unknown or []
        reads = history or await self._reads(connection, state.generation, state.attributes)
        if not history and asked is None and (state.vectors is not None or not reads):
            # no events, or of items that came after the generation, and nothing else
            reason = STALE + "the generation knows none of the items" if unknown else None
            return await self._stored(connection, question, state, reason)
        if asked is not None and state.vectors is None and not (reads or unknown):
            return await self._stored(connection, question, state)  # says that nobody is called so
        known = await self._vectors(connection, state.generation, index, history)
        queries = await self._queries(connection, state)
        try:
            read = History(state.generation, (), state.microseconds, state.attributes or {}, queries, asked)
            found = await self._computed(connection, history, known, read)
        except Problem as problem:
            waits = problem.kind in (NO_TOWER, LOADING, UNKNOWN_HISTORY)
            if not waits or state.vectors is None or asked is not None:
                raise
            return await self._stored(connection, question, state, STALE + problem.detail)
        told = [UNKNOWN.format(len(unknown), state.generation)] if unknown else []
        missing = sum(key is not None for key in state.query_keys or ()) - sum(one is not None for one in queries or ())
        told += [UNENCODED.format(missing)] if missing else []
        told += [found.degraded] if found.degraded else []
        skipped = [*unknown, *found.skipped]
        return replace(found, banned=state.seen or (), skipped=skipped, degraded="; ".join(told) or None)

    async def _queries(self, connection: Session, state: State) -> list[NDArray[Any] | None] | None:
        """What was searched for at each event of the history, embedded; None for towers that read no queries."""
        wanted = {key for key in state.query_keys or () if key is not None}
        if not wanted:
            return None
        parameters = {"generation": state.generation, "keys": sorted(wanted)}
        rows = await _fetch(connection, queries.QUERY_VECTORS, parameters)
        found = {row["query_key"]: row["embedding"].to_numpy() for row in rows}
        return [None if key is None else found.get(key) for key in state.query_keys or ()]

    async def _stored(
        self, connection: Session, question: Question, state: State, degraded: str | None = None
    ) -> Interests:
        if state.vectors is None or state.numbers is None:
            parameters = {"user_id": question.user_id, "generation": state.generation}
            await _fetch(connection, queries.UNKNOWN_USER, parameters)
            raise AssertionError("the statement says what is wrong with the user")
        vectors_KD = np.frombuffer(state.vectors, ">f2").reshape(-1, state.dim).astype(np.float32)
        return Interests("stored", vectors_KD, state.weights, state.numbers, state.seen or (), degraded=degraded)

    async def _vectors(
        self, connection: Session, generation: int, index: ItemIndex | None, item_ids: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """The embeddings of those items that the generation knows."""
        wanted = sorted({*item_ids})
        with self.metrics.stage("history"):
            if index is not None:
                found = zip(wanted, index.vectors(wanted), strict=True)
                return {item_id: vector for item_id, vector in found if vector is not None}
            parameters = {"generation": generation, "item_ids": wanted}
            rows = await _fetch(connection, queries.ITEM_VECTORS, parameters)
        return {row["item_id"]: row["embedding"].to_numpy() for row in rows}

    async def _computed(
        self, connection: Session, item_ids: Sequence[str], known: Mapping[str, NDArray[Any]], read: History
    ) -> Interests:
        """item_ids: the history, of which known has the embeddings; read: all else that there is to read.

        A tower that reads content skips items that have lost it.
        """
        generation = read.generation
        with self.metrics.stage("tower"):
            await self.load_tower(connection, generation)
            rows, lost = known, list[str]()
            if reads := self.towers.reads(generation):
                rows = await self._content(connection, generation, reads, item_ids)
                lost = [item_id for item_id in dict.fromkeys(item_ids) if item_id not in rows]
                if item_ids and not rows:
                    raise Problem(UNKNOWN_HISTORY, LOST.format(len(lost), generation))
            places = [place for place, item_id in enumerate(item_ids) if item_id in rows]
            found = await self.towers.interests(
                replace(
                    read,
                    items=[rows[item_ids[place]] for place in places],
                    times=None if read.times is None else [read.times[place] for place in places],
                    queries=None if read.queries is None else [read.queries[place] for place in places],
                )
            )
        reason = LOST.format(len(lost), generation) if lost else None
        numbers = range(len(found.vectors))
        return Interests("online", half_precision(found.vectors), found.weights, numbers, skipped=lost, degraded=reason)

    async def _content(
        self, connection: Session, generation: int, reads: Sequence[tuple[str, int]], item_ids: Sequence[str]
    ) -> dict[str, NDArray[Any]]:
        """What items are made of: the modalities side by side, zeros for one that is missing; of items with any."""
        places, width = {}, 0
        for name, size in reads:
            places[name], width = slice(width, width + size), width + size
        found: dict[str, NDArray[Any]] = {}
        parameters = {"generation": generation, "item_ids": sorted({*item_ids})}
        for row in await _fetch(connection, queries.ITEM_CONTENT, parameters):
            if row["modality"] in places:
                whole = found.setdefault(row["item_id"], np.zeros(width, np.float32))
                whole[places[row["modality"]]] = row["embedding"].to_numpy()
        return found

    async def _reads(self, connection: Session, generation: int, attributes: Mapping[str, Any] | None) -> bool:
        """Whether attributes alone make interests: they are there, and the generation's tower reads them."""
        return bool(attributes) and bool(await _fetch(connection, queries.READS_ATTRIBUTES, {"generation": generation}))

    async def load_tower(self, connection: Session, generation: int) -> None:
        """Gets the generation's user tower ready. Raises Problem."""
        if generation in self.towers:
            return
        rows = await _fetch(connection, queries.USER_TOWER, {"generation": generation})
        if not rows:
            raise Problem(NO_TOWER, f"generation {generation} brings no user tower")
        try:
            await self.towers.load(generation, bytes(rows[0]["weights"]), rows[0]["config"])
        except UserError as error:
            raise Problem(NO_TOWER, f"the user tower of generation {generation} cannot be read") from error

    async def _search(
        self,
        connection: Session,
        question: Question,
        generation: int,
        index: ItemIndex | None,
        interests: Interests,
    ) -> Candidates:
        with self.metrics.stage("search"):
            # the encoders' own spaces are several times as wide as a generation's: Postgres searches them
            found = None
            if index is not None and interests.content is None:
                found = await self.live_index.answer(index, question, interests)
            by = "sql" if found is None else "memory"
            if found is None:
                found = await _by_sql(connection, question, interests, generation)
        self.metrics.searched(by)
        if self.shadow is not None and interests.content is None and question.merge in SHADOWED and self.shadow.due:
            self.shadow.sample(by, queries.search_parameters(question, interests, generation, exact=True), found.scores)
        return found


def _given(question: Question) -> Interests:
    vectors = [half_precision(vector) for vector in question.vectors or []]
    return Interests("given", vectors, question.weights, range(len(vectors)))


async def _by_sql(connection: Session, question: Question, interests: Interests, generation: int) -> Candidates:
    parameters = queries.search_parameters(question, interests, generation)
    statement = queries.CANDIDATES_BY_VECTORS if interests.content is None else queries.CANDIDATES_MIXED
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(statement, parameters)
        rows = await cursor.fetchall()
    item_ids, scores, _, places, ranks, _, *found = (
        map(list, zip(*rows, strict=True)) if rows else ([] for _ in range(9))
    )
    titles = None
    if "title" in question.fields:
        known = await _fetch(connection, queries.TITLES, {"item_ids": item_ids})
        by_id = {row["item_id"]: row["title"] for row in known}
        titles = [by_id.get(item_id) for item_id in item_ids]
    called = np.asarray(interests.numbers)
    return Candidates(
        generation,
        item_ids,
        np.array(scores, np.float32),
        called[np.array(places, int)],
        np.array(ranks, int),
        _found(found, called) if question.found_by else None,
        titles,
    )


def _found(columns: Sequence[list[list[Any]]], called: NDArray[Any]) -> Found:
    """From arrays by item: interests, ranks and scores. called: the number of each interest."""
    interests, ranks, scores = (list(chain.from_iterable(column)) for column in columns)
    ends = np.cumsum([len(each) for each in columns[0]], dtype=int)
    return Found(called[np.array(interests, int)], np.array(ranks, int), np.array(scores, np.float32), ends)


def half_precision(vector: Sequence[float] | NDArray[Any]) -> NDArray[np.float32]:
    """The vector in the precision that embeddings are stored in."""
    values: NDArray[Any] = np.asarray(vector)
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise Problem(UNREADABLE, "a vector's value is beyond half precision; embeddings have unit length")
    return values.astype(np.float16).astype(np.float32)


async def _fetch(connection: Session, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    async with connection.cursor(binary=True, row_factory=dict_row) as cursor:
        await cursor.execute(statement, parameters)
        return await cursor.fetchall()
