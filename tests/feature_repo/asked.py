"""How the tests of online features ask, and what should come back."""

import json
from typing import Any

from feature_repo.schema import USER_ID
from feature_repo.views import VIEWS
from polytower.postgres import connect
from serving.rank.features import fetch_features
from tests.feature_repo import rows
from tests.feature_repo.conftest import Filled

TABLES = (
    "user_sequences",
    "user_stats",
    "item_stats",
    "users",
    "items",
    "content_embeddings",
    "item_embeddings",
    "user_interests",
)


def entities_of(view: str) -> tuple[str, list[str]]:
    """The view's key and entities to ask for: all, one twice, one unknown."""
    key = VIEWS[view].key
    known = rows.USERS if key == USER_ID else rows.ITEMS
    return key, [*reversed(known), known[2], "nobody"]


def references(view: str) -> list[str]:
    """All features of a view, as Feast wants them named."""
    return [f"{view}:{name}" for name in VIEWS[view].kinds]


def expected(filled: Filled, view: str, ids: list[str]) -> dict[str, list[Any]]:
    found = [rows.newest(filled.history, view, each) for each in ids]
    return {name: [None if row is None else row[1][name] for row in found] for name in VIEWS[view].kinds}


def parsed(answer: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The answer with its JSON read, since Postgres orders keys as it likes."""
    read = {
        name: [None if each is None else json.loads(each) for each in values]
        for name, values in answer.items()
        if name.endswith("attributes")
    }
    return answer | read


def fetched(filled: Filled, service: str, entities: dict[str, Any]) -> Any:
    with connect(filled.url) as connection:
        return fetch_features(connection, service, entities)


def versions(url: str) -> list[Any]:
    """Every row with the transaction that wrote it: a rewritten row shows, even with equal values."""
    with connect(url) as connection:
        return [
            connection.execute(f"select xmin::text, t::text from {table} as t order by 2").fetchall()
            for table in TABLES
        ]
