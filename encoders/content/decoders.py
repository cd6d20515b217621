"""Processes that decode pictures, each with limits of time and memory: a picture can end its decoder, and nothing else.

A decoder is a fresh interpreter (`python -m encoders.content.decoders`), not a fork: it has no connection, key or
tensor of its parent's, and it ends when its parent's end of the socket closes, however the parent died. Frames of bytes
go both ways, never pickles.
"""

import contextlib
import hashlib
import os
import queue
import resource
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from PIL import Image

from encoders.content.picture import PictureError, open_picture, read_picture
from polytower.errors import UserError

# What one picture may take: seconds of computing, and bytes beyond what an idle decoder has. 50 megapixels with
# transparency take 700 MB and one to three seconds.
SECONDS = 10
MEMORY = 1 << 30
# Seconds by the clock, for a file that cannot be read or a machine that does not get to it.
PATIENCE = 60.0
START_SECONDS = 120.0
# Pictures per request: less than a socket holds of their paths.
GROUP = 16

ImageSource = str | Path | bytes
Answer = TypeVar("Answer")

# Requests: what is asked for, and seconds of computing per picture. An answer is its sort, then what it holds.
_REQUEST = struct.Struct(">cH")
_CHECK, _PATHS, _BYTES = b"c", b"p", b"b"
_TAKEN, _REFUSED = b"+", b"-"
_SIZE = struct.Struct(">II")


class Decoder:
    """One decoding process, started with the first picture and again after one that ended it. For one thread at a time.

    edge: pixels that a picture's shorter side needs. square: pixels of the square that pictures are squeezed into.
    """

    def __init__(self, edge: int, square: int = 0) -> None:
        self._options = (str(edge), str(square))
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def check(self, paths: Sequence[Path], seconds: int = SECONDS) -> list[str | PictureError]:
        """sha256 (hex) of each file that is a whole picture, or why it is none."""
        return self._ask(_CHECK, paths, seconds, lambda answer: answer.decode())

    def decode(self, sources: Sequence[ImageSource], seconds: int = SECONDS) -> list[Image.Image | PictureError]:
        """Each picture in RGB, or why not."""
        found: list[Image.Image | PictureError] = []
        for source in sources if any(isinstance(each, bytes) for each in sources) else ():
            kind = _BYTES if isinstance(source, bytes) else _PATHS
            found += self._ask(kind, [source], seconds, _raster)
        return found or self._ask(_PATHS, sources, seconds, _raster)

    def close(self) -> None:
        """Ends the process."""
        self._end()
        self._process = None

    def _ask(
        self, kind: bytes, sources: Sequence[ImageSource], seconds: int, read: Callable[[bytes], Answer]
    ) -> list[Answer | PictureError]:
        """The answers in order. A picture that ends the process is refused; a new one goes on with those behind it."""
        answers: list[Answer | PictureError] = []
        while len(answers) < len(sources):
            left = sources[len(answers) :][:GROUP]
            try:
                self._send(kind, left, seconds)
                for _ in left:
                    answers.append(self._answer(seconds, read))
            except PictureError as error:
                answers.append(error)
        return answers

    def _send(self, kind: bytes, sources: Sequence[ImageSource], seconds: int) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        content = sources[0] if kind == _BYTES else b"\0".join(os.fsencode(str(source)) for source in sources)
        assert isinstance(content, bytes)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told by the answer that does not come
            self._connection.send_bytes(_REQUEST.pack(kind, seconds) + content)

    def _answer(self, seconds: int, read: Callable[[bytes], Answer]) -> Answer | PictureError:
        assert self._process is not None
        try:
            if not self._connection.poll(max(PATIENCE, 2 * seconds)):
                self.close()
                raise PictureError(f"took more than {max(PATIENCE, 2 * seconds):g} s to read and decode")
            frame = self._connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            self.close()
            if status == -signal.SIGXCPU:
                raise PictureError(f"takes more than {seconds} s of computing to decode") from None
            raise PictureError(f"ended the process that decoded it (status {status})") from None
        return read(frame[1:]) if frame[:1] == _TAKEN else PictureError(frame[1:].decode(errors="replace"))

    def _start(self) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        # Where modules are found, and nothing else: no password, no token.
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH") if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 this very program
                [sys.executable, "-P", "-m", "encoders.content.decoders", str(theirs.fileno()), *self._options],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env={**kept, "PYTHONPATH": os.pathsep.join(sys.path)},
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self._end = weakref.finalize(self, _kill, self._process, self._connection)
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._connection.poll(START_SECONDS) and self._connection.recv_bytes() == _TAKEN:
                return
        self.close()
        raise UserError(
            "the process that decodes pictures does not start: see what it said on stderr, and `polytower doctor`"
        )


