"""Ways to break a generation, each with the name of what has to stop it: what a build could have stored instead of the
right rows, and what can befall a checkpoint's folder.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector
from safetensors.torch import load_file, save_file

from tests.generation_factory import Floats, unit

ITEMS, D = 200, 32
COLUMNS = ("embedding", "content_embedding", "id_embedding")
Connection = psycopg.Connection[Any]


def run(statement: str) -> Callable[[Connection], object]:
    return lambda connection: connection.execute(statement)  # type: ignore[arg-type]


def items(change: Callable[[Floats, np.random.Generator], Any], *columns: str) -> Callable[[Connection], None]:
    """Writes columns of all items anew: change maps [V, D] to as many rows, in byte order of the ids."""

    def write(connection: Connection) -> None:
        rows = connection.execute(
            """select item_id, embedding, content_embedding, id_embedding from item_embeddings
               order by item_id collate "C" """
        ).fetchall()
        for column in columns or COLUMNS:
            place = COLUMNS.index(column) + 1
            held = [row for row in rows if row[place] is not None]
            changed = change(np.stack([row[place].to_numpy() for row in held]).astype(np.float32), random())
            connection.cursor().executemany(
                f"update item_embeddings set {column} = %s where item_id = %s",  # type: ignore[arg-type]
                [(HalfVector(vector), row[0]) for vector, row in zip(changed, held, strict=True)],
            )

    return write


def interests(change: Callable[[Floats, np.random.Generator], Any]) -> Callable[[Connection], None]:
    """Writes all interests anew: change maps [U·K, D] to as many rows, by user and number."""

    def write(connection: Connection) -> None:
        rows = connection.execute(
            "select user_id, interest, embedding from user_interests order by user_id, interest"
        ).fetchall()
        changed = change(np.stack([row[2].to_numpy() for row in rows]).astype(np.float32), random())
        connection.cursor().executemany(
            "update user_interests set embedding = %s where user_id = %s and interest = %s",
            [(HalfVector(vector), *row[:2]) for vector, row in zip(changed, rows, strict=True)],
        )

    return write


def random() -> np.random.Generator:
    return np.random.default_rng(7)


def one_bad(value: float) -> Callable[[Floats, np.random.Generator], Floats]:
    def change(rows: Floats, _: np.random.Generator) -> Floats:
        rows[3, 3] = value
        return rows

    return change


def some_zero(rows: Floats, _: np.random.Generator) -> Floats:
    rows[:: len(rows) // 2] = 0
    return rows


def anything(rows: Floats, rng: np.random.Generator) -> Floats:
    return unit(rng.standard_normal(rows.shape))


def alike(rows: Floats, rng: np.random.Generator) -> Floats:
    return unit(rows[:1] + 0.05 * rng.standard_normal(rows.shape) / np.sqrt(D) * 5)


def two_points(rows: Floats, _: np.random.Generator) -> Floats:
    return rows[np.arange(len(rows)) % 2]


def shuffled(rows: Floats, rng: np.random.Generator) -> Floats:
    return rows[rng.permutation(len(rows))]


def shifted(rows: Floats, _: np.random.Generator) -> Floats:
    return np.roll(rows, 1, axis=0)


def turned(rows: Floats, rng: np.random.Generator) -> Floats:
    rotation, _ = np.linalg.qr(rng.standard_normal((rows.shape[1], rows.shape[1])))
    return unit(rows @ rotation)


def half_turned(rows: Floats, rng: np.random.Generator) -> Floats:
    return np.where((np.arange(len(rows)) % 2 == 0)[:, None], turned(rows, rng), rows)


def half_shuffled(rows: Floats, rng: np.random.Generator) -> Floats:
    return np.where((np.arange(len(rows)) % 2 == 0)[:, None], shuffled(rows, rng), rows)


def tower(change: Callable[[bytes], bytes], part: str = "user_tower") -> Callable[[Connection], None]:
    def write(connection: Connection) -> None:
        row = connection.execute("select weights from towers where part = %s", [part]).fetchone()
        assert row is not None
        connection.execute("update towers set weights = %s where part = %s", [change(bytes(row[0])), part])

    return write


def random_weights(weights: bytes) -> bytes:
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    tensors = safetensors.torch.load(weights)
    return safetensors.torch.save({name: torch.randn_like(value) for name, value in tensors.items()})


def slightly_other_weights(weights: bytes) -> bytes:
    import safetensors.torch
    import torch

    torch.manual_seed(0)
    tensors = safetensors.torch.load(weights)
    return safetensors.torch.save(
        {name: value + 0.3 * value.std(unbiased=False) * torch.randn_like(value) for name, value in tensors.items()}
    )


SAME_FOR_ALL = """
update user_interests u set embedding = first.embedding from user_interests first
where first.user_id = 'u0' and first.interest = u.interest
"""
BOTH_EQUAL = """
update user_interests u set embedding = first.embedding from user_interests first
where first.user_id = u.user_id and first.interest = 0
"""
SHUFFLED_USERS = """
with numbered as (
    select distinct user_id, dense_rank() over (order by user_id) as place,
           dense_rank() over (order by md5(user_id)) as other from user_interests
), renamed as (
    select a.user_id as old, b.user_id as new from numbered a join numbered b on a.place = b.other
)
update user_interests set (embedding, weight, as_of, events) = (
    select s.embedding, s.weight, s.as_of, s.events from user_interests s join renamed on s.user_id = renamed.old
    where renamed.new = user_interests.user_id and s.interest = user_interests.interest)
