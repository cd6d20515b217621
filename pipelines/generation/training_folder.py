"""The training set as a folder of Arrow files, named by the hash of its content: what Dagster calls `training_set`.

It is written once and never changed: the same data gives the same folder, and a checkpoint learns from the very bytes
that the asset counted, whatever has reached the database since. Files, by row: items.arrow (id and content embeddings),
users.arrow (id and number of events), events.arrow (all events of the first user, then of the second …, oldest first),
queries.arrow (embeddings of what was searched for, to which the events refer), attributes.arrow (what is known of
users, as JSON, for towers that read it), contents.arrow (what the items' encoders read, as JSON, for training that
reaches them: texts, attributes, paths of pictures).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa

from encoders.catalogue import BoolArray, Catalogue, FloatArray, Histories
from pipelines.generation.training_set import (
    Profiles,
    TrainingSet,
    one_moment,
    read_contents,
    read_events,
    read_profiles,
)
from pipelines.generation.training_set import with_attributes as with_profiles
from polytower import locks
from polytower.errors import UserError
from polytower.files import private_folder

# Training sets that stay: those written or found last. A checkpoint has its own copy of what its evaluation asks.
KEPT = 3
_PARTIAL = ".partial-"
_ITEMS, _USERS, _EVENTS, _QUERIES, _ATTRIBUTES, _CONTENTS = FILES = (
    "items.arrow", "users.arrow", "events.arrow", "queries.arrow", "attributes.arrow", "contents.arrow",
)  # fmt: skip
# The key of what belongs to all files, in the metadata of items.arrow.
_DOCUMENT = b"training_set"


@dataclass(frozen=True)
class Written:
    """A training set's folder. sha256: of all its files, the first 16 digits name it. events, users: how many.

    items: how many have events. until: position of the newest event. reused: found, not written.
    """

    directory: Path
    sha256: str
    events: int
    users: int
    items: int
    until: int
    reused: bool


def save(connection: psycopg.Connection[Any], root: Path, *, before: datetime | None = None) -> Written:
    """Writes the training set of this moment below `root`, or finds it there; the KEPT newest ones stay.

    before: events at or after it are left out. A killed run leaves no folder that looks whole. Raises UserError when
    there is nothing to learn from.
    """
    with locks.folder(private_folder(root)):
        for left in root.glob(f"{_PARTIAL}*"):  # nobody else writes here now: a killed run did
            shutil.rmtree(left)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=root))
        try:
            with one_moment(connection):
                found = read_events(connection, before, queries=True)
                _write(partial, found, read_profiles(connection))
                _write_contents(partial / _CONTENTS, read_contents(connection, found.catalogue))
            sha256 = _sha256(partial)
            directory = root / sha256[:16]
            reused = directory.is_dir()
            if not reused:
                partial.replace(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        os.utime(directory)
        _prune(root)
    histories = found.histories
    with_events = int((histories.counts(len(found.catalogue)) > 0).sum())
    return Written(directory, sha256, len(histories.items), len(histories), with_events, found.until, reused)


def load(directory: Path, user_attributes: int = 0, *, queries: bool = False, contents: bool = False) -> TrainingSet:
    """The training set of a folder. Raises UserError where it is gone, or is not what its name says.

    user_attributes: width that the users' attributes are hashed to; 0 leaves them out. queries, contents: read them
    too.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such training set (the newest {KEPT} stay); materialise training_set again")
    if _sha256(directory)[:16] != directory.name:
        raise UserError(f"{directory}: damaged, its content is not what its name says; remove it and run again")
    catalogue, document = _read_items(directory / _ITEMS)
    histories, encoders = _read_histories(directory), document["encoders"]
    if queries:
        histories = _with_queries(histories, directory)
    else:
        encoders = {name: revision for name, revision in encoders.items() if name in catalogue.content}
    if user_attributes:
        histories = with_profiles(histories, _read_profiles(directory / _ATTRIBUTES), user_attributes)
    before = document["before"] and datetime.fromisoformat(document["before"])
    given = _read_contents(directory / _CONTENTS, len(catalogue)) if contents else {}
    return TrainingSet(catalogue, histories, encoders, document["until"], before, given)


def clear(root: Path) -> int:
    """Removes all training sets, which name every user and item; answers how many. The next run writes a new one."""
    with locks.folder(private_folder(root)):
        folders = [each for each in root.iterdir() if each.is_dir()]
        for each in folders:
            shutil.rmtree(each)
    return len(folders)


def _write(directory: Path, found: TrainingSet, profiles: Iterator[Profiles]) -> None:
    document = {
        "encoders": dict(found.encoders),
        "until": found.until,
        "before": found.before and found.before.isoformat(),
    }
    histories, catalogue = found.histories, found.catalogue
    _write_table(
        directory / _ITEMS,
        {"item_id": pa.array(catalogue.item_ids, pa.string())}
        | {name: _vectors(catalogue.content[name], catalogue.present[name]) for name, _ in catalogue.modalities},
        {_DOCUMENT: json.dumps(document, sort_keys=True)},
    )
    _write_table(
        directory / _USERS,
        {"user_id": pa.array(histories.user_ids, pa.string()), "events": pa.array(histories.lengths)},
    )
    _write_table(
        directory / _EVENTS,
        {
            "item": pa.array(histories.items.astype(np.int32)),  # its row in items.arrow
            "occurred_at": pa.array(histories.times).cast(pa.timestamp("us", "UTC")),
            "query": _queries(histories),  # its row in queries.arrow
        },
    )
    vectors = np.zeros((0, 1), np.float32) if histories.query_vectors is None else histories.query_vectors
    _write_table(directory / _QUERIES, {"embedding": _vectors(vectors, np.ones(len(vectors), bool))})
    schema = pa.schema({"user_id": pa.string(), "attributes": pa.string()})
    with _writer(directory / _ATTRIBUTES, schema) as writer:
        for user_ids, attributes in profiles:
            texts = [json.dumps(each, sort_keys=True) for each in attributes]
            writer.write_batch(pa.record_batch([pa.array(list(user_ids)), pa.array(texts)], schema=schema))


