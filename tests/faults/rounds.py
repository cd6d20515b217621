"""One round each: prepare, run, kill, look, run again, look."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.load.folder import load_folder
from polytower.errors import UserError
from polytower.postgres import connect
from tests.faults import checks
from tests.faults.checks import Fault
from tests.faults.data import Batch, Batches
from tests.faults.home import Command, Home
from tests.faults.ledger import Ledger
from tests.faults.steps import BUILD, ENCODE, LOAD, MATERIALIZE, PROMOTE, STEPS, TRAIN, Step, ended_well, phase

# Seconds that any run may take before it counts as stuck: this, or several times a whole flow on this machine.
BOUND = 120.0
FLOWS = 6
# A command that ended before the moment came is run once more, on new data.
TRIES = 4
# Generations whose vectors are kept from round to round.
KEPT = 4


@dataclass
class Round:
    """What happened in one round. moment: seconds since the work began. recovered: seconds of the run after it."""

    step: str
    phase: str = ""
    moment: float = 0.0
    killed: str = ""
    recovered: float = 0.0
    faults: list[Fault] = field(default_factory=list)


@dataclass
class Field:
    """What rounds are played on. seconds: of each step's work, as measured; bound: after which a run is stuck."""

    home: Home
    ledger: Ledger
    batches: Batches
    random: Random
    seconds: dict[str, float] = field(default_factory=dict)
    bound: float = BOUND


def prepare(field: Field) -> list[Fault]:
    """First start, load, a whole flow and a rollback, each measured; nothing is killed."""
    home = field.home
    init, started = Command(home, "init"), time.monotonic()
    init.wait(10 * BOUND)
    field.seconds |= {"first start": time.monotonic() - started, "serve": 2.0}
    home.server.acquire()
    batch = field.batches.write(items=40, edge=LOAD.edge, events=LOAD.events)
    group = field.ledger.send(batch.events)
    load = Command(home, *batch.arguments)
    field.seconds |= _measured(load, (LOAD,))
    field.ledger.acknowledge(group, batch.items)
    flow = Command(home, *MATERIALIZE)
    field.seconds |= _measured(flow, (ENCODE, TRAIN, BUILD))
    field.bound = max(BOUND, FLOWS * (time.monotonic() - flow.started))
    _second_generation(field)
    back = Command(home, "generations", "rollback")
    field.seconds |= _measured(back, (PROMOTE,))
    return [fault for command in (init, load, flow, back) for fault in ended_well(command)]


def _second_generation(field: Field) -> None:
    """Another one of the same checkpoint, with a few new events: something to roll back from."""
    _new_work(field, replace(BUILD, items=0))
    (checkpoint,) = (field.home.folder / "checkpoints").glob("*/")
    with connect(field.home.server.url) as connection:
        lifecycle.promote(connection, build(connection, checkpoint))


def _measured(command: Command, steps: tuple[Step, ...]) -> dict[str, float]:
    """Seconds from the begin to the end of each step's work, while the command runs to its end."""
    begun: dict[str, float] = {}
    ended: dict[str, float] = {}
    while not command.ended and time.monotonic() - command.started < 10 * BOUND:
        for step in steps:
            if step.name not in begun and command.shows(step.begin):
                begun[step.name] = time.monotonic()
            if step.end and step.name in begun and step.name not in ended and command.shows(step.end):
                ended[step.name] = time.monotonic()
        time.sleep(0.003)
    now = time.monotonic()
    return {name: ended.get(name, now) - start for name, start in begun.items()}