"""
GHOSTS = """
insert into item_embeddings (generation, item_id, embedding)
select generation, 'ghost ' || n, embedding
from generate_series(1, 50) n, (select * from item_embeddings limit 1) one
"""
GHOST_USERS = """
insert into user_interests (generation, user_id, interest, embedding, weight, as_of, events)
select generation, 'ghost ' || n, 0, embedding, 1, 'epoch', 0
from generate_series(1, 5) n, (select * from user_interests limit 1) one
"""
DUPLICATED_INTEREST = """
insert into user_interests (generation, user_id, interest, embedding, weight, as_of, events)
select generation, user_id, 7, embedding, weight, as_of, events from user_interests where interest = 0
"""
WARM = "exists (select from interactions i where i.item_id = e.item_id)"
HALF = "abs(hashtext({})) % 2 = 0"
METRICS = "update generations set metrics = '{}'"

# What is written instead -> the gate (a constraint of the table, or a type of Postgres) that has to stop it.
STORED: dict[str, tuple[str, Callable[[Connection], object]]] = {
    "one item NaN": ("halfvec", items(one_bad(np.nan), "embedding")),
    "all items NaN": ("halfvec", items(lambda rows, _: rows * np.nan)),
    "one interest NaN": ("halfvec", interests(one_bad(np.nan))),
    "one item Inf": ("halfvec", items(one_bad(np.inf), "embedding")),
    "collapsed: all items equal": ("item_mean_cosine", items(lambda rows, _: np.repeat(rows[:1], len(rows), axis=0))),
    "collapsed: all items within noise": ("item_mean_cosine", items(alike)),
    "collapsed to two points": ("item_effective_rank", items(two_points)),
    "norms 2": ("item_embeddings_unit_check", items(lambda rows, _: rows * 2)),
    "norms .9": ("item_embeddings_unit_check", items(lambda rows, _: rows * 0.9)),
    "items: random unit vectors": ("held_out_ndcg", items(anything)),
    "items: zero vectors for 1%": ("item_embeddings_unit_check", items(some_zero)),
    "shuffled item ids": ("held_out_ndcg", items(shuffled)),
    "item ids shifted by one": ("held_out_ndcg", items(shifted)),
    # The towers are odd functions, nearly: what is negated through and through finds the same.
    "items negated": ("item_replay", items(lambda rows, _: -rows)),
    "items of another space": ("item_replay", items(turned)),
    "half of the items of another space": ("item_replay", items(half_turned)),
    "items alone shifted, not their content or ID": ("item_replay", items(shifted, "embedding")),
    "shuffled user ids": ("user_replay", run(SHUFFLED_USERS)),
    "interests: same two vectors for every user": ("interest_variety", run(SAME_FOR_ALL)),
    "interests: both of a user equal": ("user_replay", run(BOTH_EQUAL)),
    "interests negated": ("user_replay", interests(lambda rows, _: -rows)),
    "interests random": ("user_replay", interests(anything)),
    "interests of another space": ("user_replay", interests(turned)),
    "interests shifted by one user": ("user_replay", interests(lambda rows, _: np.roll(rows, 2, axis=0))),
    "interests exchanged within a user": ("user_replay", interests(lambda rows, _: rows[np.arange(len(rows)) ^ 1])),
    "interests with a little noise": (
        "user_replay", interests(lambda rows, rng: unit(rows + 0.03 * rng.standard_normal(rows.shape)))
    ),
    "interests norm 3": ("user_interests_unit_check", interests(lambda rows, _: rows * 3)),
    "interests zero": ("user_interests_unit_check", interests(lambda rows, _: rows * 0)),
    "one interest of two": ("user_replay", run("delete from user_interests where interest = 1")),
    "an interest too many": ("user_replay", run(DUPLICATED_INTEREST)),
    "interest weights NaN": ("user_interests_weight_check", run("update user_interests set weight = 'NaN'")),
    "interest weights Inf": ("user_interests_weight_check", run("update user_interests set weight = 'Infinity'")),
    "interest weights negative": ("user_interests_weight_check", run("update user_interests set weight = -1")),
    "interest weights all 0": ("interest_weights", run("update user_interests set weight = 0")),
    "interest weights all 1": ("interest_weights", run("update user_interests set weight = 1")),
    "interest weights exchanged": ("weight_replay", run("update user_interests set weight = 1 - weight")),
    "half the catalogue missing": (
        "coverage_head", run(f"delete from item_embeddings where {HALF.format('item_id')}")
    ),
    "2% of tail items missing": (
        "coverage_tail",
        run(f"""delete from item_embeddings where item_id in (
                select item_id from items join interactions e using (item_id) group by item_id
                order by count(*), item_id limit {ITEMS // 50})"""),
    ),
    "half the users missing": ("coverage_users", run(f"delete from user_interests where {HALF.format('user_id')}")),
    "no users at all": ("coverage_users", run("delete from user_interests")),
    "no items at all": ("coverage_head", run("delete from item_embeddings")),
    "the best seller missing": (
        "coverage_head",
        run("""delete from item_embeddings where item_id = (
                select item_id from interactions group by item_id order by count(*) desc, item_id limit 1)"""),
    ),
    "stale as_of (a year older)": ("as_of_error", run("update user_interests set as_of = as_of - interval '1 year'")),
    "as_of a year ahead": ("as_of_error", run("update user_interests set as_of = as_of + interval '1 year'")),
    "as_of of 1970": ("as_of_error", run("update user_interests set as_of = 'epoch'")),
    "as_of of one user an hour ahead": (
        "as_of_error", run("update user_interests set as_of = as_of + interval '1 hour' where user_id = 'u7'")
    ),
    "content embeddings zero": (
        "item_embeddings_unit_check", items(lambda rows, _: rows * 0, "content_embedding")
    ),
    "content embeddings all equal": (
        "content_tower_replay", items(lambda rows, _: np.repeat(rows[:1], len(rows), axis=0), "content_embedding")
    ),
    "content embeddings missing": ("content_placed", run("update item_embeddings set content_embedding = null")),
    "some content embeddings missing": (
        "content_placed",
        run(f"update item_embeddings set content_embedding = null where {HALF.format('item_id')}"),
    ),
    "content embeddings shuffled": ("content_tower_replay", items(shuffled, "content_embedding")),
    "content embeddings half of another space": ("content_tower_replay", items(half_turned, "content_embedding")),
    "id embeddings shuffled": ("item_replay", items(shuffled, "id_embedding")),
    "id embeddings missing": ("item_replay", run("update item_embeddings set id_embedding = null")),
    "id and content exchanged": (
        "item_replay",
        run("""update item_embeddings set id_embedding = content_embedding, content_embedding = id_embedding
               where id_embedding is not null"""),
    ),
    "dimension 16 of 32": ("width", items(lambda rows, _: unit(rows[:, :16]))),
    "interests of dimension 16": ("user_interests_width_check", interests(lambda rows, _: unit(rows[:, :16]))),
    "content embeddings of dimension 16": ("width", items(lambda rows, _: unit(rows[:, :16]), "content_embedding")),
    "ghost items, not in items": ("ghost_items", run(GHOSTS)),
    "ghost users, of no events": ("ghost_users", run(GHOST_USERS)),
    "no towers stored": ("stored_towers", run("delete from towers")),
    "no content tower stored": ("stored_towers", run("delete from towers where part = 'content'")),
    "towers stored with random weights": ("user_replay", tower(random_weights)),
    "towers stored of another epoch": ("user_replay", tower(slightly_other_weights)),
    "content tower stored with random weights": ("content_tower_replay", tower(random_weights, "content")),
    "towers stored as junk bytes": ("stored_towers", tower(lambda _: b"junk")),
    "towers stored cut off": ("stored_towers", tower(lambda weights: weights[:-100])),
    "towers exchanged": (
        "stored_towers",
        run("""update towers set weights = other.weights from towers other where other.part <> towers.part"""),
    ),
    "an index missing": ("indexes", run("drop index item_embeddings_g1_content_embedding_hnsw")),
    "validation metrics 1.0 (leaked labels)": (
        "reported_ndcg", run(METRICS.format('{"validation": {"ndcg@10": 1.0, "recall@50": 1.0}}'))
    ),
    "validation metrics half as good again": (
        "held_out_ndcg", run(METRICS.format('{"validation": {"ndcg@10": 0.94, "recall@50": 1.0}}'))
    ),
    "validation metrics 0.0": (
        "reported_apart", run(METRICS.format('{"validation": {"ndcg@10": 0.0, "recall@50": 0.0}}'))
    ),
}  # fmt: skip


