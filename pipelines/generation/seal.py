"""What a generation was when its gates measured it: row counts and checksums of all that is served from it.

Stored with the quality report, and compared again in the transaction that promotes it. A table's checksum is the
exclusive or of a hash of each row: the order of rows does not matter, one changed bit shows, and rows that are erased
can be taken out of it without reading the others.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, LiteralString

import psycopg

Seal = dict[str, dict[str, Any]]

# Vectors as Postgres sends them: a tenth of the time that their text takes. `only`: one id's rows, null for all.
TABLES: dict[str, LiteralString] = {
    "item_embeddings": """
        select count(*), coalesce(bit_xor(hashtextextended(
            item_id || ' ' || md5(halfvec_send(embedding) || coalesce(halfvec_send(content_embedding), 'none')
                                  || coalesce(halfvec_send(id_embedding), 'none')), 0)), 0)
        from item_embeddings
        where generation = %(generation)s and (%(only)s::text is null or item_id = %(only)s)""",
    "user_interests": """
        select count(*), coalesce(bit_xor(hashtextextended(
            user_id || ' ' || interest || ' ' || weight || ' ' || extract(epoch from as_of) || ' '
            || coalesce(events, -1) || ' ' || md5(halfvec_send(embedding)), 0)), 0)
        from user_interests
        where generation = %(generation)s and (%(only)s::text is null or user_id = %(only)s)""",
}
TOWERS = "select part, weights, config::text from towers where generation = %(generation)s order by part limit 100"


def seal(connection: psycopg.Connection[Any], generation: int) -> Seal:
    """{part: its size and checksum}; equal seals are equal generations."""
    found: Seal = {}
    for table in TABLES:
        rows, checksum = _measured(connection, table, generation, None)
        found[table] = {"rows": rows, "checksum": f"{checksum:016x}"}
    for part, weights, config in connection.execute(TOWERS, {"generation": generation}):
        digest = hashlib.sha256(bytes(weights) + config.encode()).hexdigest()
        found[f"towers.{part}"] = {"bytes": len(weights), "sha256": digest}
    return found


def without(connection: psycopg.Connection[Any], sealed: Seal, table: str, generation: int, only: str) -> Seal:
    """The seal once the rows of one id, which are there still, are deleted. What was broken before stays broken."""
    rows, checksum = _measured(connection, table, generation, only)
    before = sealed[table]
    return sealed | {
        table: {"rows": before["rows"] - rows, "checksum": f"{int(before['checksum'], 16) ^ checksum:016x}"}
    }


def broken(sealed: Seal, found: Seal) -> list[str]:
    """What differs, in words; empty when nothing does."""
    return [
        f"{part} had {words(sealed.get(part))} when the gates measured it, and has {words(found.get(part))} now"
        for part in sorted({*sealed, *found})
        if sealed.get(part) != found.get(part)
    ]


def words(part: Mapping[str, Any] | None) -> str:
    """One part of a seal for people; hashes are cut."""
    return ", ".join(f"{name} {str(value)[:16]}" for name, value in (part or {}).items()) or "nothing"


def _measured(connection: psycopg.Connection[Any], table: str, generation: int, only: str | None) -> tuple[int, int]:
    row = connection.execute(TABLES[table], {"generation": generation, "only": only}).fetchone()
    assert row is not None
    return row[0], row[1] & (2**64 - 1)
