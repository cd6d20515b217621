"""Generations: immutable bundles of item embeddings, user interests and the user tower, promoted as one.

building -> ready -> live -> retired, or failed. A generation's vectors lie in two partitions of their own (build.py
fills them), so nobody reads a half-built one and dropping one is a DROP TABLE.
"""

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from feature_repo.schema import SCHEMA, GenerationState
from pipelines.generation import seal
from pipelines.generation.meanings import MEANINGS
from polytower import locks
from polytower.errors import UserError

PARENTS = ("item_embeddings", "user_interests")

# Embeddings of the adapted encoders behind a generation, where no other one that has its vectors was built from them.
_FORGET_ADAPTED = """
delete from content_embeddings e using content_encoders c, generations mine
where mine.generation = %(generation)s and (c.modality, c.revision) = (e.modality, e.revision)
    and c.config ? 'adapter' and mine.config -> 'encoders' ->> c.modality = c.revision
    and not exists (
        select from generations other
        where other.generation <> mine.generation and other.config -> 'encoders' ->> c.modality = c.revision
            and to_regclass('polytower.item_embeddings_g' || other.generation) is not null)
"""


@dataclass(frozen=True)
class Generation:
    """A row of `generations`. trained_before: it knows no event at or after that moment; None knows all there were."""

    generation: int
    state: GenerationState
    dim: int
    interests: int
    config: dict[str, Any]
    metrics: dict[str, Any]
    quality: dict[str, Any]
    checkpoint_path: str | None
    checkpoint_sha256: str | None
    created_at: datetime
    ready_at: datetime | None
    live_at: datetime | None
    retired_at: datetime | None
    trained_before: datetime | None

    @property
    def recipe(self) -> tuple[str, dict[str, Any]]:
        """(preset, options) of the training behind it."""
        return self.config.get("preset", "demo"), self.config.get("options", {})

    def as_json(self) -> dict[str, Any]:
        """The same, with times as ISO strings."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(self).items()
        }


def listing(connection: psycopg.Connection[Any]) -> list[Generation]:
    """All generations, newest first."""
    with connection.cursor(row_factory=class_row(Generation)) as cursor:
        return cursor.execute("select * from generations order by generation desc limit 1000").fetchall()


def get(connection: psycopg.Connection[Any], generation: int) -> Generation:
    """One generation; UserError when there is none of that number."""
    with connection.cursor(row_factory=class_row(Generation)) as cursor:
        found = cursor.execute("select * from generations where generation = %s", [generation]).fetchone()
    if found is None:
        raise UserError(f"there is no generation {generation}; `polytower generations list` shows those that exist")
    return found


def live(connection: psycopg.Connection[Any]) -> Generation | None:
    """The live generation, if any."""
    with connection.cursor(row_factory=class_row(Generation)) as cursor:
        return cursor.execute("select * from live_generation").fetchone()


def begin(
    connection: psycopg.Connection[Any],
    *,
    dim: int,
    interests: int,
    config: dict[str, Any],
    metrics: dict[str, Any],
    checkpoint_path: str,
    checkpoint_sha256: str,
    trained_before: datetime | None = None,
) -> int:
    """Registers a new generation in state building, and sweeps what killed builds left behind.

    Returns its number. The caller holds the build lock (see `exclusive`).
    """
    for abandoned in connection.execute("select generation from generations where state = 'building'").fetchall():
        fail(connection, abandoned[0], "the build was interrupted")
    row = connection.execute(
        """insert into generations
               (dim, interests, config, metrics, checkpoint_path, checkpoint_sha256, trained_before)
           values (%s, %s, %s, %s, %s, %s, %s) returning generation""",
        [dim, interests, Jsonb(config), Jsonb(metrics), checkpoint_path, checkpoint_sha256, trained_before],
    ).fetchone()
    assert row is not None
    connection.commit()
    return int(row[0])


def fail(connection: psycopg.Connection[Any], generation: int, reason: str) -> None:
    """Marks a building generation as failed and drops its partitions."""
    _drop_partitions(connection, generation)
    connection.execute(
        "update generations set state = 'failed', quality = quality || %s where generation = %s and state <> 'live'",
        [Jsonb({"failure": reason}), generation],
    )
    connection.commit()


def partition(parent: str, generation: int) -> sql.Identifier:
    """Qualified name of a generation's partition."""
    return sql.Identifier(SCHEMA, f"{parent}_g{generation}")


def amends(connection: psycopg.Connection[Any]) -> None:
    """Lets the rest of the transaction change rows of generations that are built; everybody else is refused."""
    connection.execute("select set_config('polytower.amends_generation', 'on', true)")


