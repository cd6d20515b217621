"""Generations for benchmarks as a user has them: generated data, loaded and materialised by the product itself."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dagster as dg
import psycopg
from psycopg import sql

import migrations
from benchmarks.generated import write_folder
from pipelines.load.folder import load_folder
from pipelines.orchestration.materialize import materialize
from polytower.postgres import connect, database_url

# What is searched has to look like what towers make; how well they were trained changes no latency.
OPTIONS = {"epochs": 1, "negatives": 128}


@contextmanager
def database(name: str) -> Iterator[str]:
    """URL of an empty database of the current schema on the platform's server; dropped in the end."""
    server = database_url()
    identifier = sql.Identifier(name)
    url = server.rsplit("/", 1)[0] + "/" + name
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("drop database if exists {} with (force)").format(identifier))
        admin.execute(sql.SQL("create database {}").format(identifier))
        try:
            migrations.upgrade(url)
            yield url
        finally:
            admin.execute(sql.SQL("drop database {} with (force)").format(identifier))


def load(url: str, *, users: int, items: int) -> None:
    """Generated users and items, loaded."""
    with TemporaryDirectory(prefix="polytower-bench-") as folder:
        write_folder(Path(folder), users, items)
        with connect(url) as connection:
            load_folder(connection, Path(folder))


def build(url: str, *, dim: int, interests: int, **options: Any) -> int:
    """A live generation over what is loaded, by preset tiny with these options; answers its number."""
    started = time.perf_counter()
    chosen = {"towers.dim": dim, "towers.interests": interests, **OPTIONS, **options}
    with _home(), dg.DagsterInstance.ephemeral() as instance:
        made = materialize(url, preset="tiny", options=chosen, progress=False, instance=instance)
    print(f"polytower: generation {made['generation']} in {time.perf_counter() - started:.0f} s", flush=True)
    return int(made["generation"])


@contextmanager
def _home() -> Iterator[None]:
    """Inside, checkpoints go to a folder of their own."""
    before = os.environ.get("POLYTOWER_HOME")
    with TemporaryDirectory(prefix="polytower-bench-") as home:
        os.environ["POLYTOWER_HOME"] = home
        try:
            yield
        finally:
            os.environ.pop("POLYTOWER_HOME")
            if before is not None:
                os.environ["POLYTOWER_HOME"] = before
