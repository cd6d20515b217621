"""Which generation is live, as a connection sees it."""

from serving import queries
from serving.database import Session
from serving.errors import PROBLEMS, Problem


async def live_or_none(connection: Session) -> int | None:
    """Its number; None: no generation is live."""
    row = await (await connection.execute(queries.READY)).fetchone()
    return None if row is None else int(row[0])


async def live(connection: Session) -> int:
    """Its number. Raises Problem where no generation is live."""
    generation = await live_or_none(connection)
    if generation is None:
        raise Problem(PROBLEMS["PT001"], "no generation is live; build one and promote it")
    return generation