def _write_contents(path: Path, contents: Mapping[str, Sequence[Any]]) -> None:
    schema = pa.schema({"modality": pa.string(), "item": pa.int32(), "content": pa.string()})
    with _writer(path, schema) as writer:
        for modality, by_item in contents.items():
            rows = [row for row, content in enumerate(by_item) if content is not None]
            texts = [json.dumps(by_item[row], sort_keys=True) for row in rows]
            names = pa.array([modality] * len(rows), pa.string())
            writer.write_batch(pa.record_batch([names, pa.array(rows, pa.int32()), pa.array(texts)], schema=schema))


def _vectors(rows: FloatArray, present: BoolArray) -> pa.Array:
    """Rows [V, D], zeros where an item has none, as a list column; null there. No copy is made of what can be large."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1], mask=pa.array(~present))


def _queries(histories: Histories) -> pa.Array:
    if histories.queries is None:
        return pa.nulls(len(histories.items), pa.int32())
    return pa.array(histories.queries.astype(np.int32), mask=histories.queries < 0)


def _write_table(path: Path, columns: Mapping[str, pa.Array], metadata: Mapping[bytes, str] | None = None) -> None:
    table = pa.table(dict(columns)).replace_schema_metadata(metadata)
    with _writer(path, table.schema) as writer:
        writer.write_table(table)


@contextmanager
def _writer(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """An Arrow file of mode 0600, on disk when the block ends."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            yield writer
        file.flush()
        os.fsync(descriptor)


def _sha256(directory: Path) -> str:
    """Hex digest of all files, by name."""
    whole = hashlib.sha256()
    for name in FILES:
        try:
            with (directory / name).open("rb") as file:
                whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        except FileNotFoundError:
            whole.update(f"{name} is missing\n".encode())
    return whole.hexdigest()


def _prune(root: Path) -> None:
    """Removes all but the KEPT folders that were written or found last."""
    folders = sorted(
        (each for each in root.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime_ns, reverse=True
    )
    for old in folders[KEPT:]:
        # Out of sight first: half a training set never has a name.
        shutil.rmtree(old.rename(old.with_name(f"{_PARTIAL}{old.name}")))


def _read_items(path: Path) -> tuple[Catalogue, dict[str, Any]]:
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
        document = json.loads(table.schema.metadata[_DOCUMENT])
        content: dict[str, FloatArray] = {}
        present: dict[str, BoolArray] = {}
        for name in table.column_names[1:]:
            column = table[name].combine_chunks()
            values = column.values.to_numpy(zero_copy_only=False)
            content[name] = values.reshape(len(column), column.type.list_size).copy()
            present[name] = column.is_valid().to_numpy(zero_copy_only=False)
        return Catalogue(table["item_id"].to_pylist(), content, present), document


def _read_histories(directory: Path) -> Histories:
    with pa.memory_map(str(directory / _USERS)) as file:
        table = pa.ipc.open_file(file).read_all()
        user_ids = table["user_id"].to_pylist()
        offsets = np.concatenate([[0], np.cumsum(table["events"].to_numpy())]).astype(np.int64)
    with pa.memory_map(str(directory / _EVENTS)) as file:
        table = pa.ipc.open_file(file).read_all()
        items = table["item"].to_numpy().astype(np.int64)
        times = table["occurred_at"].cast(pa.int64()).to_numpy().copy()
    return Histories(user_ids, offsets, items, times)


def _with_queries(histories: Histories, directory: Path) -> Histories:
    with pa.memory_map(str(directory / _QUERIES)) as file:
        column = pa.ipc.open_file(file).read_all()["embedding"].combine_chunks()
        vectors = column.values.to_numpy().reshape(len(column), column.type.list_size).copy()
    if not len(vectors):
        return histories
    with pa.memory_map(str(directory / _EVENTS)) as file:
        queries = pa.ipc.open_file(file).read_all()["query"].fill_null(-1).to_numpy().astype(np.int64)
    return replace(histories, queries=queries, query_vectors=vectors)


def _read_profiles(path: Path) -> Iterator[Profiles]:
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for batch in map(reader.get_batch, range(reader.num_record_batches)):
            yield batch["user_id"].to_pylist(), [json.loads(text) for text in batch["attributes"].to_pylist()]


def _read_contents(path: Path, items: int) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    with pa.memory_map(str(path)) as file:
        for row in pa.ipc.open_file(file).read_all().to_pylist():
            found.setdefault(row["modality"], [None] * items)[row["item"]] = json.loads(row["content"])
    return found
