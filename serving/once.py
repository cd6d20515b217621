"""One question without a server, for the command line: the same path as HTTP, on a connection of its own."""

import asyncio

import psycopg
from pgvector.psycopg import register_vector_async

from polytower.errors import UserError
from polytower.postgres import connection_options
from serving.errors import Problem, user_error
from serving.indexes import Indexes
from serving.metrics import Metrics
from serving.models import RetrieveRequest
from serving.online import UserTowers
from serving.retrieval import Answer, Retrieval


def ask(url: str, question: RetrieveRequest) -> Answer:
    """Answers one retrieval request. Raises UserError for whatever HTTP answers with a problem response."""
    try:
        return asyncio.run(_ask(url, question))
    except Problem as problem:
        raise UserError(problem.detail) from problem
    except psycopg.Error as error:
        raise user_error(error) from error


async def _ask(url: str, question: RetrieveRequest) -> Answer:
    towers, metrics = UserTowers(), Metrics()
    # One question is not worth an index.
    indexes = Indexes(url, metrics, limit=0)
    try:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True, **connection_options()) as connection:
            await register_vector_async(connection)
            return await Retrieval(towers, metrics, indexes).answer(connection, question)
    finally:
        towers.close()
        await indexes.close()
