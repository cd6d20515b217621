"""Replay: what the stored towers and the checkpoint say now is what lies in the generation's tables.

Users go through the stored user tower from the stored items, as a server sends them; items through the stored content
tower; and items through the checkpoint's towers, with their ID. All through the towers' public methods.

Legend: N items, U users, K interests, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from encoders.catalogue import Catalogue, Histories
from encoders.content.attributes import user_vectors
from pipelines.generation import lifecycle
from pipelines.generation.embedding_gates import Floats, Gate
from pipelines.generation.stored_towers import event_rows, stored_content_tower, stored_user_tower, with_queries
from pipelines.generation.training import located, read_snapshot
from polytower.errors import UserError

if TYPE_CHECKING:
    from encoders.towers.model import Interests, Reader

USERS, ITEMS = 300, 500
# Halves in, halves out: what is the same differs by a few ten-thousandths of a cosine, and weights by as much.
SAME, WEIGHT_APART = 0.999, 0.01

# Users of whom nothing has arrived since the build: the others' interests are another question (stale_users).
CHOSEN = """
with chosen as (
    select user_id, max(events) as known from user_interests where generation = %(generation)s
    group by user_id order by md5(user_id) limit %(users)s
)
select user_id from chosen where known is not distinct from (
    select count(*) from interactions i join items using (item_id) where i.user_id = chosen.user_id)
"""
EVENTS = """
select i.user_id, i.item_id, (extract(epoch from i.occurred_at) * 1000000)::bigint, query_key(i.query)
from interactions i join items using (item_id)
where i.user_id = any(%(users)s) order by i.user_id, i.occurred_at, i.position
"""
INTERESTS = """
select user_id, interest, embedding, weight from user_interests
where generation = %(generation)s and user_id = any(%(users)s)
"""
STORED_ITEMS = """
select item_id, embedding, content_embedding, id_embedding from item_embeddings e
where generation = %(generation)s and exists (select from items i where i.item_id = e.item_id)
order by md5(item_id) limit %(items)s
"""
CONTENT = """
select item_id, embedding from content_embeddings
where modality = %(modality)s and revision = %(revision)s and item_id = any(%(items)s)
"""

REPLAY_GATES = ("stored_towers", "user_replay", "weight_replay", "content_tower_replay", "item_replay")


def replay_gates(connection: psycopg.Connection[Any], generation: int) -> list[Gate]:
    """The gates, in the order of REPLAY_GATES; one that did not come of a checkpoint has nothing to replay."""
    found = lifecycle.get(connection, generation)
    if not found.checkpoint_sha256:
        return [Gate(name, None, 1.0, "at least") for name in REPLAY_GATES]
    tower = stored_user_tower(connection, generation)
    stored = _stored_items(connection, generation)
    cosine, apart = (None, None) if tower is None else _user_replay(connection, generation, tower)
    directory = located(found.checkpoint_path)
    encoders = found.config.get("encoders", {})
    return [
        Gate("stored_towers", _readable(connection, generation, stored, there=tower is not None), 1.0, "at least"),
        Gate("user_replay", cosine, SAME, "at least"),
        Gate("weight_replay", apart, WEIGHT_APART, "at most"),
        Gate("content_tower_replay", _content_replay(connection, generation, stored, encoders), SAME, "at least"),
        Gate("item_replay", _item_replay(connection, directory, stored, encoders), SAME, "at least"),
    ]


@dataclass(frozen=True, eq=False)
class Stored:
    """A sample of a generation's items. vectors: space -> [N, D], zero rows where there is none (`present`)."""

    ids: Sequence[str]
    vectors: Mapping[str, Floats]
    present: Mapping[str, NDArray[np.bool_]]


def _stored_items(connection: psycopg.Connection[Any], generation: int) -> Stored:
    values = {"generation": generation, "items": ITEMS}
    rows = sorted(connection.execute(STORED_ITEMS, values, binary=True).fetchall(), key=lambda row: row[0].encode())
    dim = lifecycle.get(connection, generation).dim
    vectors, present = {}, {}
    for place, space in enumerate(("item", "content", "id"), 1):
        present[space] = np.array([row[place] is not None for row in rows], bool)
        vectors[space] = np.zeros((len(rows), dim), np.float32)
        for number, row in enumerate(rows):
            if row[place] is not None:
                vectors[space][number] = row[place].to_numpy()
    return Stored([row[0] for row in rows], vectors, present)


def _readable(connection: psycopg.Connection[Any], generation: int, stored: Stored, *, there: bool) -> float:
    """The share of the parts that a server needs which are there and can be read."""
    parts = [there]
    if stored.present["content"].any():
        parts.append(stored_content_tower(connection, generation) is not None)
    return float(np.mean(parts))


def _user_replay(
    connection: psycopg.Connection[Any], generation: int, tower: "Reader"
) -> tuple[float | None, float | None]:
    """(smallest cosine, largest difference of weights) between the interests of sampled users, replayed and stored."""
    chosen = [row[0] for row in connection.execute(CHOSEN, {"generation": generation, "users": USERS}).fetchall()]
    if not chosen:
        return None, None
    replayed = _replayed(connection, generation, tower, chosen)
    vectors_UKD, weights_UK = replayed.vectors.numpy(), replayed.weights.numpy()
    stored_UKD, stored_UK = np.zeros_like(vectors_UKD), np.zeros_like(weights_UK)
    place = {user_id: number for number, user_id in enumerate(chosen)}
    rows = connection.execute(INTERESTS, {"generation": generation, "users": chosen}, binary=True)
    for user_id, interest, embedding, weight in rows:
        if not 0 <= interest < stored_UK.shape[1]:
            return 0.0, None
        stored_UKD[place[user_id], interest] = embedding.to_numpy()
        stored_UK[place[user_id], interest] = weight
    used = (weights_UK > 0) | (stored_UK > 0)
    apart = np.abs(np.where(weights_UK > 0, weights_UK, 0) - stored_UK)[used]
    return smallest_cosine(vectors_UKD[used], stored_UKD[used]), float(apart.max(initial=0))