class Decoders:
    """Decoding processes side by side, each started when it is first needed.

    count: at most so many; None: one per core but one, at most 8. edge, square: as in Decoder.
    """

    def __init__(self, count: int | None, edge: int, square: int = 0) -> None:
        self.count = count or max(1, min(8, (os.cpu_count() or 1) - 1))
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(self.count):
            self._free.put(Decoder(edge, square))

    def check(self, paths: Sequence[Path]) -> Iterator[str | PictureError]:
        """As Decoder.check, side by side, in order."""
        groups = (paths[start : start + GROUP] for start in range(0, len(paths), GROUP))
        for answers in self.map(groups, lambda decoder, group: decoder.check(group)):
            yield from answers

    def decode(self, sources: Sequence[ImageSource], seconds: int = SECONDS) -> list[Image.Image | PictureError]:
        """As Decoder.decode, by one process, in this thread."""
        return self._run(lambda decoder, given: decoder.decode(given, seconds), sources)

    def map(self, tasks: Iterable["Task"], work: Callable[[Decoder, "Task"], "Result"]) -> Iterator["Result"]:
        """The results of work(decoder, task) in order; reads four tasks ahead for each process."""
        running: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.count, "pictures") as threads:
            try:
                for task in tasks:
                    running.append(threads.submit(self._run, work, task))
                    if len(running) > 4 * self.count:
                        yield running.popleft().result()
                while running:
                    yield running.popleft().result()
            finally:
                for future in running:
                    future.cancel()

    def close(self) -> None:
        """Ends the processes that are not at work."""
        with contextlib.suppress(queue.Empty):
            for _ in range(self.count):
                decoder = self._free.get_nowait()
                decoder.close()

    def _run(self, work: Callable[[Decoder, "Task"], "Result"], task: "Task") -> "Result":
        decoder = self._free.get()
        try:
            return work(decoder, task)
        finally:
            self._free.put(decoder)


Task = TypeVar("Task")
Result = TypeVar("Result")


def _raster(answer: bytes) -> Image.Image:
    return Image.frombytes("RGB", _SIZE.unpack_from(answer), answer[_SIZE.size :])


def _kill(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def serve(connection: Connection, edge: int, square: int) -> None:
    """The child: answers until the parent's end closes."""
    limit_memory(MEMORY)
    connection.send_bytes(_TAKEN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            request = connection.recv_bytes()
            kind, seconds = _REQUEST.unpack_from(request)
            content = request[_REQUEST.size :]
            for source in [content] if kind == _BYTES else content.split(b"\0"):
                limit_time(seconds)
                connection.send_bytes(_answer(kind, source, edge, square))


def _answer(kind: bytes, source: bytes, edge: int, square: int) -> bytes:
    try:
        content = source if kind == _BYTES else read_picture(Path(os.fsdecode(source)))
        image = open_picture(content, edge)
        if kind == _CHECK:
            return _TAKEN + hashlib.sha256(content).hexdigest().encode()
        if square:
            image = image.resize((square, square), Image.Resampling.BICUBIC, reducing_gap=2.0)
        return _TAKEN + _SIZE.pack(*image.size) + image.tobytes()
    except PictureError as error:
        return _REFUSED + str(error).encode()
    except MemoryError:
        return _REFUSED + f"needs more than {MEMORY >> 20:,} MiB of memory to decode".encode()


def limit_memory(more: int) -> None:
    """This process may take so many bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_time(seconds: int) -> None:
    """From now on this process may compute for so long, in whole seconds; then the kernel ends it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """python -m encoders.content.decoders FD EDGE SQUARE"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer; its end ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What libtiff and libjpeg say of a broken file stands in the answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    descriptor, edge, square = map(int, sys.argv[1:])
    serve(Connection(descriptor), edge, square)


if __name__ == "__main__":
    main()
