"""What assets are given: the database, the encoders' choice, and whether anybody watches."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
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

    def connect(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """An open connection; commits on a clean exit."""
        return postgres.connect(self.database_url())


class EncoderResource(dg.ConfigurableResource[Any]):
    """Which encoders run, and where; empty fields mean what the environment says (docs/settings.md).

    device: auto, cpu, cuda, cuda:1; text_encoder, image_encoder: "default" or a transformers checkpoint.
    """

    device: str = ""
    text_encoder: str = ""
    image_encoder: str = ""

    def settings(self) -> Settings:
        """The process's settings with this resource's choices."""
        chosen = {name: value for name, value in self.model_dump().items() if value}
        return replace(settings(), **chosen)

    def checkpoints(self) -> Path:
        """Where trained checkpoints lie."""
        return self.settings().checkpoints_dir


class Terminal(dg.ConfigurableResource[Any]):
    """Whether a person watches the process: progress bars go to stderr."""

    progress: bool = False


class TakeOver(dg.Config):
    """take_over: ends the session of another process that is at the same work, in place of waiting for it."""

    take_over: bool = False
