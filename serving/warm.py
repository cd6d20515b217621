"""`polytower serve --warm`: torch, the user tower and the encoders are loaded before the first question for them."""

import logging

import psycopg

from polytower.errors import UserError
from serving import queries
from serving.content import ContentQueries
from serving.database import Database
from serving.errors import Problem
from serving.loading import Loader
from serving.retrieval import Retrieval

LOG = logging.getLogger(__name__)


async def warm_up(database: Database, retrieval: Retrieval, content: ContentQueries, loader: Loader) -> None:
    """Loads what questions to the live generation may need. What cannot be loaded is left to the first question."""
    await loader.start_torch()
    try:
        async with database.connection() as connection:
            row = await (await connection.execute(queries.READY)).fetchone()
            if row is not None:
                await retrieval.load_tower(connection, row[0])
    except (psycopg.Error, Problem) as error:
        LOG.warning("the user tower is not loaded yet: %s", error)
    try:
        await content.warm()
    except (psycopg.Error, Problem, UserError) as error:
        LOG.warning("questions by text or picture are not prepared: %s", error)
