"""One question, one answer: where the interests come from, then the one SQL retrieval.

A user's stored interests serve as long as they know the user's newest event; else the user tower computes them now.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import HalfVector
from psycopg.rows import class_row, dict_row

from feature_repo.schema import SEQUENCE_LENGTH
from polytower.errors import UserError
from serving import queries
from serving.content import ContentVector
from serving.errors import NO_TOWER, PROBLEMS, UNKNOWN_HISTORY, UNREADABLE, Problem
from serving.metrics import Metrics
from serving.models import RetrieveRequest
from serving.online import UserTowers
from serving.queries import Candidate

Connection = psycopg.AsyncConnection[Any]
Source = Literal["stored", "online", "given", "content"]
STALE = "interests are older than the user's newest events: "


@dataclass(frozen=True)
class Answer:
    """Candidates with what the caller must know about them. skipped: items of the history that were unknown."""

    generation: int
    interests: Source
    candidates: list[Candidate]
    skipped: list[str] = field(default_factory=list)
    degraded: str | None = None


@dataclass(frozen=True)
class Retrieval:
    """Answers questions over connections that the caller lends."""

    towers: UserTowers
    metrics: Metrics

    async def answer(
        self, connection: Connection, question: RetrieveRequest, content: ContentVector | None = None
    ) -> Answer:
        """Raises Problem, or psycopg.Error with a SQLSTATE of errors.PROBLEMS.

        content: what a question by text or picture was embedded as (ContentQueries.embed).
        """
        if content is not None:
            answer = await self._by_content(connection, question, content)
        elif question.vectors is not None:
            answer = await self._by_vectors(connection, question)
        elif question.history is not None:
            answer = await self._by_history(connection, question)
        else:
            answer = await self._by_user(connection, question)
        self.metrics.candidates(answer.interests, len(answer.candidates))
        if "title" in question.fields:
            answer = replace(answer, candidates=await self._titled(connection, answer.candidates))
        return answer

    async def _by_vectors(self, connection: Connection, question: RetrieveRequest) -> Answer:
        generation = (await self._state(connection, ""))["generation"]
        vectors = [_half(vector) for vector in question.vectors or []]
        candidates = await self._search(connection, question, generation, vectors, question.weights, question.exclude)
        return Answer(generation, "given", candidates)

    async def _by_content(self, connection: Connection, question: RetrieveRequest, content: ContentVector) -> Answer:
        vectors = [HalfVector(content.vector)]
        candidates = await self._search(connection, question, content.generation, vectors, None, question.exclude)
        return Answer(content.generation, "content", candidates)

    async def _by_history(self, connection: Connection, question: RetrieveRequest) -> Answer:
        history = question.history or []
        generation = (await self._state(connection, ""))["generation"]
        parameters = {"generation": generation, "item_ids": sorted({*history})}
        with self.metrics.stage("history"):
            rows = await _fetch(connection, queries.ITEM_VECTORS, parameters)
        known = {row["item_id"]: row["embedding"] for row in rows}
        if not known:
            raise Problem(
                UNKNOWN_HISTORY, f"generation {generation} knows none of the {len(history)} items of the history"
            )
        vectors = [known[item_id] for item_id in history if item_id in known][-SEQUENCE_LENGTH:]
        banned = [*question.exclude, *history] if question.exclude_seen else question.exclude
        candidates = await self._online(connection, question, generation, vectors, banned)
        skipped = [item_id for item_id in dict.fromkeys(history) if item_id not in known]
        return Answer(generation, "online", candidates, skipped)

    async def _by_user(self, connection: Connection, question: RetrieveRequest) -> Answer:
        state = await self._state(connection, question.user_id or "")
        as_of, newest_at = state["as_of"], state["newest_at"]
        if newest_at is None or (as_of is not None and newest_at <= as_of):
            return await self._stored(connection, question)
        parameters = {"user_id": question.user_id, "generation": state["generation"], "length": SEQUENCE_LENGTH}
        with self.metrics.stage("history"):
            rows = await _fetch(connection, queries.USER_HISTORY, parameters)
        if not rows:  # events of items that came after the generation, and nothing else
            reason = "the generation knows none of the items"
            return await self._stored(connection, question, STALE + reason if as_of else None)
        banned = question.exclude
        if question.exclude_seen:
            seen = await _fetch(connection, queries.SEEN_ITEMS, {"user_id": question.user_id})
            banned = [*banned, *seen[0]["item_ids"]]
        vectors, times = [row["embedding"] for row in rows], [row["microseconds"] for row in rows]
        try:
            candidates = await self._online(connection, question, state["generation"], vectors, banned, times)
        except Problem as problem:
            if problem.kind is not NO_TOWER or as_of is None:
                raise
            return await self._stored(connection, question, STALE + problem.detail)
        return Answer(state["generation"], "online", candidates)

    async def _state(self, connection: Connection, user_id: str) -> Mapping[str, Any]:
        with self.metrics.stage("state"):
            rows = await _fetch(connection, queries.STATE, {"user_id": user_id})
        if not rows:
            raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
        return rows[0]

    async def _stored(self, connection: Connection, question: RetrieveRequest, degraded: str | None = None) -> Answer:
        parameters = _parameters(question, question.exclude)
        parameters |= {"user_id": question.user_id, "exclude_seen": question.exclude_seen}
        candidates = await self._candidates(connection, queries.CANDIDATES, parameters)
        generation = candidates[0].generation if candidates else (await self._state(connection, ""))["generation"]
        return Answer(generation, "stored", candidates, degraded=degraded)

    async def _online(
        self,
        connection: Connection,
        question: RetrieveRequest,
        generation: int,
        history: Sequence[HalfVector],
        banned: Sequence[str],
        times: Sequence[int] | None = None,
    ) -> list[Candidate]:
        with self.metrics.stage("tower"):
            await self._load_tower(connection, generation)
            found = await self.towers.interests(generation, [vector.to_numpy() for vector in history], times)
        vectors = [HalfVector(vector) for vector in found.vectors]
        return await self._search(connection, question, generation, vectors, found.weights, banned)

    async def _load_tower(self, connection: Connection, generation: int) -> None:
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
        connection: Connection,
        question: RetrieveRequest,
        generation: int,
        vectors: Sequence[HalfVector],
        weights: Sequence[float] | None,
        banned: Sequence[str],
    ) -> list[Candidate]:
        parameters = _parameters(question, banned)
        parameters |= {"interests": list(vectors), "weights": weights and list(weights), "generation": generation}
        parameters["space"] = question.searched_space
        return await self._candidates(connection, queries.CANDIDATES_BY_VECTORS, parameters)

    async def _candidates(
        self, connection: Connection, statement: str, parameters: Mapping[str, Any]
    ) -> list[Candidate]:
        with self.metrics.stage("search"):
            async with connection.cursor(row_factory=class_row(Candidate)) as cursor:
                await cursor.execute(statement, parameters)
                return await cursor.fetchall()

    async def _titled(self, connection: Connection, candidates: list[Candidate]) -> list[Candidate]:
        with self.metrics.stage("titles"):
            rows = await _fetch(connection, queries.TITLES, {"item_ids": [c.item_id for c in candidates]})
        titles = {row["item_id"]: row["title"] for row in rows}
        return [replace(candidate, title=titles.get(candidate.item_id)) for candidate in candidates]


def _parameters(question: RetrieveRequest, exclude: Sequence[str]) -> dict[str, Any]:
    return queries.candidate_parameters(k=question.k, filter=question.filter, exclude=exclude, merge=question.merge)


def _half(vector: Sequence[float]) -> HalfVector:
    values: NDArray[np.float64] = np.asarray(vector)
    if np.abs(values).max() > np.finfo(np.float16).max:
        raise Problem(UNREADABLE, "a vector's value is beyond half precision; embeddings have unit length")
    return HalfVector(values)


async def _fetch(connection: Connection, statement: str, parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    async with connection.cursor(binary=True, row_factory=dict_row) as cursor:
        await cursor.execute(statement, parameters)
        return await cursor.fetchall()
