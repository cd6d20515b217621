"""A platform filled by hand, with Feast over it: one read-only copy per run, a fresh one for tests that write."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from polytower.postgres import connect
from tests.conftest import cloned
from tests.feature_repo import rows


@dataclass(frozen=True)
class Filled:
    """A database, Feast over it (definitions applied), and what it holds."""

    url: str
    store: Any
    history: rows.History


@pytest.fixture(scope="session")
def filled(server: str) -> Iterator[Filled]:
    """Shared by the tests that only read."""
    with cloned(server, "feast_read") as url, _filled(url) as each:
        yield each


@pytest.fixture
def writable(database: str) -> Iterator[Filled]:
    """This test's own."""
    with _filled(database) as each:
        yield each


@contextmanager
def _filled(url: str) -> Iterator[Filled]:
    from feature_repo.store import apply, feature_store

    with connect(url) as connection:
        history = rows.fill(connection)
    store = feature_store(url)
    apply(store)
    try:
        yield Filled(url, store, history)
    finally:
        store.registry.write_engine.dispose()
        store._get_provider().online_store.disconnect()
