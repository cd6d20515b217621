"""One question without a server, for the command line: the same path as HTTP, on a connection of its own."""

import asyncio

import psycopg

from polytower.errors import UserError
from serving.database import Database
from serving.errors import Problem, user_error
from serving.loaded.content_queries import ContentQueries
from serving.loaded.loader import Loader
from serving.loaded.user_towers import UserTowers
from serving.memory.live_index import Indexes
from serving.metrics import Metrics
from serving.question import Question
from serving.retrieve.retrieval import Answer, Retrieval

PATIENCE = 600.0  # seconds; a person can interrupt


def ask(url: str, question: Question) -> Answer:
    """Answers one retrieval request. Raises UserError for whatever HTTP answers with a problem response."""
    try:
        return asyncio.run(_ask(url, question))
    except Problem as problem:
        raise UserError(problem.detail) from problem
    except psycopg.Error as error:
        raise user_error(error) from error


async def _ask(url: str, question: Question) -> Answer:
    metrics = Metrics()
    loader = Loader(patience=PATIENCE)
    towers = UserTowers(metrics, loader, window=0)
    database = Database(url, metrics, size=1, timeout=PATIENCE)
    content = ContentQueries(database, metrics, loader)
    # one question is not worth an index
    indexes = Indexes(url, metrics, limit=0)
    await database.open()
    try:
        vector = await content.embed(question) if question.asks_by_content else None
        async with database.connection() as connection:
            return await Retrieval(towers, metrics, indexes).answer(connection, question, vector)
    finally:
        await database.close()
        towers.close()
        content.close()
        loader.close()
        await indexes.close()
