"""Candidates and what a ranker reads of them, in one call.

That is a feature service's values, similarities to the user, and the items of a long history that are most like each.
"""

import asyncio
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from polytower.errors import UserError
from serving import json_columns
from serving.database import Session
from serving.errors import UNUSABLE_FEATURES, Problem
from serving.metrics import ServerMetrics
from serving.queries import Candidates, Found
from serving.question import Question
from serving.rank.feature_service import Features
from serving.rank.relevance import relevances
from serving.rank.similarity import Pair, similarities
from serving.retrieve.retrieval import Answer

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Ranked:
    """An answer with N candidates. features: N rows, or None where none were asked for; so similarity and relevant.

    user_columns: the columns of features that say something of the user alone, and so the same in every row.
    """

    question: Question
    answer: Answer
    features: "pa.Table | None" = None
    similarity: "pa.Table | None" = None
    relevant: "pa.Table | None" = None
    user_columns: list[str] = field(default_factory=list)

    def as_json(self) -> bytes:
        """The answer as JSON; what is the user's stands once, beside the candidates."""
        answer = self.answer
        columns = _columns(answer.candidates)
        document: dict[str, Any] = {"generation": answer.generation, "interests": answer.interests}
        if self.features is not None:
            document["user_features"] = self.user_features()
        columns |= {name: json_columns.values(values) for name, values in self.further().items()}
        document |= {"candidates": json_columns.array(json_columns.objects(columns))}
        return json_columns.json_bytes(document | {"skipped": answer.skipped, "degraded": answer.degraded})

    def user_features(self) -> dict[str, Any] | None:
        """The service's features of the user; None where no service was asked for."""
        if self.features is None:
            return None
        own = [name for name in self.features.column_names if name in self.user_columns]
        return next(iter(self.features.select(own).slice(0, 1).to_pylist()), {})

    def further(self) -> dict[str, list[Any]]:
        """What was asked for beside candidates, by name: one value for each."""
        found: dict[str, list[Any]] = {}
        if self.features is not None:
            others = [name for name in self.features.column_names if name not in (*self.user_columns, "item_id")]
            found["features"] = self.features.select(others).to_pylist()
        if self.similarity is not None:
            found["similarity"] = self.similarity.to_pylist()
        if self.relevant is not None:
            found["relevant"] = self.relevant.to_pylist()
        return found

    def as_table(self) -> "pa.Table":
        """One row per candidate with all that was asked for; the rest of the answer is in the schema's metadata."""
        import pyarrow as pa

        answer = self.answer
        found = answer.candidates
        columns = {
            "item_id": pa.array(found.item_ids, pa.string()),
            "score": pa.array(found.scores, pa.float32()),
            "rank": pa.array(range(1, len(found) + 1), pa.int32()),
            "interest": pa.array(found.interests, pa.int32()),
            "interest_rank": pa.array(found.interest_ranks, pa.int32()),
        }
        if found.found is not None:
            by = found.found
            offsets = pa.array(np.concatenate([[0], by.ends]), pa.int32())
            columns |= {
                "found_by": pa.ListArray.from_arrays(offsets, pa.array(by.interests, pa.int32())),
                "found_ranks": pa.ListArray.from_arrays(offsets, pa.array(by.ranks, pa.int32())),
                "found_scores": pa.ListArray.from_arrays(offsets, pa.array(by.scores, pa.float32())),
            }
        if found.titles is not None:
            columns["title"] = pa.array(found.titles, pa.string())
        for table in (self.features, self.similarity, self.relevant):
            if table is not None:
                columns |= {name: table[name] for name in table.column_names if name not in columns}
        rest = {
            "generation": answer.generation,
            "interests": answer.interests,
            "skipped": answer.skipped,
            "degraded": answer.degraded,
        }
        return pa.table(columns).replace_schema_metadata({"polytower": json.dumps(rest)})


@dataclass(frozen=True)
class Ranking:
    """Adds to answers what their questions ask for: of the same snapshot, and so of the same generation.

    Connections are in the transaction that the answer came from (Database.snapshot).
    """

    features: Features
    metrics: ServerMetrics

    async def complete(self, connection: Session, question: Question, answer: Answer) -> Ranked:
        """The answer with what its question asks for, which may be nothing. Raises Problem."""
        if not question.is_ranked:
            return Ranked(question, answer)
        features = asyncio.create_task(self._features(connection, question, answer))
        features.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            similarity = await self._similarity(connection, question, answer)
            relevant = await self._relevant(connection, question, answer)
            values, user_columns = await features
        finally:
            features.cancel()
        return Ranked(question, answer, values, similarity, relevant, user_columns)

    async def _features(
        self, connection: Session, question: Question, answer: Answer
    ) -> tuple["pa.Table | None", list[str]]:
        if question.features is None:
            return None, []
        snapshot = await connection.exported()
        items = answer.candidates.item_ids
        return await self.features.of_candidates(question.features, question.user_id, items, snapshot)

    async def _similarity(self, connection: Session, question: Question, answer: Answer) -> "pa.Table | None":
        if not question.similarity:
            return None
        if question.user_id is None:
            raise Problem(UNUSABLE_FEATURES, "similarity is that of candidates to a user's events: ask by user_id")
        items = answer.candidates.item_ids
        return await self.similarity(connection, answer.generation, [question.user_id] * len(items), items)

    async def _relevant(self, connection: Session, question: Question, answer: Answer) -> "pa.Table | None":
        if question.relevant is None:
            return None
        if question.user_id is None:
            raise Problem(UNUSABLE_FEATURES, "relevant items are those of a user's events: ask by user_id")
        items = answer.candidates.item_ids
        return await self.relevant(connection, [question.user_id] * len(items), items, question.relevant)

    async def relevant(self, connection: Session, user_ids: list[str], item_ids: list[str], k: int) -> "pa.Table":
        """The k items of each user's long history that are most like each item, as of now. Raises Problem."""
        now = datetime.now(UTC)
        pairs = [Pair(user_id, item_id, now) for user_id, item_id in zip(user_ids, item_ids, strict=True)]
        try:
            with self.metrics.stage("relevance"):
                return await relevances(connection, pairs, k)
        except UserError as error:
            raise Problem(UNUSABLE_FEATURES, str(error)) from error

    async def similarity(
        self, connection: Session, generation: int | None, user_ids: list[str], item_ids: list[str]
    ) -> "pa.Table":
        """Similarity features as of now: one row per user and item, with the interests of this generation."""
        now = datetime.now(UTC)
        pairs = [Pair(user_id, item_id, now) for user_id, item_id in zip(user_ids, item_ids, strict=True)]
        with self.metrics.stage("similarity"):
            return await similarities(connection, pairs, generation)


def _columns(found: Candidates) -> dict[str, list[str]]:
    """Candidates as columns of JSON."""
    columns = {
        "item_id": json_columns.values(found.item_ids),
        "score": json_columns.numbers(found.scores),
        "rank": [str(rank) for rank in range(1, len(found) + 1)],
        "interest": json_columns.numbers(found.interests),
        "interest_rank": json_columns.numbers(found.interest_ranks),
    }
    if found.found is not None:
        columns["found_by"] = _found_by(found.found)
    if found.titles is not None:
        columns["title"] = json_columns.values(found.titles)
    return columns


def _found_by(found: Found) -> list[str]:
    """Who found each item, as JSON."""
    interests, ranks, scores = (json_columns.numbers(column) for column in (found.interests, found.ranks, found.scores))
    rows = json_columns.objects({"interest": interests, "rank": ranks, "score": scores})
    return ["[" + ",".join(rows[span]) + "]" for span in found.spans()]
