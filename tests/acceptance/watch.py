"""Peak memory of the processes that a step starts, as the kernel counts it; Postgres apart."""

import threading
from pathlib import Path

import psutil

INTERVAL = 0.25


class Watch:
    """Looks at all descendants of this process, and at Postgres, until it is closed.

    Shared memory is in neither: of a process the largest resident set, of Postgres the private memory of all backends
    together (an index is built in it).
    """

    def __init__(self, postmaster: Path) -> None:
        """postmaster: the server's postmaster.pid, which need not be there yet."""
        self._postmaster = postmaster
        self._peaks = {"ours": 0, "postgres": 0}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def since_last(self) -> dict[str, int]:
        """Peaks in MB since the last call: {"ours": of the largest process, "postgres": of all backends}."""
        self._look()
        peaks, self._peaks = self._peaks, {"ours": 0, "postgres": 0}
        return {name: kilobytes // 1024 for name, kilobytes in peaks.items()}

    def close(self) -> None:
        """Looks no longer."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        ours = [_kilobytes(each.pid, "VmHWM") for each in psutil.Process().children(recursive=True)]
        backends = [_kilobytes(pid, "RssAnon") for pid in self._backends()]
        peaks = self._peaks
        peaks["ours"] = max(peaks["ours"], *ours, 0)
        peaks["postgres"] = max(peaks["postgres"], sum(backends))

    def _backends(self) -> list[int]:
        try:
            server = psutil.Process(int(self._postmaster.read_text().split()[0]))
            return [each.pid for each in server.children()]
        except (OSError, IndexError, ValueError, psutil.Error):
            return []


def _kilobytes(pid: int, field: str) -> int:
    """A size from /proc; 0 for a process that is gone, and where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
