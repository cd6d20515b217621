"""`polytower serve`, and `polytower keys` for those who may ask it."""

import ipaddress
import os
from typing import Any

import click

from polytower.commands.output import AS_JSON, answer, require_schema, say, table
from polytower.errors import UserError
from polytower.settings import settings


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--require-keys/--without-keys",
    default=None,
    help="Whether requests need an API key [default: $POLYTOWER_REQUIRE_KEYS, else no keys on a loopback address; any"
    " other address needs one of the two].",
)
@click.option(
    "--warm",
    is_flag=True,
    help="Load torch, the user tower and the encoders at startup (/readyz says when), not on first use.",
)
def serve(host: str, port: int, require_keys: bool | None, warm: bool) -> None:
    """Serve the HTTP API, with its documentation at /docs."""
    # Matrices here are small: threads would spin for longer than they compute.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import uvicorn

    from polytower.postgres import connect, server_url
    from serving.http import keys as api_keys
    from serving.http.app import create_app
    from serving.http.connections import Connection

    config = settings()
    guarded = _guarded(host, config.require_keys if require_keys is None else require_keys)
    with connect(server_url()) as connection:
        require_schema(connection)
        usable = sum(key.revoked_at is None for key in api_keys.listing(connection)) if guarded else 0
    if config.database_url and not config.server_database_url:
        say("the server connects as the owner of the tables; docs/postgres.md shows how to give it a separate role")
    say(f"serving on http://{host}:{port}/v1, documentation on http://{host}:{port}/docs; stop with Ctrl-C")
    if not guarded:
        say("API keys are off: anyone who reaches this address may read and write; --require-keys turns them on")
    elif usable:
        say(f"API keys are required; usable keys: {usable}")
    else:
        say("API keys are required, but there are none yet: `polytower keys create NAME --scope read`")
    app = create_app(require_keys=guarded, warm=warm)
    # Not uvicorn.run, which keeps to itself that a signal ended it.
    listening = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, http=Connection, ws="none"
    )
    server = uvicorn.Server(listening)
    server.run()
    if not server.started:
        raise SystemExit(1)


def _guarded(host: str, require_keys: bool | None) -> bool:
    """Whether to require keys. Raises UserError if others could reach the server and nobody has decided."""
    if require_keys is not None:
        return require_keys
    if not _is_loopback(host):
        raise UserError(
            f"anyone could reach {host or 'every address'} without a key; add --require-keys (and create one with"
            " `polytower keys create`), or --without-keys if something in front of the server checks who is asking"
        )
    return False


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: whatever it stands for, it is not certain to be this machine alone
        return False


@click.group()
def keys() -> None:
    """Create, list and revoke keys for the HTTP API."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    required=True,
    type=click.Choice(["read", "write", "admin"]),
    help="What the key is for (repeatable): read: all questions; write: interactions; admin: both, and /metrics.",
)
@click.option("--rate", type=click.FloatRange(0.01, 1e6), default=100, show_default=True, help="Requests per second.")
@click.option("--burst", type=click.IntRange(1, 1_000_000), help="Requests allowed at once [default: twice the rate].")
@click.option("--unlimited", is_flag=True, help="No rate limit.")
@AS_JSON
def create(name: str, scopes: tuple[Any, ...], rate: float, burst: int | None, unlimited: bool, as_json: bool) -> None:
    """Create a key called NAME and show it, this once: only its hash is stored."""
    from polytower.postgres import connect
    from serving.http import keys as api_keys

    with connect() as connection:
        require_schema(connection)
        record, key = api_keys.create(
            connection, name, scopes, rate=None if unlimited else rate, burst=burst or max(1, round(2 * rate))
        )
    say(f"key {record.key_id} ({', '.join(record.scopes)}); keep it now, it cannot be shown again:")
    answer({"key": key, **record.as_json()}, as_json=as_json, text=key)


@keys.command("list")
@AS_JSON
def list_keys(as_json: bool) -> None:
    """List all keys, including revoked ones; never the secrets themselves."""
    from polytower.postgres import connect
    from serving.http import keys as api_keys

    with connect() as connection:
        require_schema(connection)
        found = api_keys.listing(connection)
    rows = [
        (key.key_id, key.name, ", ".join(key.scopes), "unlimited" if key.rate is None else f"{key.rate:g}/s", key.burst,
         *(f"{time:%Y-%m-%d %H:%M}" if time else None for time in (key.created_at, key.last_used_at, key.revoked_at)))
        for key in found
    ]  # fmt: skip
    columns = ["id", "name", "scopes", "rate", "burst", "created (UTC)", "last used", "revoked"]
    answer([key.as_json() for key in found], as_json=as_json, text=table(rows, columns) if rows else "no keys yet")


@keys.command()
@click.argument("key_id")
@AS_JSON
def revoke(key_id: str, as_json: bool) -> None:
    """Revoke the key with this id; running servers refuse it within two seconds."""
    from polytower.postgres import connect
    from serving.http import keys as api_keys

    with connect() as connection:
        require_schema(connection)
        changed = api_keys.revoke(connection, key_id)
    text = f"key {key_id} is revoked" if changed else f"key {key_id} was already revoked"
    answer({"revoked": key_id, "changed": changed}, as_json=as_json, text=text)
