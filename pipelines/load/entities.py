"""Items and users: COPY into a staging table, duplicates out, then an upsert that touches only what differs.

Everything here runs inside the caller's transaction. A row changes the columns that it names, and those alone: an
empty cell empties, a column that the file lacks leaves what is there (of a new item: null, available).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from tqdm import tqdm

from encoders.content.picture import PictureError
from pipelines.load.attribute_types import described, mixed_types
from pipelines.load.attributes import Attributes, read_attributes
from pipelines.load.columns import Checked, flags, shown, text
from pipelines.load.contract import Batch, Source, check_columns
from pipelines.load.csv_records import MAX_ROW_BYTES
from pipelines.load.forgotten import leave_out
from pipelines.load.images import CheckedImage, ImageChecks, images_root
from pipelines.load.own_columns import OwnColumns, own_modalities, refuse_mixed
from pipelines.load.rejections import KEPT_PER_FILE, Rejection, Rejections
from polytower.errors import UserError

# Which columns a stored one depends on, by the name that says whether a row gives it.
_GIVEN_AS = {"image_path": "image", "image_sha256": "image"} | {
    column: record.name for record in own_modalities() for column in record.reads
}


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
    (
        *("item_id", "title", "description", "image", "image_path", "image_sha256", "available"),
        *(column for record in own_modalities() for column in record.reads),
    ),
    ("item_id", "title", "description", "image", "available"),
)
USERS = Entity("users", ("user_id",), ("user_id",))

# lacks: the columns that a row does not name; attributes that it names without a value are null in it.
STAGE = """
create temp table {staged} on commit drop as
select 0::bigint as row, '{{}}'::text[] as lacks, {columns} from {table} with no data
"""
COPY = "copy {staged} (row, lacks, {columns}) from stdin"
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
    insert into {table} as stored ({columns})
    select {merged}, jsonb_strip_nulls(coalesce(t.attributes, '{{}}') || s.attributes)
    from {staged} s left join {table} t on t.{key} = s.{key} order by s.row
    on conflict ({key}) do update set ({columns}, updated_at) = row ({excluded}, now())
    where ({stored}) is distinct from ({excluded})
    returning xmax = 0 as new
)
select count(*) filter (where new), count(*) filter (where not new) from written
"""


@dataclass(frozen=True)
class Loaded:
    """What came of one file. counts: what → rows. attributes: name → type. warnings: what somebody should look at."""

    counts: dict[str, int]
    attributes: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def load_items(
    connection: psycopg.Connection[Any],
    source: Source,
    rejections: Rejections,
    images: Path | None,
    own: Mapping[str, str] | None = None,
    *,
    progress: bool,
) -> Loaded:
    """Loads the catalogue; counts of rows read, new, changed, unchanged, rejected, and of images taken and dropped.

    own: modality → the column that holds it. A faulty image is dropped alone: the item stays, without image. UserError
    when none of the named files exists.
    """
    pictures = None if images is None else _Images(images_root(images), rejections)
    columns = OwnColumns(own, ITEMS.known)
    attributes = read_attributes(source, (*ITEMS.known, *columns.columns.values()))
    rows = item_rows(source, attributes, rejections, pictures, columns, progress=progress)
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
    refuse_mixed(connection, columns)
    warnings = _mixed_types(connection, ITEMS, source, attributes, counts) + _look_like_vectors(source, attributes)
    if pictures is not None:
        counts |= {"images": pictures.taken, "images_dropped": pictures.dropped}
    return Loaded(counts, described(attributes.met), warnings)


def load_users(
    connection: psycopg.Connection[Any], source: Source, rejections: Rejections, *, progress: bool
) -> Loaded:
    """Loads the users' attributes; counts of rows read, new, changed, unchanged and rejected."""
    attributes = read_attributes(source, USERS.known)
    read = _stage(connection, USERS, user_rows(source, attributes, rejections, progress=progress))
    counts = _upsert(connection, USERS, source, rejections, read)
    return Loaded(counts, described(attributes.met), _mixed_types(connection, USERS, source, attributes, counts))


def _mixed_types(
    connection: psycopg.Connection[Any], entity: Entity, source: Source, attributes: Attributes, counts: dict[str, int]
) -> list[str]:
    if not (counts["new"] or counts["changed"]):
        return []
    return mixed_types(connection, entity.table, entity.key, source.name, attributes.met)


def _look_like_vectors(source: Source, attributes: Attributes) -> list[str]:
    return [
        f"{source.name}: column {name} holds lists of {width} numbers and was taken as an attribute;"
        f" looks like embeddings: --vectors {name}"
        for name, width in attributes.wide.items()
    ]


Row = tuple[Any, ...]
Image = tuple[str | None, str | None, str | None]


