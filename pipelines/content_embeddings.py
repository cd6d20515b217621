"""Content embeddings: encodes what is new of one modality, and nothing else.

What is missing is a question to Postgres: items whose content hash is not in `content_embeddings` under the encoder's
revision. Each chunk is committed as it is written, so an interrupted run goes on where it stopped.
"""

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import psycopg
from pgvector import HalfVector
from psycopg import sql
from psycopg.rows import args_row
from psycopg.types.json import Jsonb
from tqdm import tqdm

from encoders.content.encoder import ContentEncoder, Encoded
from feature_repo.modalities import modality
from pipelines import content_index
from pipelines.item_content import content_of
from polytower import locks

# Items between two commits: seconds of work at either speed, and what is held in memory.
_CHUNK = {"cpu": 512, "cuda": 4096}
_FAILURES_SHOWN = 20

_COUNT = sql.SQL("""
    select count(*) as items, count(*) filter (where e.content_hash is distinct from c.content_hash) as missing
    from ({content}) as c
    left join content_embeddings as e
        on e.item_id = c.item_id and e.modality = %(modality)s and e.revision = %(revision)s
""")

_MISSING = sql.SQL("""
    select c.item_id, c.content, c.content_hash
    from ({content}) as c
    left join content_embeddings as e
        on e.item_id = c.item_id and e.modality = %(modality)s and e.revision = %(revision)s
    where e.content_hash is distinct from c.content_hash
""")

# Rows of items that are gone, or that lost the modality.
_REMOVE = sql.SQL("""
    delete from content_embeddings as e
    where e.modality = %(modality)s and e.revision = %(revision)s
        and not exists (select from ({content}) as c where c.item_id = e.item_id)
""")

_STAGING = """
    create temp table if not exists content_staging (item_id text, content_hash text, embedding halfvec)
    on commit delete rows
"""

_UPSERT = """
    insert into content_embeddings (item_id, modality, revision, content_hash, embedding)
    select item_id, %(modality)s, %(revision)s, content_hash, embedding from content_staging
    on conflict (item_id, modality, revision) do update
    set content_hash = excluded.content_hash, embedding = excluded.embedding, encoded_at = now()
"""

# A failed item keeps no embedding of the content that it had before.
_FORGET = """
    delete from content_embeddings
    where modality = %(modality)s and revision = %(revision)s and item_id = any(%(item_ids)s)
"""

_REGISTER = """
    insert into content_encoders (modality, revision, model, dim, config)
    values (%(modality)s, %(revision)s, %(model)s, %(dim)s, %(config)s)
    on conflict (modality, revision) do nothing
"""

_RETIRE = """
    update content_encoders set active = false
    where modality = %(modality)s and revision <> %(revision)s and active
"""

_ACTIVATE = """
    update content_encoders set active = true
    where modality = %(modality)s and revision = %(revision)s and not active
"""


class _Row(NamedTuple):
    item_id: str
    content: Any
    content_hash: str


@dataclass(frozen=True)
class Failure:
    """An item whose content could not be encoded; the next run tries it again.

    source: the picture's path, or the modality.
    """

    item_id: str
    source: str
    reason: str


