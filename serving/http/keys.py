"""API keys: made, listed and revoked by the command line, looked up by the server.

A key is 256 random bits. Only its SHA-256 is stored: what cannot be guessed needs no slow password hash.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from psycopg.rows import class_row

from polytower.errors import UserError

Scope = Literal["read", "write", "admin"]
PREFIX = "ptk"


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; the key itself is shown once, when it is made.

    scopes: admin includes read and write. rate: requests per second, None without a limit; burst: how many at once.
    """

    key_id: str
    name: str
    scopes: list[str]
    rate: float | None
    burst: int
    created_at: datetime
    last_used_at: datetime | None = None
    revoked_at: datetime | None = None

    def allows(self, scope: Scope) -> bool:
        """Whether the key may do what needs this scope."""
        return scope in self.scopes or "admin" in self.scopes

    def as_json(self) -> dict[str, Any]:
        """The record as JSON values (times as datetime)."""
        return asdict(self)


CREATE = """
insert into api_keys (key_id, name, hash, scopes, rate, burst)
values (%(key_id)s, %(name)s, %(hash)s, %(scopes)s, %(rate)s, %(burst)s)
returning key_id, name, scopes, rate, burst, created_at, last_used_at, revoked_at
"""
LIST = """
select key_id, name, scopes, rate, burst, created_at, last_used_at, revoked_at
from api_keys order by created_at desc, key_id limit 10000
"""
REVOKE = "update api_keys set revoked_at = now() where key_id = %(key_id)s and revoked_at is null"
EXISTS = "select from api_keys where key_id = %(key_id)s limit 1"
ACTIVE = """
select hash, key_id, name, scopes, rate, burst, created_at
from api_keys where revoked_at is null limit 100000
"""
# At most one write a minute and key, however often it is used.
NOTE_USE = """
update api_keys set last_used_at = greatest(last_used_at, used.at)
from unnest(%(key_ids)s::text[], %(times)s::timestamptz[]) used (key_id, at)
where api_keys.key_id = used.key_id
"""


def fingerprint(key: str) -> bytes:
    """What is stored of a key, and what it is found by."""
    return hashlib.sha256(key.encode()).digest()


def create(
    connection: psycopg.Connection[Any], name: str, scopes: Sequence[Scope], *, rate: float | None, burst: int
) -> tuple[ApiKey, str]:
    """Makes a key: (its record, the key). The key is nowhere else, and cannot be shown again."""
    key_id = secrets.token_hex(4)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    parameters = {"key_id": key_id, "name": name, "hash": fingerprint(key), "scopes": list(scopes), "rate": rate}
    with connection.cursor(row_factory=class_row(ApiKey)) as cursor:
        record = cursor.execute(CREATE, {**parameters, "burst": burst}).fetchone()
    assert record is not None
    return record, key


def listing(connection: psycopg.Connection[Any]) -> list[ApiKey]:
    """All keys, revoked ones too, newest first."""
    with connection.cursor(row_factory=class_row(ApiKey)) as cursor:
        return cursor.execute(LIST).fetchall()


def revoke(connection: psycopg.Connection[Any], key_id: str) -> bool:
    """Revokes a key; False when it was revoked before. Raises UserError when there is none of this id."""
    if connection.execute(REVOKE, {"key_id": key_id}).rowcount:
        return True
    if connection.execute(EXISTS, {"key_id": key_id}).fetchone() is None:
        raise UserError(f"there is no key {key_id!r}; `polytower keys list` shows the ids")
    return False