def item_rows(
    source: Source,
    attributes: Attributes,
    rejections: Rejections,
    pictures: "_Images | None",
    own: OwnColumns,
    *,
    progress: bool,
) -> Iterator[tuple[int, list[Row]]]:
    """Batch by batch: its size, and its sound rows as STAGE wants them."""
    met: dict[str, None] = {}
    for batch in _batches(source, progress=progress):
        met |= dict.fromkeys(batch.columns)
        check_columns(batch, ("item_id",))
        checked = Checked(batch)
        checked.read_id("item_id")
        for name in ("title", "description", "image"):
            checked.read(name, text)
        checked.read("available", flags)
        contents = own.read(checked)
        texts = _attribute_texts(checked, attributes, own.columns.values())
        rejections.add_batch(checked)
        found = checked.table().to_pylist()
        named = [(row["row"], row["image"] or None) for row in found]
        images = [(name, None, None) for _, name in named] if pictures is None else pictures.check(source.name, named)
        rows = []
        for row, image in zip(found, images, strict=True):
            number = row["row"]
            offset = number - batch.first_row
            known = (row["item_id"], row["title"], row["description"], *image, row["available"])
            lacks = _lacks(batch, offset) + own.lacks(batch, offset)
            rows.append((number, lacks, *known, *contents[offset], texts[offset]))
        yield batch.rows, rows
    own.refuse_missing(source, list(met))


def user_rows(
    source: Source, attributes: Attributes, rejections: Rejections, *, progress: bool
) -> Iterator[tuple[int, list[Row]]]:
    """Batch by batch: its size, and its sound rows as STAGE wants them."""
    for batch in _batches(source, progress=progress):
        check_columns(batch, ("user_id",))
        checked = Checked(batch)
        checked.read_id("user_id")
        texts = _attribute_texts(checked, attributes)
        rejections.add_batch(checked)
        rows = checked.table().to_pylist()
        yield batch.rows, [(row["row"], [], row["user_id"], texts[row["row"] - batch.first_row]) for row in rows]


def _lacks(batch: Batch, offset: int) -> list[str]:
    return [name for name in ITEMS.known[1:] if not batch.gives(offset, name)]


def _batches(source: Source, *, progress: bool) -> Iterator[Batch]:
    with tqdm(total=source.total_rows, desc=source.name, unit=" rows", disable=None if progress else True) as bar:
        for batch in source.batches():
            yield batch
            bar.update(batch.rows)


def _attribute_texts(checked: Checked, attributes: Attributes, gone: Iterable[str] = ()) -> list[str]:
    """JSON texts; a row whose attributes Postgres cannot hold is marked. gone: attributes that a row takes away."""
    objects = [dict.fromkeys(gone) | found for found in attributes.objects(checked)]
    texts = [json.dumps(found, ensure_ascii=False) for found in objects]
    for offset, json_text in enumerate(texts):
        if "\\u0000" in json_text:
            column = next(name for name, value in objects[offset].items() if "\\u0000" in json.dumps({name: value}))
            checked.reject(offset, column, "contains a zero byte")
        elif len(json_text) > MAX_ROW_BYTES:
            column = max(objects[offset], key=lambda name: len(json.dumps(objects[offset][name])))
            checked.reject(offset, column, f"is longer than {MAX_ROW_BYTES >> 20} MiB")
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
            message = f"none of the {self.dropped} images named in {file} can be used from {self.root}"
            first = next(str(found) for found in self.rejections.kept if found.column == "image")
            raise UserError(f"{message}; is --images the right folder? The first: {first}")


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
    forgotten = leave_out(connection, entity.table, entity.key)
    duplicates = connection.execute(_sql(entity, DUPLICATES), {"limit": KEPT_PER_FILE}).fetchall()
    if duplicates:
        head = [
            Rejection(source.name, row, entity.key, f"repeats the key of row {first} with other content", shown(key))
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
    unchanged = read - new - changed - rejected - forgotten
    counts = {"read": read, "new": new, "changed": changed, "unchanged": unchanged, "rejected": rejected}
    return counts | ({"forgotten": forgotten} if forgotten else {})


def _sql(entity: Entity, template: str) -> sql.Composed:
    columns = (*entity.columns, "attributes")

    def listed(*qualifier: str) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(*qualifier, name) for name in columns)

    return sql.SQL(template).format(
        table=sql.Identifier(entity.table),
        staged=sql.Identifier(f"staged_{entity.table}"),
        key=sql.Identifier(entity.key),
        merged=sql.SQL(", ").join(_merged(entity, name) for name in entity.columns),
        columns=listed(),
        s_columns=listed("s"),
        f_columns=listed("f"),
        stored=listed("stored"),
        excluded=listed("excluded"),
    )


def _merged(entity: Entity, name: str) -> sql.Composed:
    """A column of a staged row; where the row does not name it, what is stored."""
    staged = sql.Identifier("s", name)
    if name == entity.key:
        return sql.SQL("{}").format(staged)
    named = _GIVEN_AS.get(name, name)
    return sql.SQL("case when {named} = any(s.lacks) and t.{key} is not null then t.{column} else {staged} end").format(
        named=sql.Literal(named), key=sql.Identifier(entity.key), column=sql.Identifier(name), staged=staged
    )