def _replayed(
    connection: psycopg.Connection[Any], generation: int, tower: "Reader", users: Sequence[str]
) -> "Interests":
    import torch

    from encoders.evaluation.evaluate import context_of, padded

    place = {user_id: number for number, user_id in enumerate(users)}
    rows = connection.execute(EVENTS, {"users": list(users)}).fetchall()
    known = event_rows(connection, generation, tower, {item_id for _, item_id, *_ in rows})
    # An item of which nothing is stored: a zero row, as in the build.
    matrix = np.stack([np.zeros(tower.width, np.float32), *known.values()])
    items = {item_id: number for number, item_id in enumerate(known, 1)}
    events: list[list[tuple[int, int, str | None]]] = [[] for _ in users]
    for user_id, item_id, time, key in rows:
        events[place[user_id]].append((items.get(item_id, 0), time, key))
    flat = [event for own in events for event in own]
    histories = Histories(
        list(users),
        np.cumsum([0, *map(len, events)]).astype(np.int64),
        np.array([item for item, _, _ in flat], np.int64),
        np.array([time for _, time, _ in flat], np.int64),
        _attributes(connection, users, tower.config.user_attributes),
    )
    histories = with_queries(connection, generation, tower, histories, [key for _, _, key in flat])
    rows_UT, mask_UT = padded(histories, tower.config.history)
    with torch.inference_mode():
        vectors = torch.from_numpy(matrix)[rows_UT]
        return tower.interests(vectors, mask_UT, context_of(histories, tower.config))


def _attributes(connection: psycopg.Connection[Any], users: Sequence[str], width: int) -> Floats | None:
    if not width:
        return None
    rows = connection.execute("select user_id, attributes from users where user_id = any(%s)", [list(users)])
    known = dict(rows.fetchall())
    return user_vectors([known.get(user_id, {}) for user_id in users], width)


def _content_replay(
    connection: psycopg.Connection[Any], generation: int, stored: Stored, encoders: Mapping[str, str]
) -> float | None:
    """Smallest cosine between the content embeddings of sampled items, through the stored tower and as stored."""
    import torch

    tower = stored_content_tower(connection, generation)
    if tower is None:
        return None
    catalogue = _catalogue(connection, stored.ids, tuple(tower.widths.items()), encoders)
    told = np.any([*catalogue.present.values()], axis=0)
    with torch.inference_mode():
        rows = tower(
            {name: torch.from_numpy(values) for name, values in catalogue.content.items()},
            {name: torch.from_numpy(values) for name, values in catalogue.present.items()},
        ).numpy()
    told &= (rows != 0).any(axis=1)
    either = told | stored.present["content"]
    return smallest_cosine((rows * told[:, None])[either], stored.vectors["content"][either])


def _item_replay(
    connection: psycopg.Connection[Any], directory: Path | None, stored: Stored, encoders: Mapping[str, str]
) -> float | None:
    """Smallest cosine between item, content and ID embeddings of sampled items, by the checkpoint and as stored."""
    from encoders.training import checkpoint

    if directory is None or not len(stored.ids):
        return None
    try:
        modalities = checkpoint.towers_config(directory).modalities
        trained_ids, _ = read_snapshot(directory)
        # Content is an input: of the items that were trained on, none is needed to read the weights.
        empty = {name: np.zeros((len(trained_ids), width), np.float32) for name, width in modalities}
        nowhere = {name: np.zeros(len(trained_ids), bool) for name, _ in modalities}
        towers, _, _ = checkpoint.load(directory, Catalogue(trained_ids, empty, nowhere))
    except UserError:
        return 0.0
    sample = _catalogue(connection, stored.ids, modalities, encoders)
    found = towers.over(trained_ids, sample).item_embeddings()
    told = {"item": found.has_content | found.has_id, "content": found.has_content, "id": found.has_id}
    worst = []
    for space, rows in (("item", found.item), ("content", found.content), ("id", found.id)):
        here = told[space].numpy()
        either = here | stored.present[space]
        if either.any():
            worst.append(smallest_cosine((rows.numpy() * here[:, None])[either], stored.vectors[space][either]))
    return min(worst) if worst else None


def _catalogue(
    connection: psycopg.Connection[Any],
    ids: Sequence[str],
    modalities: Sequence[tuple[str, int]],
    encoders: Mapping[str, str],
) -> Catalogue:
    """These items with their content embeddings by the encoders that the generation was built with."""
    place = {item_id: number for number, item_id in enumerate(ids)}
    content = {name: np.zeros((len(ids), width), np.float32) for name, width in modalities}
    present = {name: np.zeros(len(ids), bool) for name, _ in modalities}
    for name, width in modalities:
        values = {"modality": name, "revision": encoders.get(name, ""), "items": list(ids)}
        for item_id, embedding in connection.execute(CONTENT, values, binary=True):
            vector = embedding.to_numpy()
            if len(vector) == width:
                content[name][place[item_id]], present[name][place[item_id]] = vector, True
    return Catalogue(list(ids), content, present)


def smallest_cosine(ours: Floats, theirs: Floats) -> float:
    """Over the rows [N, D]; a row that only one side has counts as 0, a number that is none as −1."""
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosines = (ours * theirs).sum(axis=-1) / np.maximum(lengths, 1e-12)
    return float(np.nan_to_num(cosines, nan=-1.0).min(initial=1.0))
