"""Items and users: COPY into a staging table, duplicates out, then an upsert that touches only what differs.

Everything here runs inside the caller's transaction. A file says all there is to say about its rows: a column that it
lacks becomes null (available: true).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from tqdm import tqdm

from encoders.picture import PictureError
from pipelines.attributes import Reader, attribute_objects, csv_readers
from pipelines.columns import Checked, flags, ids, shown, text
from pipelines.contract import Batch, Source, check_columns
from pipelines.images import CheckedImage, ImageChecks, images_root
from pipelines.rejections import KEPT_PER_FILE, Rejection, Rejections
from polytower.errors import UserError


@dataclass(frozen=True)
class Entity:
    """A table of things with attributes. columns: all that a load writes but `attributes`, the key first."""

    table: str
    columns: tuple[str, ...]
    known: tuple[str, ...]

    @property
    def key(self) -> str:
        """The id column."""
        return self.columns[0]


ITEMS = Entity(
    "items",
    ("item_id", "title", "description", "image", "image_path", "image_sha256", "available"),
    ("item_id", "title", "description", "image", "available"),
)
USERS = Entity("users", ("user_id",), ("user_id",))

STAGE = "create temp table {staged} on commit drop as select 0::bigint as row, {columns} from {table} with no data"
COPY = "copy {staged} (row, {columns}) from stdin"
DUPLICATES = """
with firsts as (
    select distinct on ({key}) * from {staged} order by {key}, row
), gone as (
    delete from {staged} s using firsts f where s.{key} = f.{key} and s.row > f.row
    returning s.row, s.{key} as key, f.row as first_row, ({s_columns}) is distinct from ({f_columns}) as differs
)
select count(*) over (), row, key, first_row from gone where differs order by row limit %(limit)s
"""
# Without --images nothing new is known of the files: what is stored stays with the names it belongs to.
KEEP_IMAGES = """
update staged_items s set image_path = i.image_path, image_sha256 = i.image_sha256
from items i where i.item_id = s.item_id and i.image = s.image
"""
UPSERT = """
with written as (
    insert into {table} as stored ({columns}) select {columns} from {staged} order by row
    on conflict ({key}) do update set ({columns}, updated_at) = row ({excluded}, now())
    where ({stored}) is distinct from ({excluded})
    returning xmax = 0 as new
)
select count(*) filter (where new), count(*) filter (where not new) from written
"""


def load_items(
    connection: psycopg.Connection[Any],
    source: Source,
    rejections: Rejections,
    images: Path | None,
    *,
    progress: bool,
) -> dict[str, int]:
    """Loads the catalogue; counts of rows read, new, changed, unchanged, rejected, and of images taken and dropped.

    A faulty image is dropped alone: the item stays, without image. UserError when none of the named files exists.
    """
    pictures = None if images is None else _Images(images_root(images), rejections)
    rows = _item_rows(source, rejections, pictures, progress=progress)
    try:
        read = _stage(connection, ITEMS, rows)
    finally:
        if pictures is not None:
            pictures.close()
    if pictures is None:
        connection.execute(KEEP_IMAGES)
    else:
        pictures.refuse_if_all_missing(source.name)
    counts = _upsert(connection, ITEMS, source, rejections, read)
    if pictures is not None:
        counts |= {"images": pictures.taken, "images_dropped": pictures.dropped}
    return counts


def load_users(
    connection: psycopg.Connection[Any], source: Source, rejections: Rejections, *, progress: bool
) -> dict[str, int]:
    """Loads the users' attributes; counts of rows read, new, changed, unchanged and rejected."""
    read = _stage(connection, USERS, _user_rows(source, rejections, progress=progress))
    return _upsert(connection, USERS, source, rejections, read)


Row = tuple[Any, ...]
Image = tuple[str | None, str | None, str | None]


def _item_rows(
    source: Source, rejections: Rejections, pictures: "_Images | None", *, progress: bool
) -> Iterator[tuple[int, list[Row]]]:
    readers = csv_readers(source, ITEMS.known)
    for batch in _batches(source, progress=progress):
        check_columns(batch, ("item_id",))
        checked = Checked(batch)
        checked.read("item_id", ids)
        for name in ("title", "description", "image"):
            checked.read(name, text)
        checked.read("available", flags)
        attributes = _attributes(checked, ITEMS, readers)
        rejections.add_batch(checked)
        found = checked.table().to_pylist()
        named = [(row["row"], row["image"] or None) for row in found]
        images = [(name, None, None) for _, name in named] if pictures is None else pictures.check(source.name, named)
        rows = []
        for row, image in zip(found, images, strict=True):
            number = row["row"]
            json_text = attributes[number - batch.first_row]
            rows.append((number, row["item_id"], row["title"], row["description"], *image, row["available"], json_text))
        yield batch.rows, rows