@dataclass(frozen=True)
class EncodeReport:
    """One run over one modality.

    items: that have the modality. encoded, failed: of those that were new. skipped: unchanged. removed: rows of items
    that lost the modality. seconds: in all; encode_seconds: from the first read to the last embedding;
    index_seconds: for the index of the encoder's own space.
    items_per_second: encoded over encode_seconds. failures: the first few.
    """

    modality: str
    revision: str
    model: str
    items: int
    encoded: int
    skipped: int
    removed: int
    failed: int
    seconds: float
    encode_seconds: float
    index_seconds: float
    items_per_second: float
    failures: tuple[Failure, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def encode_modality(
    connection: psycopg.Connection[Any],
    name: str,
    encoder: ContentEncoder[Any],
    *,
    progress: bool = False,
    chunk: int | None = None,
    take_over: bool = False,
    in_force: bool = True,
) -> EncodeReport:
    """Encodes the items whose content is new to the encoder, and puts that encoder in force for the modality.

    connection: commits (what the caller left open, and each chunk). Reading and writing run in a thread of their own
    beside the model. chunk: items between two commits. take_over: from another run that encodes. in_force: False leaves
    the former one in force. A content that cannot be encoded is reported and left out; any other error stops the run
    with the finished chunks kept and the former encoder still in force.
    """
    started = perf_counter()
    run = _Run(connection, name, encoder, chunk or _CHUNK.get(encoder.device.split(":")[0], _CHUNK["cpu"]))
    with locks.held(connection, f"polytower.encode.{name}", take_over=take_over), ExitStack() as stack:
        connection.execute(_STAGING)
        connection.execute(_REGISTER, run.values)
        removed = connection.execute(_REMOVE.format(content=run.content), run.values).rowcount
        counts = connection.execute(_COUNT.format(content=run.content), run.values).fetchone()
        assert counts is not None
        items, missing = counts
        connection.commit()
        encode_seconds = 0.0
        if missing:
            content_index.drop_before(connection, name, encoder.revision, items=items, missing=missing)
            stack.enter_context(gpu_lock(connection, encoder.device, take_over=take_over))
            bar = stack.enter_context(
                tqdm(total=missing, desc=f"encode {name}", unit="item", disable=None if progress else True)
            )
            encode_seconds = run.encode(bar)
        if in_force:
            connection.execute(_RETIRE, run.values)
            connection.execute(_ACTIVATE, run.values)
        connection.commit()
        index_seconds = content_index.ensure(connection, name, encoder.revision, dim=encoder.dim, items=items)
    return EncodeReport(
        modality=name,
        revision=encoder.revision,
        model=encoder.model,
        items=items,
        encoded=run.encoded,
        skipped=items - missing,
        removed=removed,
        failed=run.failed,
        seconds=perf_counter() - started,
        encode_seconds=encode_seconds,
        index_seconds=index_seconds,
        items_per_second=run.encoded / encode_seconds if encode_seconds else 0.0,
        failures=tuple(run.failures),
    )


class _Run:
    """The stream from items through the model to embeddings, and its counts so far."""

    def __init__(
        self, connection: psycopg.Connection[Any], name: str, encoder: ContentEncoder[Any], chunk: int
    ) -> None:
        self.connection = connection
        self.record = modality(name)
        self.content = content_of(name)
        self.encoder = encoder
        self.chunk = chunk
        self.encoded = 0
        self.failed = 0
        self.failures: list[Failure] = []
        self.values = {
            "modality": name,
            "revision": encoder.revision,
            "model": encoder.model,
            "dim": encoder.dim,
            "config": Jsonb(dict(encoder.config)),
        }

    def encode(self, bar: "tqdm[Any]") -> float:
        """Encodes and writes all that is missing; answers the seconds until the last embedding was there.

        One thread does all the talking to Postgres: it reads the next chunk and writes the last one while the model
        works on this one. At most one chunk waits to be written.
        """
        started = perf_counter()
        reading: deque[list[_Row]] = deque()
        written: Future[None] | None = None
        with ThreadPoolExecutor(1, "postgres") as postgres, self._cursor() as cursor:
            contents = self._contents(postgres, cursor, reading)
            with closing(self.encoder.encode_chunks(contents)) as stream:  # type: ignore[type-var]
                for encoded in stream:
                    seconds = perf_counter() - started
                    rows = reading.popleft()
                    if written:
                        written.result()
                    written = postgres.submit(self._write, rows, encoded)
                    bar.update(len(rows))
            if written:
                written.result()
        return seconds

    @contextmanager
    def _cursor(self) -> Iterator[psycopg.ServerCursor[_Row]]:
        """A cursor on the server that outlives the commits: the missing items as they are now."""
        with self.connection.cursor("missing_content", row_factory=args_row(_Row), withhold=True) as cursor:
            cursor.execute(_MISSING.format(content=self.content), self.values)
            self.connection.commit()
            yield cursor

    def _contents(
        self, postgres: ThreadPoolExecutor, cursor: psycopg.ServerCursor[_Row], reading: deque[list[_Row]]
    ) -> Iterator[Sequence[Any]]:
        upcoming = postgres.submit(cursor.fetchmany, self.chunk)
        while rows := upcoming.result():
            upcoming = postgres.submit(cursor.fetchmany, self.chunk)
            reading.append(rows)
            yield [row.content for row in rows]

    def _write(self, rows: list[_Row], encoded: Encoded) -> None:
        """One transaction: the chunk's embeddings in, those of failed items out."""
        failures = dict(encoded.failures)
        usable = np.isfinite(encoded.embeddings).all(axis=1) & encoded.embeddings.any(axis=1)
        for place in np.flatnonzero(~usable).tolist():
            failures.setdefault(place, f"{self.encoder.model} gave no usable vector (zero, or not finite)")
        self.connection.commit()
        with self.connection.transaction(), self.connection.cursor() as cursor:
            copy_in = "copy content_staging (item_id, content_hash, embedding) from stdin (format binary)"
            with cursor.copy(copy_in) as copy:
                copy.set_types(["text", "text", "halfvec"])
                for place, row in enumerate(rows):
                    if place not in failures:
                        copy.write_row((row.item_id, row.content_hash, HalfVector(encoded.embeddings[place])))
            cursor.execute(_UPSERT, self.values)
            if failures:
                cursor.execute(_FORGET, {**self.values, "item_ids": [rows[place].item_id for place in failures]})
        self.encoded += len(rows) - len(failures)
        self._note(rows, failures)

    def _note(self, rows: list[_Row], failures: dict[int, str]) -> None:
        self.failed += len(failures)
        for place in sorted(failures)[: _FAILURES_SHOWN - len(self.failures)]:
            row = rows[place]
            source = row.content if self.record.is_file else self.record.name
            self.failures.append(Failure(row.item_id, source, failures[place]))


def gpu_lock(
    connection: psycopg.Connection[Any], device: str, *, take_over: bool = False
) -> AbstractContextManager[None]:
    """Holds this machine's CUDA device alone, among all that use this database; nothing on other devices.

    As locks.held. device: as torch writes it.
    """
    if not device.startswith("cuda"):
        return nullcontext()
    name = device if ":" in device else f"{device}:0"
    return locks.held(connection, f"{name} of {socket.gethostname()}", take_over=take_over)
