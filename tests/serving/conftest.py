"""A served synthetic generation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient

from serving.app import create_app
from tests.generation_factory import Synthetic, unit, write_generation


@pytest.fixture
def small() -> Synthetic:
    """60 items in 8 dimensions, two users with three interests and some history, attributes, one unavailable item."""
    random = np.random.default_rng(7)
    item_ids = [f"i{n:02d}" for n in range(60)]
    return Synthetic(
        item_ids,
        unit(random.standard_normal((60, 8))),
        {user: unit(random.standard_normal((3, 8))) for user in ("ada", "bob")},
        {"ada": [0.5, 0.3, 0.2]},
        content=unit(random.standard_normal((60, 8))),
        identity=unit(random.standard_normal((60, 8))),
        attributes=[{"genres": ["Comedy"] if n % 2 else ["Drama", "War"], "year": 1980 + n} for n in range(60)],
        unavailable=frozenset({"i03"}),
        seen={"ada": ["i01", "i02", "i05"], "bob": ["i07"]},
    )


@pytest.fixture
def generation(connection: psycopg.Connection[Any], small: Synthetic) -> int:
    """The live generation made of `small`, committed."""
    written = write_generation(connection, small)
    connection.commit()
    return written


@pytest.fixture
def client(database: str) -> Iterator[TestClient]:
    """A client of a server over the test's database; exceptions become responses, as behind uvicorn."""
    with TestClient(create_app(database), raise_server_exceptions=False) as opened:
        yield opened
