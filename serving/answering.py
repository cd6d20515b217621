"""From a question to all that was asked for: candidates, and what rankers read of them. HTTP and the command line."""

import asyncio
from collections.abc import Sequence

import psycopg

from polytower.errors import UserError
from serving.database import Session
from serving.errors import PROBLEMS, Problem, from_postgres, user_error
from serving.loaded.content_queries import Embedded
from serving.question import Question
from serving.rank.ranking import Ranked
from serving.retrieve.live import live
from serving.retrieve.retrieval import REPLACED
from serving.services import Services, make_services

PATIENCE = 600.0  # seconds that the command line waits; a person can interrupt


async def answer(services: Services, question: Question) -> Ranked:
    """One question's answer. Raises Problem, psycopg.Error."""
    try:
        return await _answer(services, question)
    except (psycopg.Error, Problem) as error:
        if (error if isinstance(error, Problem) else from_postgres(error)).kind is not PROBLEMS["PT013"]:
            raise
        # The generation was dropped, or replaced, under the question: the next one is live.
        return await _answer(services, question)


async def answer_batch(services: Services, questions: Sequence[Question]) -> list[Ranked | Problem]:
    """Answers over one snapshot, and so from one generation; a question that fails leaves the others alone."""
    embedded = await asyncio.gather(*(_embedded(services, question) for question in questions))
    async with services.database.snapshot() as connection:
        return [
            await _one_of_batch(services, connection, question, content)
            for question, content in zip(questions, embedded, strict=True)
        ]


def ask(url: str, question: Question) -> Ranked:
    """One question without a server. Raises UserError for whatever HTTP answers with a problem response."""

    async def alone() -> Ranked:
        services = make_services(url, pool=1, timeout=PATIENCE, patience=PATIENCE, one_question=True)
        async with services.running():
            return await answer(services, question)

    try:
        return asyncio.run(alone())
    except Problem as problem:
        raise UserError(problem.detail) from problem
    except psycopg.Error as error:
        raise user_error(error) from error


async def _answer(services: Services, question: Question) -> Ranked:
    content = await services.content.embed(question) if question.asks_by_content else None
    if not question.is_ranked:
        async with services.database.connection() as connection:
            return Ranked(question, await services.retrieval.answer(connection, question, content))
    async with services.database.snapshot() as connection:
        await _check_live(connection, content)
        found = await services.retrieval.answer(connection, question, content)
        return await services.ranking.complete(connection, question, found)


async def _check_live(connection: Session, content: Embedded | None) -> None:
    """A text or picture was embedded before the snapshot: refuses it if another generation is live by now."""
    if content is not None and content.generation != await live(connection):
        raise Problem(PROBLEMS["PT013"], REPLACED)


async def _embedded(services: Services, question: Question) -> Embedded | Problem | None:
    """What a question's text or picture is embedded as, or the problem with it."""
    if not question.asks_by_content:
        return None
    try:
        return await services.content.embed(question)
    except Problem as problem:
        return problem


async def _one_of_batch(
    services: Services, connection: Session, question: Question, content: Embedded | Problem | None
) -> Ranked | Problem:
    try:
        if isinstance(content, Problem):
            raise content
        await _check_live(connection, content)
        async with connection.transaction():
            found = await services.retrieval.answer(connection, question, content)
        return await services.ranking.complete(connection, question, found)
    except Problem as refusal:
        return refusal
    except psycopg.Error as error:
        problem = from_postgres(error)
        if problem.kind.status >= 500:
            raise
        return problem
