"""One statement, prepared once on each connection, sent and read without a cursor.

A cursor works out for every call how its parameters are written and its columns read, and that took twice the time of
the call itself. Waiting, cancelling and reading values stay psycopg's.
"""

from typing import Any, Generic, NamedTuple, TypeVar
from weakref import WeakSet

import psycopg
from psycopg import generators, pq
from psycopg.adapt import Transformer

Row = TypeVar("Row", bound=NamedTuple)
Connection = psycopg.AsyncConnection[Any]


class Statement(Generic[Row]):
    """name: that it is prepared under. text: SQL with $1 … whose types are `types`. row: what its columns become."""

    def __init__(self, name: str, text: str, row: type[Row], *types: str) -> None:
        self._name = name.encode()
        self._text = text.encode()
        self._row = row
        self._types = [psycopg.adapters.types.get_oid(name) for name in types]
        self._prepared: WeakSet[Connection] = WeakSet()

    async def first(self, connection: Connection, *parameters: str) -> Row | None:
        """The first row, None for none. parameters: as Postgres reads them. Raises psycopg.Error."""
        encoding = connection.info.encoding
        async with connection.lock:
            pgconn = connection.pgconn
            if connection not in self._prepared:
                pgconn.send_prepare(self._name, self._text, self._types)
                await self._result(connection, encoding)
                self._prepared.add(connection)
            values = [parameter.encode(encoding) for parameter in parameters]
            pgconn.send_query_prepared(self._name, values, result_format=pq.Format.BINARY)
            result = await self._result(connection, encoding)
        if not result.ntuples:
            return None
        reader = Transformer(connection)
        reader.set_pgresult(result)
        return self._row(*reader.load_row(0, tuple))

    async def _result(self, connection: Connection, encoding: str) -> Any:
        (result,) = await connection.wait(generators.execute(connection.pgconn))
        if result.status not in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK):
            raise psycopg.errors.error_from_result(result, encoding)
        return result