def _user_rows(source: Source, rejections: Rejections, *, progress: bool) -> Iterator[tuple[int, list[Row]]]:
    readers = csv_readers(source, USERS.known)
    for batch in _batches(source, progress=progress):
        check_columns(batch, ("user_id",))
        checked = Checked(batch)
        checked.read("user_id", ids)
        attributes = _attributes(checked, USERS, readers)
        rejections.add_batch(checked)
        rows = checked.table().to_pylist()
        yield batch.rows, [(row["row"], row["user_id"], attributes[row["row"] - batch.first_row]) for row in rows]


def _batches(source: Source, *, progress: bool) -> Iterator[Batch]:
    with tqdm(total=source.total_rows, desc=source.name, unit=" rows", disable=None if progress else True) as bar:
        for batch in source.batches():
            yield batch
            bar.update(batch.rows)


def _attributes(checked: Checked, entity: Entity, readers: Mapping[str, Reader]) -> list[str]:
    """JSON texts; a row with a zero byte in an attribute is marked, since Postgres cannot hold it."""
    objects = attribute_objects(checked.batch, entity.known, readers)
    texts = [json.dumps(found, ensure_ascii=False) for found in objects]
    for offset, json_text in enumerate(texts):
        if "\\u0000" in json_text:
            column = next(name for name, value in objects[offset].items() if "\\u0000" in json.dumps(value))
            checked.reject(offset, column, "contains a zero byte")
    return texts


class _Images:
    """The images of one load: checked, counted, and those that are not taken reported."""

    def __init__(self, root: Path, rejections: Rejections) -> None:
        self.root = root
        self.rejections = rejections
        self.taken = 0
        self.dropped = 0
        self._checks = ImageChecks(root)

    def check(self, file: str, named: Sequence[tuple[int, str | None]]) -> list[Image]:
        """(image, image_path, image_sha256) for each (row, name); all None without an image or with a faulty one."""
        checked = iter(self._checks.check([name for _, name in named if name is not None]))
        found: list[Image] = []
        for row, name in named:
            image = None if name is None else next(checked)
            if isinstance(image, PictureError):
                self.dropped += 1
                rejection = Rejection(file, row, "image", f"dropped: {image}", shown(name))
                self.rejections.add(rejection, whole_row=False)
            self.taken += isinstance(image, CheckedImage)
            found.append((name, image.path, image.sha256) if isinstance(image, CheckedImage) else (None, None, None))
        return found

    def close(self) -> None:
        self._checks.close()

    def refuse_if_all_missing(self, file: str) -> None:
        if self.dropped and not self.taken:
            message = f"none of the {self.dropped} images that {file} names can be used from {self.root}"
            first = next(str(found) for found in self.rejections.kept if found.column == "image")
            raise UserError(f"{message}; is --images right? The first: {first}")


def _stage(connection: psycopg.Connection[Any], entity: Entity, batches: Iterator[tuple[int, list[Row]]]) -> int:
    connection.execute(_sql(entity, STAGE))
    read = 0
    with connection.cursor() as cursor, cursor.copy(_sql(entity, COPY)) as copy:
        for size, rows in batches:
            for row in rows:
                copy.write_row(row)
            read += size
    return read


def _upsert(
    connection: psycopg.Connection[Any], entity: Entity, source: Source, rejections: Rejections, read: int
) -> dict[str, int]:
    duplicates = connection.execute(_sql(entity, DUPLICATES), {"limit": KEPT_PER_FILE}).fetchall()
    if duplicates:
        head = [
            Rejection(
                source.name, row, entity.key, f"is a duplicate key of row {first}, with other content", shown(key)
            )
            for _, row, key, first in duplicates
        ]
        rejections.add_counted(duplicates[0][0], head)
    rejections.refuse_if_many(source.name, read)
    written = connection.execute(_sql(entity, UPSERT)).fetchone()
    assert written is not None
    new, changed = written
    if new or changed:
        connection.execute(_sql(entity, "analyze {table}"))
    rejected = rejections.rows(source.name)
    unchanged = read - new - changed - rejected
    return {"read": read, "new": new, "changed": changed, "unchanged": unchanged, "rejected": rejected}


def _sql(entity: Entity, template: str) -> sql.Composed:
    columns = (*entity.columns, "attributes")

    def listed(*qualifier: str) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(*qualifier, name) for name in columns)

    return sql.SQL(template).format(
        table=sql.Identifier(entity.table),
        staged=sql.Identifier(f"staged_{entity.table}"),
        key=sql.Identifier(entity.key),
        columns=listed(),
        s_columns=listed("s"),
        f_columns=listed("f"),
        stored=listed("stored"),
        excluded=listed("excluded"),
    )