def killed_step(field: Field, step: Step, *, postmaster: bool = False) -> Round:
    """A load or one step of `materialize` (or Postgres under it) is killed, and run again."""
    found = Round(f"postgres under {step.name}" if postmaster else step.name)
    for _ in range(TRIES):
        batch, group = _new_work(field, step)
        command = Command(field.home, *step.command(batch))
        if _reached(field, step, command, found):
            break
        found.faults += ended_well(command)
        _acknowledge(field, step, batch, group)
    else:
        found.faults.append(Fault("stuck", f"{TRIES} runs ended before they could be killed"))
        return found
    if postmaster:
        found.killed = _kill_postmaster(field.home)
        if command.wait(field.bound) is None:
            found.faults.append(Fault("stuck", f"{step.name} waits for ever for a Postgres that died"))
            command.kill()
        found.faults += ended_well(command, (0, 1))
    else:
        command.kill()
        found.killed = f"process {command.process.pid}"
    with survivable(field, found):
        _again(field, found, step.command(batch))
        _acknowledge(field, step, batch, group)
        look(field, found, placed=step.placed)
    return found


def _new_work(field: Field, step: Step) -> tuple[Batch, frozenset[tuple[str, ...]]]:
    """A batch for the step to work on: only sent for a load, loaded already for what comes after."""
    batch = field.batches.write(items=step.items, edge=step.edge, events=step.events)
    group = field.ledger.send(batch.events)
    if step is not LOAD:
        with connect(field.home.server.url) as connection:
            load_folder(connection, batch.folder, batch.folder / "images")
        field.ledger.acknowledge(group, batch.items)
    return batch, group


def _acknowledge(field: Field, step: Step, batch: Batch, group: frozenset[tuple[str, ...]]) -> None:
    if step is LOAD:
        field.ledger.acknowledge(group, batch.items)


def _until(moment: float, command: Command) -> None:
    while time.monotonic() < moment and not command.ended:
        time.sleep(min(0.002, max(0.0, moment - time.monotonic())))


def _kill_postmaster(home: Home) -> str:
    pid = home.postmaster()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    home.close()
    return f"postmaster {pid}"


def _again(field: Field, found: Round, arguments: tuple[str, ...]) -> None:
    """The same command once more; what it waits for is told where it does not end."""
    command = Command(field.home, *arguments)
    seconds = command.wait(field.bound)
    if seconds is None:
        waits = "; ".join(f"{pid} {state}: {query[:80]!r}" for pid, state, query in field.home.statements())
        found.faults.append(
            Fault("stuck", f"{arguments[0]} does not end within {field.bound:.0f} s; connections: {waits}")
        )
        found.faults += checks.orphans(field.home, frozenset([command.process.pid]), grace=0)
        command.kill()
        field.home.sweep()
        _again_after(field, arguments)
        return
    found.recovered = seconds
    found.faults += ended_well(command)


def _again_after(field: Field, arguments: tuple[str, ...]) -> None:
    """Once what was stuck has been swept away: the rounds that follow begin on sound ground."""
    Command(field.home, *arguments).wait(field.bound)


@contextmanager
def survivable(field: Field, found: Round) -> Iterator[None]:
    """A look that fails is a fault of the round, not the end of all rounds; whatever was left is swept away."""
    try:
        yield
    except Exception as error:
        found.faults.append(Fault("stuck", f"{type(error).__name__}: {str(error).strip()[:300]}"))
    finally:
        field.home.sweep()


def look(field: Field, found: Round, *, placed: bool, keep: frozenset[int] = frozenset()) -> None:
    """All checks, on a connection of the harness's own."""
    found.faults += checks.orphans(field.home, keep)
    with field.home.connect() as connection:
        found.faults += checks.data(connection, field.ledger)
        found.faults += checks.generation(connection)
        found.faults += checks.answers(connection)
        found.faults += checks.leftovers(connection, field.home)
        if placed:
            found.faults += checks.complete(connection, placed=True)
    with connect(field.home.server.url) as connection:
        lifecycle.retain(connection, KEPT)


def killed_promotion(field: Field) -> Round:
    """`generations promote` or `rollback`: before, in, or after its one transaction."""
    with connect(field.home.server.url) as connection:
        past = [each.generation for each in lifecycle.listing(connection) if each.state in ("ready", "retired")]
        past = [number for number in past if lifecycle.has_partitions(connection, number)]
    back = field.random.random() < 0.5
    arguments = ("generations", *(("rollback",) if back else ("promote", str(field.random.choice(past)))))
    found = Round("rollback" if back else "promote")
    for _ in range(TRIES):
        command = Command(field.home, *arguments)
        if _reached(field, PROMOTE, command, found):
            break
    command.kill()
    found.killed = f"process {command.process.pid}"
    with survivable(field, found):
        _again(field, found, arguments)
        look(field, found, placed=False)
    return found


