"""A generation as Parquet files, for pandas, DuckDB and whatever else reads them: embeddings, interests, candidates.

All files are of one snapshot. They are written beside their place, and moved there when all are complete.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from feature_repo.schema import SPACES
from pipelines.generation.lifecycle import get, has_partitions, live
from polytower.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Rows between two writes: at 64 dimensions some 8 MB.
ROW_CHUNK = 10_000

_EMBEDDINGS = """
select e.item_id, i.title, e.embedding, e.content_embedding, e.id_embedding
from item_embeddings e left join items i using (item_id) where e.generation = %(generation)s order by e.item_id
"""
_INTERESTS = """
select u.user_id, u.interest, u.weight, u.as_of, u.embedding from user_interests u
where u.generation = %(generation)s order by u.user_id, u.interest
"""
# What retrieve() answers, for any generation: interests keep their numbers, seen items are left out.
_CANDIDATES = """
select u.user_id, r.rank, r.item_id, r.score, u.numbers[r.interest + 1], r.interest_rank
from (
    select user_id, array_agg(embedding order by interest) as vectors, array_agg(weight order by interest) as weights,
           array_agg(interest order by interest) as numbers
    from user_interests where generation = %(generation)s group by user_id order by user_id
) u
cross join lateral retrieve_vectors(u.vectors, u.weights, %(k)s, exclude => seen_items(u.user_id),
                                    generation => %(generation)s) r
"""


@dataclass(frozen=True)
class Exported:
    """rows: file → rows in it."""

    folder: Path
    generation: int
    rows: dict[str, int]


def export(
    connection: psycopg.Connection[Any],
    folder: Path,
    *,
    generation: int | None = None,
    k: int = 100,
    progress: bool = False,
) -> Exported:
    """Writes items.parquet, interests.parquet and, unless k is 0, candidates.parquet into a folder that is not there.

    generation: None for the live one. k: candidates of each user, by their stored interests, without what they have
    seen. Raises UserError.
    """
    number = _number(connection, generation)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: name a new folder, or an empty one")
    dim = get(connection, number).dim
    connection.commit()
    files = {
        "items": (_EMBEDDINGS, _items_schema(dim)),
        "interests": (_INTERESTS, _interests_schema(dim)),
        **({"candidates": (_CANDIDATES, _candidates_schema())} if k else {}),
    }
    rows = {}
    with _whole(folder) as partial, connection.transaction():
        connection.execute("set transaction isolation level repeatable read, read only")
        for name, (statement, schema) in files.items():
            path = partial / f"{name}.parquet"
            rows[path.name] = _write(connection, path, statement, {"generation": number, "k": k}, schema, progress)
    return Exported(folder, number, rows)


def _number(connection: psycopg.Connection[Any], generation: int | None) -> int:
    if generation is None:
        now = live(connection)
        if now is None:
            raise UserError("no generation is live; build one with `polytower materialize`")
        return now.generation
    if not has_partitions(connection, get(connection, generation).generation):
        raise UserError(f"generation {generation} was dropped: its vectors are gone")
    return generation


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside it that takes its place in the end, or goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield partial
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(
    connection: psycopg.Connection[Any],
    path: Path,
    statement: str,
    asked: Mapping[str, Any],
    schema: "pa.Schema",
    progress: bool,
) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tqdm import tqdm

    count = 0
    with (
        pq.ParquetWriter(path, schema, compression="zstd") as writer,
        connection.cursor("export", binary=True) as cursor,
        tqdm(desc=path.name, unit="row", disable=None if progress else True) as bar,
    ):
        cursor.execute(statement, asked)
        while found := cursor.fetchmany(ROW_CHUNK):
            columns = zip(*found, strict=True)
            arrays = [_array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            count += len(found)
            bar.update(len(found))
    return count


def _array(column: Sequence[Any], kind: "pa.DataType") -> "pa.Array":
    """Vectors become lists of one length, everything else what it is."""
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(kind):
        return pa.array(column, kind)
    missing = np.array([vector is None for vector in column])
    values = np.zeros((len(column), kind.list_size), np.float32)
    for place in np.flatnonzero(~missing).tolist():
        values[place] = column[place].to_numpy()
    return pa.FixedSizeListArray.from_arrays(values.ravel(), type=kind, mask=pa.array(missing))


def _items_schema(dim: int) -> "pa.Schema":
    import pyarrow as pa

    vectors = [(column, pa.list_(pa.float32(), dim)) for column in SPACES.values()]
    return pa.schema([("item_id", pa.string()), ("title", pa.string()), *vectors])


def _interests_schema(dim: int) -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("user_id", pa.string()),
            ("interest", pa.int16()),
            ("weight", pa.float32()),
            ("as_of", pa.timestamp("us", "UTC")),
            ("embedding", pa.list_(pa.float32(), dim)),
        ]
    )


def _candidates_schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        [
            ("user_id", pa.string()),
            ("rank", pa.int32()),
            ("item_id", pa.string()),
            ("score", pa.float32()),
            ("interest", pa.int16()),
            ("interest_rank", pa.int32()),
        ]
    )
