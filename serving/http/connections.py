"""What uvicorn leaves open: headers that never end, bodies that nobody reads any more, an address with all sockets."""

import asyncio
from collections import Counter
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Connection(HttpToolsProtocol):
    """One connection. Between its requests it is closed PATIENCE seconds after it was made, or after an answer.

    That is the time for a request's headers, and for what is still to come of a body whose answer was given early.
    (An idle connection is closed by uvicorn, sooner.) Headers hold at most HEADERS bytes, one address at most OPEN
    connections.
    """

    PATIENCE: ClassVar[float] = 10.0
    HEADERS: ClassVar[int] = 65_536
    OPEN: ClassVar[int] = 500
    _open: ClassVar[Counter[str]] = Counter()

    _address: str | None = None
    _timer: asyncio.TimerHandle | None = None
    _heading = False  # in the middle of a request's headers
    _headers = 0  # bytes that came meanwhile

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts to wait for a request."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._open[self._address] += 1
        if self._open[self._address] > self.OPEN:
            transport.close()
        else:
            self._wait()

    def on_message_begin(self) -> None:
        """A request's headers begin."""
        super().on_message_begin()
        self._heading, self._headers = True, 0

    def on_headers_complete(self) -> None:
        """They have ended."""
        super().on_headers_complete()
        self._heading = False

    def data_received(self, data: bytes) -> None:
        """Stops to wait once a request is being answered."""
        super().data_received(data)
        if self._answering:
            self._stop_waiting()
        if self._heading:
            self._headers += len(data)
            if self._headers > self.HEADERS:
                self.transport.close()

    def on_response_complete(self) -> None:
        """Starts to wait again, unless the next request is there."""
        super().on_response_complete()
        if not self._answering:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Gives the place back."""
        super().connection_lost(exc)
        self._stop_waiting()
        if self._address is not None:
            self._open[self._address] -= 1
            if not self._open[self._address]:
                del self._open[self._address]
            self._address = None

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(self.PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
