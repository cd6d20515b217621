"""What must hold after a round: nothing lost, nothing stuck, one generation live, questions answered."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from serving import queries
from serving.question import Question
from tests.faults.data import USERS
from tests.faults.home import APPLICATION, Home
from tests.faults.ledger import Ledger, event

# Seconds that what belongs to a killed process may take to notice: decoders look every few seconds.
GRACE = 12.0

EVENTS = "select user_id, item_id, occurred_at, event_id from interactions"
GONE_ITEMS = """
select wanted from unnest(%(items)s::text[]) wanted
where not exists (select from items where item_id = wanted and image_sha256 <> '')
"""
NOT_ENCODED = """
select item_id from items i
where not exists (
    select from content_embeddings e join content_encoders c using (modality, revision)
    where c.active and modality = 'image' and e.item_id = i.item_id and e.content_hash = i.image_sha256)
"""
NOT_PLACED = """
select item_id from items
where not exists (
    select from item_embeddings e join live_generation using (generation) where e.item_id = items.item_id)
"""
LIVE = """
select array(select generation from generations where state = 'live'),
       array(select generation from promotions where live_until is null),
       (select bool_or(live_at is not null) from generations)
"""
LEFTOVER_TABLES = """
select relname from pg_class join pg_namespace n on n.oid = relnamespace
where nspname = 'polytower' and relkind = 'r' and (
    relname ~ '^(item_embeddings|user_interests)_g[0-9]+$' and not exists (
        select from generations where state in ('ready', 'live', 'retired')
        and generation = substring(relname from '[0-9]+$')::bigint)
    or relname ~ '^(item_embeddings|user_interests)_g[0-9]+$|^interactions_y[0-9]+$' and not relispartition)
"""
UNFINISHED = """
select 'generation ' || generation from generations where state = 'building'
union all select 'load ' || load_id from loads where state = 'running'
"""
LOCKS = """
select a.pid, left(a.query, 60) from pg_locks l join pg_stat_activity a using (pid)
where l.locktype = 'advisory' and a.datname = current_database() and a.application_name <> %(own)s
"""


@dataclass(frozen=True)
class Fault:
    """What a round found. kind: lost (data, or the answer), stuck (somebody has to come and mend it), live."""

    kind: Literal["lost", "stuck", "live"]
    text: str


def data(connection: psycopg.Connection[Any], ledger: Ledger) -> list[Fault]:
    """Events and items against the ledger."""
    found = Counter(event(*row) for row in connection.execute(EVENTS))
    faults = [Fault("lost", text) for text in ledger.compare(found)]
    gone = connection.execute(GONE_ITEMS, {"items": sorted(ledger.items)}).fetchall()
    if gone:
        faults.append(Fault("lost", f"{len(gone)} acknowledged items (or their pictures) are gone, such as {gone[0]}"))
    return faults


def generation(connection: psycopg.Connection[Any]) -> list[Fault]:
    """One live generation (none before the first promotion), the promotions' log says the same."""
    row = connection.execute(LIVE).fetchone()
    assert row is not None
    live, promoted, ever = row
    if not ever and not live:
        return []
    if len(live) != 1:
        return [Fault("live", f"live generations: {live}")]
    return [] if promoted == live else [Fault("live", f"generation {live} is live, the promotions say {promoted}")]


def live_generations(connection: psycopg.Connection[Any]) -> int:
    """How many there are."""
    row = connection.execute("select count(*) from generations where state = 'live'").fetchone()
    assert row is not None
    return int(row[0])


def answers(connection: psycopg.Connection[Any]) -> list[Fault]:
    """Three users get candidates from the live generation."""
    faults = []
    for user in ("u0", f"u{USERS // 2}", f"u{USERS - 1}"):
        try:
            found = queries.retrieve(connection, Question(user_id=user, k=5, exclude_seen=False))
        except psycopg.Error as error:
            faults.append(Fault("lost", f"no answer for {user}: {error}"))
            continue
        if len(found) != 5:
            faults.append(Fault("lost", f"{len(found)} candidates for {user}"))
    return faults


def complete(connection: psycopg.Connection[Any], *, placed: bool) -> list[Fault]:
    """Every picture is encoded; with `placed`, every item is in the live generation."""
    faults = []
    for statement, what in ((NOT_ENCODED, "without its picture's embedding"), (NOT_PLACED, "not in the generation")):
        missing = connection.execute(statement).fetchall() if placed or statement is NOT_ENCODED else []
        if missing:
            faults.append(Fault("lost", f"{len(missing)} items are {what}, such as {missing[0][0]}"))
    return faults


def leftovers(connection: psycopg.Connection[Any], home: Home) -> list[Fault]:
    """Tables, rows and files that nobody will ever finish or remove."""
    faults = [f"the table {name} is left over" for (name,) in connection.execute(LEFTOVER_TABLES)]
    faults += [f"{what} is unfinished, and nobody works on it" for (what,) in connection.execute(UNFINISHED)]
    checkpoints = home.folder / "checkpoints"
    faults += [f"{path.relative_to(home.folder)} is left over" for path in checkpoints.rglob("*.partial*")]
    unfinished = [path for path in checkpoints.glob("*/") if not (path / "summary.json").exists()]
    faults += [f"the checkpoint {path.name} is unfinished" for path in unfinished]
    return [Fault("stuck", text) for text in faults]


def orphans(home: Home, keep: frozenset[int] = frozenset(), grace: float = GRACE) -> list[Fault]:
    """Processes, connections and locks that outlive their command. keep: processes that are meant to be there."""

    def processes() -> list[str]:
        return [
            f"process {each.pid} outlives its command: {' '.join(each.cmdline())[:80]}"
            for each in home.processes()
            if each.pid not in keep
        ]

    def connections() -> list[str]:
        return [f"connection {pid} is {state}: {query[:60]!r}" for pid, state, query in home.statements()]

    def locks() -> list[str]:
        with home.connect() as connection:
            held = connection.execute(LOCKS, {"own": APPLICATION}).fetchall()
        return [f"connection {pid} still holds a lock: {query!r}" for pid, query in held]

    looks = [processes] if keep else [processes, connections, locks]
    return [Fault("stuck", text) for look in looks for text in settled(look, grace)]


def settled(look: Callable[[], list[str]], grace: float) -> list[str]:
    """What is still there after the grace."""
    until = time.monotonic() + grace
    while (found := look()) and time.monotonic() < until:
        time.sleep(0.05)
    return found