def change_tensors(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "towers.safetensors"
        # Numbers of the catalogue's items, such as how often each was met, are no weights.
        tensors = {name: value if "counts" in name else change(value) for name, value in load_file(path).items()}
        save_file(tensors, path)

    return write


def change_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        document = json.loads((directory / name).read_text())
        change(document)
        (directory / name).write_text(json.dumps(document))

    return write


def cut_off(directory: Path) -> None:
    path = directory / "towers.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def random_like(value: Any) -> Any:
    import torch

    torch.manual_seed(1)
    return torch.randn_like(value)


# What is done to a copy of the checkpoint -> the gate, or the words that the build refuses it with.
CHECKPOINTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "NaN weights": ("NaN not allowed in halfvec", change_tensors(lambda value: value * np.nan)),
    "zero weights": (
        "violates check constraint .*item_embeddings_unit_check", change_tensors(lambda value: value * 0)
    ),
    "random weights": ("held_out_ndcg", change_tensors(random_like)),
    "item ids of the snapshot shuffled": (
        "trained on another catalogue", change_json("snapshot.json", lambda found: found["items"].reverse())
    ),
    "validation metrics 1.0 (leaked labels)": (
        "reported_ndcg", change_json("summary.json", lambda found: found.update(metrics={"ndcg@10": 1.0}))
    ),
    "truncated weights": ("damaged weights", cut_off),
    "towers.json says dim 16": (
        "weights of another configuration", change_json("towers.json", lambda found: found["towers"].update(dim=16))
    ),
    "half of the snapshot items": (
        "trained on another catalogue",
        change_json("snapshot.json", lambda found: found.update(items=found["items"][::2])),
    ),
}  # fmt: skip
