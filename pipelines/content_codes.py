"""Content codes: 16 bytes an item and modality for the search over long histories, and four numbers as semantic ID.

A set of codebooks is kept as long as it fits the encoders in force, so that what rankers learned of codes stays true;
items whose content is new to it are coded by it. It is trained anew where an encoder changed, a modality came or went,
or the catalogue is more than twice what it was trained on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import psycopg
from psycopg.types.json import Jsonb

from encoders.codes.codec import Codec, train_codec
from encoders.codes.quantise import LEVELS, SUBSPACES, Product, Residual
from encoders.codes.space import DIM, Placing
from polytower import locks

LOCK = "polytower.codes"
# Items of each modality that a set is trained on, at most: 80 for each centroid.
TRAINED_ON = 20_000
GROWTH = 2
# Items that are read and coded at once.
ITEMS_BATCH = 5_000

_ACTIVE = "select modality, revision from content_encoders where active order by modality limit 100"

# By the hash of their ids, so that two runs train on the same items, and mostly the same ones of every modality.
_SAMPLE = """
with known as (select item_id, row_number() over (partition by modality order by md5(item_id)) as place
               from content_embeddings join content_encoders using (modality, revision) where active)
select distinct item_id from known where place <= %(count)s order by item_id
"""

_KNOWN = """
select count(distinct item_id) from content_embeddings join content_encoders using (modality, revision) where active
"""

_CONTENT = """
select item_id, modality, embedding, encoded_at
from content_embeddings join content_encoders using (modality, revision)
where active and item_id = any(%(item_ids)s) order by item_id
"""

_COUNTS = """
select modality, count(item_id) from content_encoders left join content_embeddings using (modality, revision)
where active group by modality order by modality
"""

# Items whose codes are missing, of other content, or of content that is gone.
_CHANGED = """
with wanted as (
    select e.item_id, b.codebook_id, e.encoded_at
    from codebooks b join content_embeddings e using (modality, revision) where b.code_set = %(code_set)s
), there as (
    select c.item_id, c.codebook_id, c.encoded_at
    from codebooks b join content_codes c using (codebook_id) where b.code_set = %(code_set)s
)
select distinct item_id from wanted full join there using (item_id, codebook_id)
where wanted.encoded_at is distinct from there.encoded_at order by item_id
"""

_FORGET = (
    """delete from content_codes using codebooks b
       where content_codes.codebook_id = b.codebook_id and b.code_set = %(code_set)s and item_id = any(%(item_ids)s)""",
    "delete from semantic_ids where code_set = %(code_set)s and item_id = any(%(item_ids)s)",
)

_MEASURED = "update code_sets set metrics = metrics || %s where code_set = %s"
_COPY_CODES = "copy content_codes (codebook_id, item_id, codes, encoded_at) from stdin (format binary)"
_COPY_NAMES = "copy semantic_ids (code_set, item_id, semantic_id) from stdin (format binary)"


@dataclass(frozen=True)
class CodesRun:
    """What one run did. trained: the set is new; why. coded: items; removed: items that lost their content."""

    trained: bool
    why: str
    coded: int = 0
    removed: int = 0


@dataclass(frozen=True)
class CodesReport:
    """A set of codes after a run. code_set: None where no item has content.

    items: that have codes. bytes: of all codes and semantic IDs. centroids: by modality, of each sub-space. cosine: by
    modality, between embeddings in the common space and what their codes stand for, mean over what the last run coded.
    distinct: share of the items whose semantic ID no other has.
    """

    code_set: int | None
    run: CodesRun
    items: int = 0
    bytes: int = 0
    centroids: Mapping[str, int] = field(default_factory=dict)
    cosine: Mapping[str, float] = field(default_factory=dict)
    distinct: float = 1.0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def code_content(connection: psycopg.Connection[Any], *, take_over: bool = False) -> CodesReport:
    """Brings the codes up to date with the content embeddings, all or nothing.

    connection: commits what the caller left open, and its own work. take_over: from another run that codes.
    """
    started = perf_counter()
    connection.commit()
    with locks.held(connection, LOCK, take_over=take_over), connection.transaction():
        counts = dict(connection.execute(_COUNTS).fetchall())
        before, why = _kept(connection, counts)
        if not any(counts.values()):
            connection.execute("delete from code_sets")
            return CodesReport(None, CodesRun(False, "no item has content"), seconds=perf_counter() - started)
        number = _trained(connection) if before is None else before
        coded, removed, cosine = _bring_up_to_date(connection, number, read_codec(connection, number))
        if cosine:
            connection.execute(_MEASURED, [Jsonb({"cosine": cosine}), number])
        return _report(connection, number, CodesRun(before is None, why, coded, removed), started)


def read_codec(connection: psycopg.Connection[Any], code_set: int) -> Codec:
    """The codec of a set."""
    query = "select weights, residual_centroids from code_sets where code_set = %s"
    weights, residual = _one(connection, query, code_set)
    books = connection.execute(
        "select modality, mean, directions, subspaces, centroids from codebooks where code_set = %s order by modality",
        [code_set],
        binary=True,
    ).fetchall()
    return Codec(
        {name: Placing(_floats(mean), _floats(rows).reshape(-1, DIM)) for name, mean, rows, _, _ in books},
        {name: Product(_floats(rows).reshape(count, -1, DIM // count)) for name, _, _, count, rows in books},
        Residual(_floats(residual).reshape(LEVELS, -1, DIM)),
        weights,
    )


def _kept(connection: psycopg.Connection[Any], counts: Mapping[str, int]) -> tuple[int | None, str]:
    """(the set in force if it is still of use, why it is kept or another one made)."""
    row = connection.execute("select code_set, revisions, trained_on from code_sets where active").fetchone()
    if row is None:
        return None, "there were no codes"
    number, revisions, trained_on = row
    changed = {name for name, revision in connection.execute(_ACTIVE) if revisions.get(name) != revision}
    if changed:
        return None, f"another encoder is in force for {', '.join(sorted(changed))}"
    coded = {name for (name,) in connection.execute("select modality from codebooks where code_set = %s", [number])}
    known = {name for name, count in counts.items() if count}
    if coded != known:
        return None, f"items have {', '.join(sorted(known)) or 'no content'} now, and had {', '.join(sorted(coded))}"
    (items,) = _one(connection, _KNOWN)
    if items > GROWTH * trained_on:
        return None, f"the catalogue grew from {trained_on} to {items} items"
    return number, "the encoders are the same"


def _trained(connection: psycopg.Connection[Any]) -> int:
    """A new set, in force; the one before is gone, with its codes."""
    sample = [item_id for (item_id,) in connection.execute(_SAMPLE, {"count": TRAINED_ON})]
    content, present, _ = _read(connection, sample)
    known = sorted(name for name, there in present.items() if there.any())
    codec = train_codec({name: content[name] for name in known}, {name: present[name] for name in known})
    connection.execute("delete from code_sets")
    (items,) = _one(connection, _KNOWN)
    row = connection.execute(
        """insert into code_sets (revisions, weights, trained_on, dim, levels, residual_centroids, active)
           values (%s, %s, %s, %s, %s, %s, true) returning code_set""",
        [Jsonb(dict(connection.execute(_ACTIVE).fetchall())), Jsonb(dict(codec.weights)), items, DIM, LEVELS,
         _list(codec.names.centroids)],
    ).fetchone()  # fmt: skip
    assert row is not None
    for name in known:
        placing, product = codec.placings[name], codec.quantisers[name]
        connection.execute(
            """insert into codebooks (code_set, modality, revision, mean, directions, subspaces, centroids)
               select %s, modality, revision, %s, %s, %s, %s from content_encoders where active and modality = %s""",
            [row[0], _list(placing.mean), _list(placing.directions), SUBSPACES, _list(product.centroids), name],
        )
    return int(row[0])


def _bring_up_to_date(
    connection: psycopg.Connection[Any], code_set: int, codec: Codec
) -> tuple[int, int, dict[str, float]]:
    """Codes what is new to the set: (items coded, items that have no content any more, mean cosine by modality)."""
    books = dict(connection.execute("select modality, codebook_id from codebooks where code_set = %s", [code_set]))
    sums, counts = dict.fromkeys(books, 0.0), dict.fromkeys(books, 0)
    coded = removed = 0
    for item_ids in _batches(connection, code_set):
        for statement in _FORGET:
            connection.execute(statement, {"code_set": code_set, "item_ids": item_ids})
        content, present, times = _read(connection, item_ids)
        known = np.flatnonzero(np.logical_or.reduce([present[name] for name in books]))
        removed += len(item_ids) - len(known)
        coded += len(known)
        encoded = codec.encode({name: content[name] for name in books}, {name: present[name] for name in books})
        with connection.cursor() as cursor:
            with cursor.copy(_COPY_CODES) as copy:
                copy.set_types(["int8", "text", "bytea", "timestamptz"])
                for name, book in books.items():
                    for row in np.flatnonzero(present[name]).tolist():
                        copy.write_row((book, item_ids[row], encoded.codes[name][row].tobytes(), times[name][row]))
            with cursor.copy(_COPY_NAMES) as copy:
                copy.set_types(["int8", "text", "int2[]"])
                for row in known.tolist():
                    copy.write_row((code_set, item_ids[row], encoded.semantic_ids[row].tolist()))
        for name in books:
            sums[name] += float(encoded.cosines[name].sum())
            counts[name] += len(encoded.cosines[name])
    return coded, removed, {name: sums[name] / counts[name] for name in books if counts[name]}


def _batches(connection: psycopg.Connection[Any], code_set: int) -> Iterator[list[str]]:
    """Items whose codes have to be made or removed."""
    with connection.cursor("changed_content") as cursor:
        cursor.execute(_CHANGED, {"code_set": code_set})
        while rows := cursor.fetchmany(ITEMS_BATCH):
            yield [item_id for (item_id,) in rows]


def _read(
    connection: psycopg.Connection[Any], item_ids: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, dict[int, Any]]]:
    """(content, present, times of encoding) of these items, by modality; of encoders in force."""
    place = {item_id: row for row, item_id in enumerate(item_ids)}
    widths = dict(connection.execute("select modality, dim from content_encoders where active").fetchall())
    content = {name: np.zeros((len(item_ids), width), np.float32) for name, width in widths.items()}
    present = {name: np.zeros(len(item_ids), bool) for name in widths}
    times: dict[str, dict[int, Any]] = {name: {} for name in widths}
    with connection.cursor(binary=True) as cursor:
        for item_id, name, embedding, encoded_at in cursor.execute(_CONTENT, {"item_ids": item_ids}):
            row = place[item_id]
            content[name][row], present[name][row], times[name][row] = embedding.to_numpy(), True, encoded_at
    return content, present, times


def _report(connection: psycopg.Connection[Any], code_set: int, run: CodesRun, started: float) -> CodesReport:
    items, distinct = _one(
        connection,
        """select coalesce(sum(count), 0)::bigint, coalesce(sum(count) filter (where count = 1), 0)::bigint
           from (select count(*) from semantic_ids where code_set = %s group by semantic_id) as names (count)""",
        code_set,
    )
    (metrics,) = _one(connection, "select metrics from code_sets where code_set = %s", code_set)
    sizes = connection.execute(
        """select modality, subspaces, cardinality(centroids), count(item_id)
           from codebooks left join content_codes using (codebook_id)
           where code_set = %s group by codebook_id order by modality""",
        [code_set],
    ).fetchall()
    return CodesReport(
        code_set,
        run,
        items=items,
        bytes=sum(subspaces * count for _, subspaces, _, count in sizes) + LEVELS * items,
        centroids={name: numbers // DIM for name, _, numbers, _ in sizes},
        cosine=metrics["cosine"],
        distinct=distinct / items if items else 1.0,
        seconds=perf_counter() - started,
    )


def _one(connection: psycopg.Connection[Any], query: Any, *parameters: Any) -> tuple[Any, ...]:
    row = connection.execute(query, parameters).fetchone()
    assert row is not None
    return tuple(row)


def _floats(numbers: Any) -> np.ndarray:
    return np.asarray(numbers, np.float32)


def _list(numbers: np.ndarray) -> list[float]:
    return [float(number) for number in numbers.ravel()]
