"""python -m tests.acceptance [--data DIR [--images DIR]] [--preset NAME] [--json]: runs all steps, prints a table.

Ends with status 1 at the first step that fails, and tells what was seen. What it made is gone afterwards.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from polytower.commands.output import table
from polytower.settings import settings
from tests.acceptance import asking, beginning, changing, features, generated
from tests.acceptance.folder import read
from tests.acceptance.watch import Watch
from tests.acceptance.world import POLYTOWER, StepError, World

STEPS: tuple[Callable[[World], None], ...] = (
    beginning.initialise,
    beginning.load,
    beginning.load_again,
    beginning.materialize,
    beginning.evaluate,
    asking.serve,
    asking.users,
    asking.merges,
    asking.narrowed,
    asking.vectors,
    asking.histories,
    asking.contents,
    asking.batches,
    asking.neighbours,
    features.feast,
    features.ranked,
    changing.posted,
    changing.load_changes,
    changing.second_generation,
    changing.new_item,
    changing.new_users,
    changing.roll_back,
    changing.restart,
    changing.end,
)


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a contract folder (default: generated data)")
    parser.add_argument("--images", type=Path, help="the folder of its pictures")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON line")
    arguments = parser.parse_args()
    home = Path(mkdtemp(prefix="polytower-accept-"))
    os.environ.pop("POLYTOWER_DATABASE_URL", None)
    os.environ["POLYTOWER_HOME"] = str(home)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    watch = Watch(settings().postgres_dir / "data" / "postmaster.pid")
    world = None
    try:
        world = _world(home, arguments)
        rows, failure = _run(world, watch)
    finally:
        watch.close()
        _clear(home, world)
    print(_report(rows, failure))
    if arguments.json:
        print(json.dumps({"steps": rows, "failure": failure}, default=str))
    return 1 if failure else 0


def _world(home: Path, arguments: argparse.Namespace) -> World:
    folder, images = arguments.data, arguments.images
    if folder is None:
        folder = generated.write(home / "data")
        images = folder / "images"
    facts = read(folder)
    options = {"towers.user_attributes": 32} if facts.described_users else {}
    return World(home, folder, images, arguments.preset, arguments.data is None, facts, options)


def _run(world: World, watch: Watch) -> tuple[list[dict[str, Any]], str]:
    """A row for each step that was run, and what the last of them failed with, if it did."""
    rows: list[dict[str, Any]] = []
    watch.since_last()
    for step in STEPS:
        name, failure = step.__name__.replace("_", " "), ""
        started, computed = time.monotonic(), _computed()
        try:
            step(world)
        except StepError as error:
            failure = f"{name}: {error}"
        except Exception as error:
            failure = f"{name}: {type(error).__name__}: {error}"
        seconds, cpu = round(time.monotonic() - started, 1), round(_computed() - computed, 1)
        row = {"step": name, "seconds": seconds, "cpu_seconds": cpu, "peak_mb": watch.since_last(), "seen": world.seen}
        rows.append(row)
        print(f"{seconds:7.1f} s  {name}", file=sys.stderr, flush=True)
        world.seen = {}
        if failure:
            return rows, failure
    return rows, ""


def _computed() -> float:
    """Processor time of this process and of all that it waited for: on a busy machine it says more than a clock."""
    return sum(os.times()[:4])


def _report(rows: list[dict[str, Any]], failure: str) -> str:
    lines = [
        (
            row["step"],
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            row["peak_mb"]["ours"],
            row["peak_mb"]["postgres"],
            _told(row["seen"]),
        )
        for row in rows
    ]
    total = sum(row["seconds"] for row in rows)
    title = f"FAILED at {failure}" if failure else f"accepted, {len(rows)} steps in {total:.0f} s"
    return "\n".join([table(lines, ["step", "s", "CPU s", "MB", "MB of Postgres", "seen"]), title])


def _told(seen: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in seen.items()
    )


def _clear(home: Path, world: World | None) -> None:
    """Whatever happened: no server, no Postgres, no files."""
    try:
        if world is not None and world.server is not None:
            world.server.stop()
    finally:
        subprocess.run([POLYTOWER, "db", "stop"], check=False)
        shutil.rmtree(home)


if __name__ == "__main__":
    raise SystemExit(main())
