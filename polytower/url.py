"""The database's URL, in the form that each library needs: every part of it reaches all of them."""

import re
from urllib.parse import quote

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

from polytower.errors import UserError

EXAMPLE = "postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
# What other tools call the same scheme.
_SCHEME = re.compile(r"^postgres(?:ql)?(?:\+\w+)?://")


def normalised(url: str) -> str:
    """The URL as libpq knows it: postgresql://, whatever driver it named. Raises UserError for what is none.

    The message never quotes the URL, which may hold a password.
    """
    written = _SCHEME.sub("postgresql://", url.strip(), count=1)
    parts(written)
    return written


def parts(url: str) -> dict[str, str]:
    """libpq's parameters of a URL (or of a `host=… dbname=…` string)."""
    try:
        return {name: str(value) for name, value in conninfo_to_dict(url).items()}
    except (ProgrammingError, ValueError) as error:
        raise UserError(
            f"the database URL cannot be read; write {EXAMPLE}, with special characters percent-encoded"
            " (@ is %40, / is %2F, % is %25)"
        ) from error


def sqlalchemy_url(url: str) -> str:
    """SQLAlchemy's URL with the psycopg 3 driver, in the one shape that Great Expectations takes: user@host/database.

    The rest travels as libpq parameters, which win over the host's place holder. Raises UserError without a host.
    """
    found = {option.keyword.decode(): option.val.decode() for option in Conninfo.get_defaults() if option.val}
    parameters = {name: found[name] for name in ("host", "user", "dbname") if name in found} | parts(url)
    if not parameters.get("host"):
        raise UserError(f"the database URL names no host (a socket's folder works too); write {EXAMPLE}")
    user, password = (quote(parameters.pop(name, ""), safe="") for name in ("user", "password"))
    database = quote(parameters.pop("dbname", "") or user, safe="")
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
    return f"postgresql+psycopg://{user}{f':{password}' if password else ''}@localhost/{database}?{query}"


def shown(url: str) -> str:
    """The URL without its secrets, to be read by people."""
    found = parts(url)
    place = f"{found.get('host', '')}{':' + found['port'] if 'port' in found else ''}/{found.get('dbname', '')}"
    return f"postgresql://{found['user'] + '@' if 'user' in found else ''}{place}"