def ready(connection: psycopg.Connection[Any], generation: int, quality: dict[str, Any]) -> None:
    """building -> ready, with the quality report that promotion will look at."""
    connection.execute(
        """update generations set state = 'ready', ready_at = now(), quality = %s
           where generation = %s and state = 'building'""",
        [Jsonb(quality), generation],
    )
    connection.commit()


def promote(connection: psycopg.Connection[Any], generation: int, *, force: bool = False) -> Generation | None:
    """Makes a generation the live one, in one transaction; readers see the old one until the commit.

    Returns the generation that was live before. Raises UserError when the generation has not been built, lost its
    partitions, is not what its gates measured, or failed a blocking gate and `force` is not given.
    """
    before = switch(connection, generation, force=force)
    connection.commit()
    return before


def switch(connection: psycopg.Connection[Any], generation: int, *, force: bool = False) -> Generation | None:
    """`promote` without the commit: for callers that have more to do in the same transaction."""
    locks.wait_in_transaction(connection, locks.BUILD)
    candidate = get(connection, generation)
    _refuse_unfit(connection, candidate, force=force)
    _refuse_changed(connection, candidate)
    before = live(connection)
    if before is not None and before.generation == generation:
        return before
    connection.execute("update generations set state = 'retired', retired_at = now() where state = 'live'")
    connection.execute(
        "update generations set state = 'live', live_at = now(), retired_at = null where generation = %s",
        [generation],
    )
    # One instant ends the old interval and begins the new one: no moment is without a live generation.
    row = connection.execute(
        "select greatest(clock_timestamp(), max(live_from) + interval '1 microsecond') from promotions"
    ).fetchone()
    connection.execute("update promotions set live_until = %s where live_until is null", row)
    connection.execute("insert into promotions (generation, live_from) values (%s, %s)", [generation, *(row or ())])
    return before


def _refuse_unfit(connection: psycopg.Connection[Any], candidate: Generation, *, force: bool) -> None:
    if candidate.state not in ("ready", "retired", "live"):
        raise UserError(
            f"generation {candidate.generation} is {candidate.state}: only a ready or retired one can go live"
        )
    if not has_partitions(connection, candidate.generation):
        raise UserError(f"generation {candidate.generation} was dropped; build a new one with `polytower materialize`")
    failed = [gate for gate in candidate.quality.get("gates", []) if not gate["passed"] and gate["severity"] == "error"]
    if failed and not force:
        words = {gate["name"]: MEANINGS.get(gate["name"], "out of bounds") for gate in failed}
        reasons = "; ".join(
            f"{gate['name']} is {gate['value']} (needs {gate['threshold']}), {words[gate['name']]}" for gate in failed
        )
        raise UserError(
            f"generation {candidate.generation} failed its quality gates: {reasons}; --force promotes it anyway"
        )


def _refuse_changed(connection: psycopg.Connection[Any], candidate: Generation) -> None:
    """Nothing forces a generation live that is not the one which the gates measured."""
    sealed = candidate.quality.get("seal")
    if candidate.state == "live" or sealed is None:  # built before seals were kept
        return
    differences = seal.broken(sealed, seal.seal(connection, candidate.generation))
    if differences:
        raise UserError(
            f"generation {candidate.generation} was changed after its gates had measured it: {'; '.join(differences)};"
            " build another one with `polytower materialize`"
        )


def rollback(connection: psycopg.Connection[Any]) -> Generation:
    """Promotes the generation that was live before the present one, and returns it."""
    now = live(connection)
    if now is None:
        raise UserError("no generation is live, so there is nothing to roll back; see `polytower generations list`")
    previous = connection.execute(
        """select generation from promotions join generations using (generation)
           where generation <> %s and state = 'retired' order by promotion desc limit 100""",
        [now.generation],
    ).fetchall()
    for (generation,) in previous:
        if has_partitions(connection, generation):
            promote(connection, generation)
            return get(connection, generation)
    raise UserError(f"no generation before {now.generation} is kept: there is nothing to roll back to")


def has_partitions(connection: psycopg.Connection[Any], generation: int) -> bool:
    """Whether a generation's vectors are still there."""
    row = connection.execute(
        "select bool_and(to_regclass(name) is not null) from unnest(%s::text[]) name", [_partition_names(generation)]
    ).fetchone()
    assert row is not None
    return bool(row[0])


def _partition_names(generation: int) -> list[str]:
    return [f"{SCHEMA}.{parent}_g{generation}" for parent in PARENTS]


def drop(connection: psycopg.Connection[Any], generation: int) -> None:
    """Drops a generation's vectors, towers and, unless another one needs them, the embeddings by encoders of its own.

    Its row stays as a record. The live one is refused.
    """
    found = get(connection, generation)
    if found.state == "live":
        raise UserError(f"generation {generation} is live: promote another one first")
    _drop_partitions(connection, generation)
    amends(connection)
    connection.execute("delete from towers where generation = %s", [generation])
    connection.execute(_FORGET_ADAPTED, {"generation": generation})
    connection.commit()


