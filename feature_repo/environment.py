"""The environment variables that feature_store.yaml reads, from one database URL."""

import json

from polytower.url import normalised, sqlalchemy_url


def feast_environment(url: str) -> dict[str, str]:
    """POLYTOWER_FEAST_* for the database at `url` (any libpq URL), each fit to stand between double quotes in YAML."""
    variables = {"URL": normalised(url), "REGISTRY": sqlalchemy_url(url)}
    return {f"POLYTOWER_FEAST_{name}": json.dumps(value)[1:-1] for name, value in variables.items()}
