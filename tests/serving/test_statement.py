"""A prepared statement without a cursor: values, no row, errors, and a caller who gives up."""

import asyncio
from typing import NamedTuple

import psycopg
import pytest

from serving.statement import Statement


class Row(NamedTuple):
    """What the statement answers."""

    text: str
    numbers: list[int]
    quotient: int | None = None


def test_a_statement_outlives_errors_and_cancellation(served: str) -> None:
    statement = Statement("test", "select $1 || 'ß', array[1, 2], $2 / $3 where $2 > 0", Row, "text", "int4", "int4")
    slow = Statement("test_slow", "select $1, array[1] from pg_sleep($2)", Row, "text", "float8")

    async def ask() -> None:
        async with await psycopg.AsyncConnection.connect(served, autocommit=True) as connection:
            for _ in range(2):
                assert await statement.first(connection, "é", "7", "2") == ("éß", [1, 2], 3)
                assert await statement.first(connection, "é", "0", "2") is None
                with pytest.raises(psycopg.errors.DivisionByZero):
                    await statement.first(connection, "é", "7", "0")
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(slow.first(connection, "", "30"), 0.1)
            assert not connection.closed

    asyncio.run(ask())