@dataclass(frozen=True)
class Surplus:
    """A past generation whose vectors are not worth their space: `bytes` on disk, indexes and tower included."""

    generation: int
    state: GenerationState
    bytes: int


def surplus(connection: psycopg.Connection[Any], keep: int) -> list[Surplus]:
    """Generations that still have vectors, are neither live nor being built, and are not among the newest `keep` such.

    Newest first.
    """
    past = [g for g in listing(connection) if g.state not in ("live", "building")]
    kept = [g for g in past if has_partitions(connection, g.generation)]
    return [Surplus(g.generation, g.state, _bytes(connection, g.generation)) for g in kept[keep:]]


def retain(connection: psycopg.Connection[Any], keep: int) -> list[Surplus]:
    """Drops the surplus beyond the newest `keep` past generations; returns what was dropped."""
    dropped = surplus(connection, keep)
    for each in dropped:
        drop(connection, each.generation)
    return dropped


def _bytes(connection: psycopg.Connection[Any], generation: int) -> int:
    row = connection.execute(
        """select sum(pg_total_relation_size(to_regclass(name)))
                  + (select coalesce(sum(octet_length(weights)), 0) from towers where generation = %s)
           from unnest(%s::text[]) name""",
        [generation, _partition_names(generation)],
    ).fetchone()
    assert row is not None
    return int(row[0])


def _drop_partitions(connection: psycopg.Connection[Any], generation: int) -> None:
    for parent in PARENTS:
        connection.execute(sql.SQL("drop table if exists {}").format(partition(parent, generation)))


def diff(connection: psycopg.Connection[Any], older: int, newer: int) -> dict[str, Any]:
    """What changed between two generations.

    Returns item and user counts (added, removed), metrics side by side, and neighbour churn: the share of a sampled
    item's 10 nearest items (item space, exact) that the newer generation no longer has, 0 = same, 1 = all new.
    """
    sides = {"older": get(connection, older), "newer": get(connection, newer)}
    for side in sides.values():
        if not has_partitions(connection, side.generation):
            raise UserError(f"generation {side.generation} was dropped: its vectors cannot be compared")
    return {
        "older": older,
        "newer": newer,
        "items": _set_difference(connection, "item_embeddings", "item_id", older, newer),
        "users": _set_difference(connection, "user_interests", "user_id", older, newer),
        "neighbour_churn": neighbour_churn(connection, older, newer),
        "metrics": {name: side.metrics for name, side in sides.items()},
    }


def _set_difference(
    connection: psycopg.Connection[Any], parent: str, key: str, older: int, newer: int
) -> dict[str, int]:
    row = connection.execute(
        sql.SQL(
            """select count(*) filter (where o.id is null), count(*) filter (where n.id is null),
                      count(*) filter (where o.id = n.id)
               from (select distinct {key} as id from {older}) o
               full join (select distinct {key} as id from {newer}) n on o.id = n.id"""
        ).format(key=sql.Identifier(key), older=partition(parent, older), newer=partition(parent, newer))
    ).fetchone()
    assert row is not None
    return dict(zip(("added", "removed", "kept"), map(int, row), strict=True))


def neighbour_churn(connection: psycopg.Connection[Any], older: int, newer: int, *, sample: int = 200) -> float | None:
    """Mean share of the 10 nearest neighbours that differ, over `sample` items (by hash, so always the same ones).

    None when the generations share no items.
    """
    statement = sql.SQL(
        """with probes as (
               select o.item_id, o.embedding as before, n.embedding as after
               from {older} o join {newer} n using (item_id) order by md5(item_id) limit %(sample)s
           )
           select avg(1 - (select count(*) from
               (select item_id from {older} x where x.item_id <> p.item_id
                order by x.embedding <#> p.before, item_id limit 10) a
               join (select item_id from {newer} x where x.item_id <> p.item_id
                order by x.embedding <#> p.after, item_id limit 10) b using (item_id)) / 10.0)
           from probes p"""
    ).format(older=partition("item_embeddings", older), newer=partition("item_embeddings", newer))
    row = connection.execute(statement, {"sample": sample}).fetchone()
    assert row is not None
    return None if row[0] is None else float(row[0])


def exclusive(connection: psycopg.Connection[Any], *, take_over: bool = False) -> AbstractContextManager[None]:
    """Holds the build lock for a block, once a killed builder's session has ended.

    Raises UserError that says who builds, unless take_over ends that session.
    """
    return locks.held(connection, locks.BUILD, take_over=take_over, refuse_after=locks.GRACE)
