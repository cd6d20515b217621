"""What assets are given: the database, the encoders' choice, and whether anybody watches."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dagster as dg
import psycopg

from polytower import postgres
from polytower.settings import Settings, settings


class PostgresResource(dg.ConfigurableResource[Any]):
    """The platform's database.

    url: libpq URL; empty means what the environment says (POLYTOWER_DATABASE_URL or the embedded server).
    """

    url: str = ""

    def database_url(self) -> str:
        """The URL in force; starts the embedded server when it is that one."""
        return self.url or postgres.database_url()

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Any]]:
        """An open connection; commits on a clean exit."""
        with _interruptible(), postgres.connect(self.database_url()) as connection:
            yield connection


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM are KeyboardInterrupt.

    Dagster's handlers raise an error of its own; psycopg does not take that for an interrupt, and would wait for the
    end of the statement that runs instead of cancelling it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    kept = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, kept, strict=True):
            signal.signal(number, handler)


class EncoderResource(dg.ConfigurableResource[Any]):
    """Which encoders run, and where; empty fields mean what the environment says (polytower/settings.py).

    device: auto, cpu, cuda, cuda:1; text_encoder, image_encoder: "default" or a transformers checkpoint.
    """

    device: str = ""
    text_encoder: str = ""
    image_encoder: str = ""

    def settings(self) -> Settings:
        """The process's settings with this resource's choices."""
        chosen = {name: value for name, value in self.model_dump().items() if value}
        return replace(settings(), **chosen)


class Terminal(dg.ConfigurableResource[Any]):
    """Whether a person watches the process: progress bars go to stderr."""

    progress: bool = False


class TakeOver(dg.Config):
    """take_over: ends the session of another process that is doing the same work, instead of waiting for it."""

    take_over: bool = False