def _reached(field: Field, step: Step, command: Command, found: Round) -> bool:
    """Waits for a moment of the step's work; False when the command ended before it came."""
    moment = field.random.uniform(0.0, field.seconds[step.name])
    if command.wait_for(step.begin, field.bound):
        begun = time.monotonic()
        _until(begun + moment, command)
        found.moment = time.monotonic() - begun
    found.phase = phase(field.home, step)
    if not command.ended:
        return True
    field.seconds[step.name] *= 0.8  # it was slower when it was measured
    return False


def killed_first_start(field: Field) -> Round:
    """`init` of an empty home, alone or with all of its Postgres."""
    found = Round("first start")
    folder = field.home.folder.parent / f"first{field.random.getrandbits(32):08x}"
    home = Home(folder)
    everything = field.random.random() < 0.5
    command = Command(home, "init")
    while not (folder / "postgres").exists() and not command.ended:
        time.sleep(0.003)
    begun = time.monotonic()
    _until(begun + field.random.uniform(0.0, 0.8 * field.seconds["first start"]), command)
    found.phase, found.moment = first_start_phase(home), time.monotonic() - begun
    found.killed = f"process {command.process.pid}{' and its Postgres' if everything else ''}"
    command.kill()
    if everything:
        for each in home.postgres_processes():
            each.kill()
    fresh = Field(home, Ledger(), field.batches, field.random, bound=field.bound)
    with survivable(fresh, found):
        _again(fresh, found, ("init",))
        home.server.acquire()
        with home.connect() as connection:
            connection.execute("select from generations")
        found.faults += checks.orphans(home)
        home.close()
    try:
        home.server.stop()
        found.faults += _still_there(home)
    except (UserError, OSError) as error:
        found.faults.append(Fault("stuck", f"the Postgres of a first start does not stop: {str(error)[:200]}"))
    for each in home.postgres_processes():
        each.kill()
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _still_there(home: Home) -> list[Fault]:
    def processes() -> list[str]:
        return [f"Postgres {each.pid} of a first start is still there" for each in home.postgres_processes()]

    return [Fault("stuck", text) for text in checks.settled(processes, checks.GRACE)]


def first_start_phase(home: Home) -> str:
    """How far a first start is, by its files."""
    postgres = home.folder / "postgres"
    for path, what in (
        (postgres / "leases.json", "migration"), (postgres / "password", "database"),
        (postgres / "data" / "postmaster.pid", "Postgres starts"), (postgres / "port", "configuration"),
        (postgres / "data" / "PG_VERSION", "initdb"), (postgres, "before initdb"),
    ):  # fmt: skip
        if path.exists():
            return what
    return "before anything"


def steps(field: Field) -> dict[str, Callable[[], Round]]:
    """All kinds of rounds by name; a promotion comes after the first build."""
    from tests.faults.serve import killed_postgres_under_serve, killed_server

    under = field.random.choice
    return {
        "load": lambda: killed_step(field, LOAD),
        "encode": lambda: killed_step(field, ENCODE),
        "train": lambda: killed_step(field, TRAIN),
        "build": lambda: killed_step(field, BUILD),
        "promote": lambda: killed_promotion(field),
        "serve": lambda: killed_server(field),
        "first-start": lambda: killed_first_start(field),
        "postgres-load": lambda: killed_step(field, LOAD, postmaster=True),
        "postgres-materialize": lambda: killed_step(field, under(STEPS[1:]), postmaster=True),
        "postgres-serve": lambda: killed_postgres_under_serve(field),
    }


def home_in(folder: Path) -> Home:
    """An empty home below the folder."""
    return Home(folder / "home")
