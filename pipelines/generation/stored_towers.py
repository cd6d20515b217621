"""The towers that travel with a generation, read back as a server reads them."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg

from encoders.catalogue import Histories
from pipelines.generation.embedding_gates import Floats
from polytower.errors import UserError

if TYPE_CHECKING:
    from encoders.towers.model import Asked, Reader

USER_TOWER, CONTENT_TOWER = "user_tower", "content"
PART = "select weights, config from towers where generation = %s and part = %s"
EMBEDDINGS = """
select item_id, embedding from item_embeddings where generation = %(generation)s and item_id = any(%(items)s)
"""
CONTENT = """
select c.item_id, c.embedding from generations g
join content_embeddings c on c.modality = %(modality)s and c.revision = g.config -> 'encoders' ->> %(modality)s
where g.generation = %(generation)s and c.item_id = any(%(items)s)
"""
QUERIES = """
select q.query_key, q.embedding from generations g
join query_embeddings q on q.revision = g.config -> 'encoders' ->> 'text'
where g.generation = %(generation)s and q.query_key = any(%(keys)s) order by q.query_key collate "C"
"""


def stored_user_tower(connection: psycopg.Connection[Any], generation: int) -> "Reader | None":
    """A generation's user tower; None where there is none, or none that can be read."""
    from encoders.training.checkpoint import load_user_tower

    row = connection.execute(PART, [generation, USER_TOWER]).fetchone()
    try:
        return None if row is None else load_user_tower(bytes(row[0]), row[1])
    except UserError:
        return None


def stored_content_tower(connection: psycopg.Connection[Any], generation: int) -> "Asked | None":
    """A generation's content tower; None where there is none, or none that can be read."""
    from encoders.training.checkpoint import load_content_tower

    row = connection.execute(PART, [generation, CONTENT_TOWER]).fetchone()
    try:
        return None if row is None else load_content_tower(bytes(row[0]), row[1])
    except UserError:
        return None


def event_rows(
    connection: psycopg.Connection[Any], generation: int, tower: "Reader", item_ids: Collection[str]
) -> dict[str, Floats]:
    """What the user tower reads of these items, [X] each: their embeddings, or their content side by side.

    Items of which there is nothing to read are left out.
    """
    values = {"generation": generation, "items": list(item_ids)}
    if not tower.reads:
        rows = connection.execute(EMBEDDINGS, values, binary=True)
        return {item_id: embedding.to_numpy().astype(np.float32) for item_id, embedding in rows}
    found: dict[str, Floats] = {}
    start = 0
    for modality, width in tower.reads:
        for item_id, embedding in connection.execute(CONTENT, {**values, "modality": modality}, binary=True):
            row = found.setdefault(item_id, np.zeros(tower.width, np.float32))
            row[start : start + width] = embedding.to_numpy()
        start += width
    return found


def with_queries(
    connection: psycopg.Connection[Any],
    generation: int,
    tower: "Reader",
    histories: Histories,
    keys: Sequence[str | None],
) -> Histories:
    """The histories with what was searched for at each event, if the tower reads that. keys: query_key of each event,
    None for none; one that the generation's text encoder has not embedded counts as none.
    """
    if not tower.config.query_dim:
        return histories
    wanted = {"generation": generation, "keys": sorted({key for key in keys if key is not None})}
    found = {key: vector.to_numpy() for key, vector in connection.execute(QUERIES, wanted, binary=True)}
    if not found:
        return histories
    place = {key: row for row, key in enumerate(found)}
    of_event = np.array([-1 if key is None else place.get(key, -1) for key in keys], np.int64)
    return replace(histories, queries=of_event, query_vectors=np.stack(list(found.values())).astype(np.float32))
