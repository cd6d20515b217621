"""A served synthetic generation: one database for tests that only read or roll back, one each for those that write."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from fastapi.testclient import TestClient
from psycopg.types.json import Jsonb

from pipelines.content_codes import code_content
from polytower.postgres import connect
from serving.http.app import Caps, create_app
from tests.conftest import as_server, cloned
from tests.generation_factory import Synthetic, unit, write_generation, write_raw

# A server that waits for torch and encoders, and answers however slow the machine is.
PATIENT = Caps(deadline=120, patience=60)


def small_data() -> Synthetic:
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


@pytest.fixture(scope="session")
def small() -> Synthetic:
    """The data behind every served database here."""
    return small_data()


@pytest.fixture(scope="package")
def served(server: str, small: Synthetic) -> Iterator[str]:
    """URL of a database with a live generation. Nothing commits to it."""
    with cloned(server, "test_serving") as url:
        with connect(url) as opened:
            assert write_generation(opened, small) == 1
        yield url


@pytest.fixture(scope="package")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint in the place of MiniLM."""
    from tests.encoders.checkpoints import bert

    return str(bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="package")
def documented(server: str, text_encoder: str) -> Iterator[str]:
    """URL of a database with the ids and attributes that the examples name, and the towers."""
    import torch

    from encoders.catalogue import Catalogue
    from encoders.config import TowersConfig
    from encoders.content.registry import CONTENT_ENCODERS
    from encoders.towers.towers import Towers
    from encoders.training.checkpoint import content_tower_bytes, user_tower_bytes

    random = np.random.default_rng(5)
    item_ids = [str(n) for n in range(1, 101)]
    data = Synthetic(
        item_ids,
        unit(random.standard_normal((100, 8))),
        {user: unit(random.standard_normal((4, 8))) for user in ("196", "186")},
        attributes=[{"genres": [["Comedy", "Drama", "War"][n % 3]], "year": 1950 + n} for n in range(100)],
        seen={"196": ["1", "2"], "186": ["3"]},
    )
    torch.manual_seed(0)
    encoder = CONTENT_ENCODERS["text"](model=text_encoder, device="cpu")
    texts = np.ones((100, encoder.dim), np.float32)
    catalogue = Catalogue(item_ids, {"text": texts}, {"text": np.ones(100, bool)})
    towers = Towers(TowersConfig(dim=8, interests=4, modalities=catalogue.modalities), catalogue)
    content = content_tower_bytes(towers)
    assert content is not None
    with cloned(server, "test_serving_docs") as url:
        with connect(url) as connection:
            write_generation(connection, data)
            connection.execute("update generations set config = %s", [Jsonb({"encoders": {"text": encoder.revision}})])
            write_raw(connection, "text", item_ids, unit(random.standard_normal((100, encoder.dim))), encoder.revision)
            code_content(connection)
            for part, (weights, config) in {"user_tower": user_tower_bytes(towers), "content": content}.items():
                connection.execute(
                    "insert into towers (generation, part, weights, config) values (1, %s, %s, %s)",
                    [part, weights, Jsonb(config)],
                )
        yield url


@pytest.fixture
def connection(served: str) -> Iterator[psycopg.Connection[Any]]:
    """Whatever a test writes here is rolled back."""
    with connect(served) as opened:
        yield opened
        opened.rollback()


@pytest.fixture
def own(database: str, small: Synthetic) -> str:
    """URL of a database like `served` that the test may change. Its generation is 1."""
    with connect(database) as opened:
        write_generation(opened, small)
    return database


@pytest.fixture
def client(served: str) -> Iterator[TestClient]:
    """A client of a server over `served`; exceptions become responses, as behind uvicorn."""
    with TestClient(create_app(as_server(served), caps=PATIENT), raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def own_client(own: str) -> Iterator[TestClient]:
    """A client of a server over `own`."""
    with TestClient(create_app(as_server(own), caps=PATIENT), raise_server_exceptions=False) as opened:
        yield opened


@contextmanager
def listening(url: str, *options: str, ready: bool = True) -> Iterator[str]:
    """`polytower serve` over this database in a process of its own: yields its URL once it is ready (or answers).

    A process, since Hypothesis and Feast's import both build syntax trees: in two threads Python 3.11 mixes them up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "polytower.cli", "serve", "--port", str(port), *options]
    process = subprocess.Popen(
        command, env={**os.environ, "POLYTOWER_DATABASE_URL": url, "POLYTOWER_SERVER_DATABASE_URL": as_server(url)}
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while not _answers(address + ("/readyz" if ready else "/healthz")):
            assert process.poll() is None, "the server did not start"
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=10).status_code == 200
    except httpx.TransportError:
        return False
