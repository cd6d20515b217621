"""kill −9 at random moments over every step of the flow, and under it: is anything lost, is anything stuck?

    make test-faults ROUNDS=100 [SEED=7]
    python -m tests.faults --rounds 20 --only load --only postgres-load

Each round: some new data, a command, a moment drawn evenly over the work that the command was measured to do, kill −9
of the command (or of Postgres under it), the same command again, and a check of everything against the harness's own
ledger of what had been acknowledged. Ends with `rounds=N lost=0 stuck=0 live_generations=1` and status 0, or with
what was found and status 1.
"""

import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random, SystemRandom

import click

from tests.faults import checks
from tests.faults.data import Batches
from tests.faults.ledger import Ledger
from tests.faults.rounds import Field, Round, home_in, prepare, steps

KINDS = (
    "load", "encode", "train", "build", "promote", "serve", "first-start", "postgres-load", "postgres-materialize",
    "postgres-serve",
)  # fmt: skip


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="How many kills.")
@click.option("--seed", type=int, help="Draws the same kinds and moments again [default: a new one, printed].")
@click.option("--only", type=click.Choice(KINDS), multiple=True, help="These kinds alone (repeatable).")
@click.option("--keep", is_flag=True, help="Leave the home where it is, to look into it.")
def main(rounds: int, seed: int | None, only: tuple[str, ...], keep: bool) -> None:
    """Kills, runs again, and checks; see the module."""
    seed = SystemRandom().randrange(10**6) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="polytower-faults-"))
    field = Field(home_in(folder), Ledger(), Batches(folder / "data", seed), Random(seed))
    print(f"seed {seed}, {rounds} rounds, home {field.home.folder}", flush=True)
    started = time.monotonic()
    try:
        played = _play(field, _order(field.random, only or KINDS, rounds))
        with field.home.connect() as connection:
            live = checks.live_generations(connection)
    finally:
        field.home.close()
        field.home.sweep()
        field.home.server.stop()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.monotonic() - started:.0f} s; killed in:")
    for (step, phase), count in sorted(Counter((each.step, each.phase) for each in played).items()):
        print(f"  {step:24} {phase:52} {count}")
    sys.exit(verdict(played, live))


def _order(random: Random, kinds: tuple[str, ...], rounds: int) -> list[str]:
    """Each kind as often as the others, shuffled within each turn."""
    order: list[str] = []
    while len(order) < rounds:
        turn = list(kinds)
        random.shuffle(turn)
        order += turn
    return order[:rounds]


def _play(field: Field, order: list[str]) -> list[Round]:
    faults = prepare(field)
    print("measured: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in field.seconds.items()), flush=True)
    if faults:
        raise SystemExit(f"nothing was killed yet, and still: {[fault.text for fault in faults]}")
    kinds = steps(field)
    played = []
    for number, kind in enumerate(order, 1):
        found = kinds[kind]()
        played.append(found)
        print(
            f"{number:4} {found.step:24} {found.phase:44} at {found.moment:6.3f} s  killed {found.killed:28}"
            f" recovered in {found.recovered:5.1f} s  {'ok' if not found.faults else 'FAULT'}",
            flush=True,
        )
        for fault in found.faults:
            print(f"       {fault.kind}: {fault.text}", flush=True)
    return played


def verdict(played: list[Round], live: int) -> int:
    """Prints the last line of all; the exit status: 0 when nothing was found and one generation is live."""
    kinds = Counter(fault.kind for each in played for fault in each.faults)
    if kinds["live"]:
        print(f"rounds that did not find exactly one live generation: {kinds['live']}")
    print(f"rounds={len(played)} lost={kinds['lost']} stuck={kinds['stuck']} live_generations={live}")
    return int(bool(kinds.total()) or live != 1)


if __name__ == "__main__":
    main()
