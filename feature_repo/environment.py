"""The environment variables that feature_store.yaml reads, from one database URL."""

import json
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

from feature_repo.schema import FEAST_SCHEMA
from polytower.errors import UserError


def feast_environment(url: str) -> dict[str, str]:
    """POLYTOWER_FEAST_* for the database at `url` (any libpq URL), each fit to stand between double quotes in YAML.

    Raises UserError when the URL names no host, database or user: Feast's stores want each by itself.
    """
    parts = {key: str(value) for key, value in conninfo_to_dict(url).items()}
    missing = [name for name in ("host", "dbname", "user") if not parts.get(name)]
    if missing:
        raise UserError(
            f"the database URL lacks {', '.join(missing)}: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        )
    sslmode = parts.get("sslmode", "prefer")
    variables = {
        "URL": url,
        "REGISTRY": _registry_url(parts, sslmode),
        "HOST": parts["host"],
        "PORT": parts.get("port", "5432"),
        "DATABASE": parts["dbname"],
        "USER": parts["user"],
        "PASSWORD": parts.get("password", ""),
        "SSLMODE": sslmode,
    }
    return {f"POLYTOWER_FEAST_{name}": json.dumps(value)[1:-1] for name, value in variables.items()}


def _registry_url(parts: dict[str, str], sslmode: str) -> str:
    """SQLAlchemy's URL of the registry: psycopg 3, Feast's schema; the host may be a path, so it goes last."""
    query = {
        "host": parts["host"],
        "port": parts.get("port", "5432"),
        "sslmode": sslmode,
        "options": f"-csearch_path={FEAST_SCHEMA},public",
    }
    credentials = quote(parts["user"], safe="") + ":" + quote(parts.get("password", ""), safe="")
    arguments = "&".join(f"{key}={quote(value, safe='')}" for key, value in query.items())
    return f"postgresql+psycopg://{credentials}@/{quote(parts['dbname'], safe='')}?{arguments}"
