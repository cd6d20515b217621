"""SIGTERM ends a command as Ctrl-C does: what is open is closed, locks and leases go back, children end with it."""

import os
import signal
import subprocess
from contextlib import suppress
from types import FrameType

import psutil

# Seconds that a program which was asked to end may take.
PATIENCE = 15.0

_received: list[int] = []
# Dagster puts its own handlers in the place of ours while it runs; the numbers of the signals still come in here.
_numbers, _noted = os.pipe()


def heed() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, too."""
    for end in (_numbers, _noted):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(_noted, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _interrupt)


def terminated() -> bool:
    """Whether a SIGTERM came."""
    with suppress(BlockingIOError):
        _received.extend(os.read(_numbers, 4096))
    return signal.SIGTERM in _received


def run(command: list[str], environment: dict[str, str], *, interactive: bool) -> int:
    """Runs another program in the foreground and answers its exit status; it does not outlive us, nor do its children.

    interactive: Ctrl-C is the program's own affair.
    """
    with subprocess.Popen(command, env=environment) as child:  # noqa: S603 - the user's own command
        while True:
            try:
                status = child.wait()
            except KeyboardInterrupt:
                if interactive and not terminated():
                    continue
                _end(child)
                raise
            return status if status >= 0 else 128 - status


def _end(child: "subprocess.Popen[bytes]") -> None:
    try:
        family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        _ask(each)
    _, stubborn = psutil.wait_procs(family, timeout=PATIENCE)
    for each in stubborn:
        each.kill()


def _ask(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.terminate()


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt
