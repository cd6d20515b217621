"""Seconds and peak memory of each step of the product path, by number of users, and how they grow.

    make bench-flow                                       # 10⁴, 10⁵ and 10⁶ users → benchmarks/results/flow.json
    python -m benchmarks.flow --users 10000 100000 --json

Generated users of five events each in the mean, one item for fifty of them (with attributes, no text, no pictures) go
through the commands that a user types, each a process of its own, over a Postgres of their own: load, materialize,
feast materialize, evaluate, and questions. Preset tiny, with {NEGATIVES} sampled negatives, since a softmax over the
whole catalogue would grow with users times items. Seconds of a step are its own: what it calls that is a step itself
is left out, and what is no step (imports, Dagster) stands in a line of its own. CPU seconds are those of the command's
processes and of Postgres together: other programs on the machine change them little. Memory is the peak of the
proportional set size (PSS: shared pages are divided among those who share them) of the command's whole process tree,
and told apart that of Postgres with its shared buffers, sampled while the step ran. The slope is that of log CPU
seconds over log users, between neighbouring sizes: 1 is linear.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.generated import item_id, user_id, write_folder
from polytower.postgres import EmbeddedPostgres, connect

RESULTS = Path(__file__).parent / "results" / "flow.json"
NEGATIVES = 128
FEWEST_ITEMS = 200
QUESTIONS = 500
# Seconds between two samples: at first, and for each second that a command has run, since looking has its price, too.
PAUSE, PAUSE_GROWS = 0.2, 0.01
# Below so many seconds a slope tells of the clock and of other programs.
MEASURABLE = 0.5
WHOLE = "the whole flow"
CHECKS = ("expectations", "content gates", "gates")


@dataclass
class Step:
    """seconds and cpu_seconds without the steps inside; the peaks in MiB."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: int = 0
    postgres_mib: int = 0


@dataclass
class Watch:
    """Looks at a process tree and at Postgres' until it is stopped.

    samples: (time, MiB, MiB of Postgres, CPU seconds of both so far).
    """

    process: int
    postgres: int
    samples: list[tuple[float, float, float, float]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        begun = time.time()
        while not self.stopped.wait(min(PAUSE + PAUSE_GROWS * (time.time() - begun), 10 * PAUSE)):
            (mib, cpu), (postgres_mib, postgres_cpu) = _tree(self.process), _tree(self.postgres)
            if cpu:
                self.samples.append((time.time(), mib, postgres_mib, cpu + postgres_cpu))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(NEGATIVES=NEGATIVES), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--keep", action="store_true", help="keep other sizes that the results hold")
    parser.add_argument("--into", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--data", type=Path, help="folder for data and database (default: a temporary one)")
    arguments = parser.parse_args()
    sizes = {}
    for users in sorted(arguments.users):
        with TemporaryDirectory(prefix="polytower-flow-", dir=arguments.data) as home:
            sizes[str(users)] = run(Path(home), users)
    if arguments.keep and arguments.into.exists():
        sizes = json.loads(arguments.into.read_text())["sizes"] | sizes
    sizes = dict(sorted(sizes.items(), key=lambda pair: int(pair[0])))
    report = {"slopes": slopes(sizes), "sizes": sizes}
    arguments.into.parent.mkdir(exist_ok=True)
    arguments.into.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report) if arguments.json else table(report))


def run(home: Path, users: int) -> dict[str, Any]:
    """The whole path for so many users."""
    items = max(FEWEST_ITEMS, users // 50)
    events = write_folder(home / "data", users, items)
    server = EmbeddedPostgres(home / "home" / "postgres")
    url = server.acquire()
    try:
        flow = Flow(home, int((server.data / "postmaster.pid").read_text().split()[0]))
        flow.command("load", "load", str(home / "data"))
        flow.command("materialize", "materialize", "--preset", "tiny", "--set", f"negatives={NEGATIVES}")
        flow.command("feast", "feast")
        flow.command("evaluate", "evaluate", "--json")
        flow.command("retrieve", "retrieve", user_id(0), "--json")
        questions = _questions(url, users)
        with connect(url) as connection:
            size = connection.execute("select pg_database_size(current_database()) >> 20").fetchone()
    finally:
        server.release()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python -m benchmarks.flow --users {users}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}",
        "items": items,
        "events": events,
        "database_mib": size[0] if size else None,
        "seconds": round(sum(step.seconds for step in flow.steps.values()), 1),
        "cpu_seconds": round(whole := sum(step.cpu_seconds for step in flow.steps.values()), 1),
        "checks_share": round(sum(flow.steps[name].cpu_seconds for name in CHECKS) / whole, 3),
        "peak_mib": max(step.peak_mib for step in flow.steps.values()),
        "steps": {name: _rounded(step) for name, step in flow.steps.items()},
        "retrieval_ms": questions,
    }


def _rounded(step: Step) -> dict[str, Any]:
    return {**vars(step), "seconds": round(step.seconds, 2), "cpu_seconds": round(step.cpu_seconds, 2)}


