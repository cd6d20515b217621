"""Where things live and which encoders run: read from the environment, nothing else.

Only connections, places and machine-dependent choices are environment variables; everything that changes a result
(dimensions, losses, presets) is a Python dataclass beside the code that uses it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from polytower.errors import UserError
from polytower.machine import memory_bytes
from polytower.url import normalised


@dataclass(frozen=True)
class Settings:
    """One process's view of its surroundings.

    home: folder of the embedded Postgres, downloads, checkpoints and Dagster's own files. Default: `.polytower`.
    database_url: an external Postgres (16 or newer, pgvector 0.8.4 or newer). Unset: the embedded one.
    server_database_url: the same database for the HTTP server alone, by a role with few rights. Unset: the role that
        comes with the embedded Postgres, else `database_url`.
    device: "auto" (default), "cpu", "cuda", "cuda:1" …; auto takes CUDA where there is one.
    index_mb: mebibytes that a server's index in memory may take; 0 for none, so that SQL answers. Default: 1024, but at
        most a quarter of the memory.
    search_threads: threads of a server's search in memory. Two answer a lone client sooner, one (default) answers more
        clients.
    vector_index: what a server searches in memory with. Unset: `exact` for small catalogues, `inverted_file` for large
        ones.
    text_encoder, image_encoder: "default" for the bundled weights, else any transformers checkpoint by name or path.
    require_keys: 1 or 0, whether the HTTP API asks for API keys. Unset: `polytower serve` decides by the address.
    """

    home: Path
    database_url: str | None
    device: str
    index_mb: int
    search_threads: int
    text_encoder: str
    image_encoder: str
    require_keys: bool | None = None
    server_database_url: str | None = None
    vector_index: str | None = None

    @property
    def postgres_dir(self) -> Path:
        """Folder of the embedded Postgres."""
        return self.home / "postgres"

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of trained checkpoints, one sub-folder each."""
        return self.home / "checkpoints"

    @property
    def training_sets_dir(self) -> Path:
        """Folder of the newest training sets, one sub-folder each."""
        return self.home / "training_sets"

    @property
    def downloads_dir(self) -> Path:
        """Folder of verified downloads (the demo's data)."""
        return self.home / "downloads"


def settings() -> Settings:
    """Reads the environment anew at each call, so that a test or a shell can change it."""
    environ = os.environ
    return Settings(
        home=Path(environ.get("POLYTOWER_HOME", ".polytower")).resolve(),
        database_url=_url("POLYTOWER_DATABASE_URL"),
        server_database_url=_url("POLYTOWER_SERVER_DATABASE_URL"),
        device=environ.get("POLYTOWER_DEVICE", "auto"),
        index_mb=_number("POLYTOWER_INDEX_MB", min(1024, memory_bytes() >> 22), least=0),
        search_threads=_number("POLYTOWER_SEARCH_THREADS", 1, least=1),
        vector_index=environ.get("POLYTOWER_VECTOR_INDEX", "").strip() or None,
        text_encoder=environ.get("POLYTOWER_TEXT_ENCODER", "default"),
        image_encoder=environ.get("POLYTOWER_IMAGE_ENCODER", "default"),
        require_keys=_flag("POLYTOWER_REQUIRE_KEYS"),
    )


def _url(name: str) -> str | None:
    """A database URL as libpq takes it. Raises UserError for one that cannot be read."""
    value = os.environ.get(name, "").strip()
    try:
        return normalised(value) if value else None
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _number(name: str, default: int, *, least: int) -> int:
    """A whole number. Raises UserError for anything else."""
    value = os.environ.get(name, "").strip()
    if not value:
        return default
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)


def _flag(name: str) -> bool | None:
    """1, true, yes, on; 0, false, no, off; None when unset. Raises UserError on a typo, which must not open a door."""
    value = os.environ.get(name, "").strip().lower()
    if value in ("", "1", "true", "yes", "on", "0", "false", "no", "off"):
        return value in ("1", "true", "yes", "on") if value else None
    raise UserError(f"{name}={value!r} must be 1 or 0")