class Flow:
    """Runs commands over one home and keeps what their steps took."""

    def __init__(self, home: Path, postgres: int) -> None:
        self.home, self.postgres = home, postgres
        self.steps: dict[str, Step] = {}

    def command(self, name: str, *arguments: str) -> None:
        """One command with all its steps; what is no step of its own counts under the command's name."""
        log = self.home / f"{arguments[0]}.log"
        environment = {**os.environ, "POLYTOWER_HOME": str(self.home / "home")}
        environment.pop("POLYTOWER_DATABASE_URL", None)
        begun = time.time()
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.spans", str(log), *arguments],
            env=environment, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        cpu_before = _tree(self.postgres)[1]
        watch = Watch(process.pid, self.postgres)
        watcher = threading.Thread(target=watch.look)
        watcher.start()
        code = process.wait()
        watch.stopped.set()
        watcher.join()
        if code:
            raise SystemExit(f"polytower {' '.join(arguments)} ended with status {code}")
        spans = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        outer = {"step": f"{name}: rest", "begun": begun, "ended": time.time()}
        own = own_seconds([*spans, outer])
        for step, seconds in own.items():
            self.steps.setdefault(step, Step()).seconds += seconds
        before = {step: self.steps[step].cpu_seconds for step in own}
        for moment, mib, postgres_mib, cpu in watch.samples:
            step = self.steps[innermost([*spans, outer], moment)]
            step.peak_mib = max(step.peak_mib, round(mib))
            step.postgres_mib = max(step.postgres_mib, round(postgres_mib))
            step.cpu_seconds += cpu - cpu_before
            cpu_before = cpu
        for step, seconds in own.items():  # a large run takes hours: what is known is told
            cpu, peak = self.steps[step].cpu_seconds - before[step], self.steps[step].peak_mib
            print(f"{step}: {cpu:.1f} s of CPU, {seconds:.1f} s, {peak} MiB", file=sys.stderr, flush=True)


def own_seconds(spans: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by step, without those of the spans inside."""
    found: dict[str, float] = {}
    for span in sorted(spans, key=lambda span: span["begun"]):
        found.setdefault(span["step"], 0.0)
        found[span["step"]] += span["ended"] - span["begun"]
        around = [other for other in spans if other is not span and _around(other, span)]
        if around:
            found[max(around, key=lambda other: other["begun"])["step"]] -= span["ended"] - span["begun"]
    return found


def innermost(spans: list[dict[str, Any]], moment: float) -> str:
    """The step that ran at a moment: the last one begun of those that had not ended."""
    running = [span for span in spans if span["begun"] <= moment <= span["ended"]]
    return str(max(running or spans, key=lambda span: span["begun"])["step"])


def _around(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    return bool(outer["begun"] <= inner["begun"] and inner["ended"] <= outer["ended"])


def _tree(pid: int) -> tuple[float, float]:
    """MiB of a process and all below it, and the CPU seconds of these and of the children that it has buried."""
    mib = cpu = 0.0
    try:
        root = psutil.Process(pid)
        cpu = root.cpu_times().children_user + root.cpu_times().children_system
        tree = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0.0, 0.0
    for process in tree:
        try:
            times = process.cpu_times()
            mib += process.memory_full_info().pss / 2**20
        except (psutil.Error, OSError):  # it ended meanwhile
            continue
        cpu += times.user + times.system
    return mib, cpu


def _questions(url: str, users: int) -> dict[str, float]:
    """Milliseconds of one question in SQL, by user and by item: median and 99th percentile of many, spread over all."""
    chosen = [users * n // QUESTIONS for n in range(QUESTIONS)]
    seconds = []
    with connect(url, autocommit=True) as connection:
        for number in chosen:
            begun = time.perf_counter()
            found = connection.execute("select item_id from retrieve(%s, 100)", [user_id(number)]).fetchall()
            seconds.append(time.perf_counter() - begun)
            assert found, f"user {number} got no answer"
        connection.execute("select * from similar_items(%s, 10)", [item_id(0)]).fetchall()
    seconds.sort()
    return {"p50": round(seconds[len(seconds) // 2] * 1e3, 2), "p99": round(seconds[-len(seconds) // 100] * 1e3, 2)}


def slopes(sizes: dict[str, Any]) -> dict[str, list[float | None]]:
    """Step → slope of CPU seconds between neighbouring sizes; None where the shorter time is too short to tell."""
    found: dict[str, list[float | None]] = {}
    for (small, before), (large, after) in pairwise(sizes.items()):
        growth = math.log(int(large) / int(small))
        steps = after["steps"] | {WHOLE: after}
        for name, step in steps.items():
            one = (before["steps"] | {WHOLE: before}).get(name, {"cpu_seconds": 0.0})["cpu_seconds"]
            told = one >= MEASURABLE
            found.setdefault(name, []).append(round(math.log(step["cpu_seconds"] / one) / growth, 2) if told else None)
    return found


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: CPU seconds (seconds), MiB of the command + of Postgres, by size, and the slopes."""
    sizes = report["sizes"]
    rows = [["step", *(f"{int(size):,} users" for size in sizes), "slopes"]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name in [*next(reversed(sizes.values()))["steps"]]:
        steps = [document["steps"].get(name) for document in sizes.values()]
        rows.append([name, *map(_cell, steps), _shown(report["slopes"].get(name, []))])
    whole = [f"{d['cpu_seconds']:,.0f} s ({d['seconds']:,.0f}), {d['peak_mib']:,}" for d in sizes.values()]
    rows.append([WHOLE, *whole, _shown(report["slopes"].get(WHOLE, []))])
    rows.append(["checks and gates, share", *(f"{d['checks_share']:.1%}" for d in sizes.values()), ""])
    rows.append(["one question, p50", *(f"{d['retrieval_ms']['p50']} ms" for d in sizes.values()), ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(step: dict[str, Any] | None) -> str:
    if step is None:
        return ""
    memory = f"{step['peak_mib']:,} + {step['postgres_mib']:,}" if step["peak_mib"] else "–"  # over before a look
    return f"{step['cpu_seconds']:,.1f} s ({step['seconds']:,.1f}), {memory}"


def _shown(slopes_of_step: list[float | None]) -> str:
    return ", ".join("–" if slope is None else f"{slope:.2f}" for slope in slopes_of_step)


if __name__ == "__main__":
    main()
