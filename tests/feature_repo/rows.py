"""Hand-written platform tables (odd ids, a rollback, missing modalities), and their plain-Python truth.

`History` is the reference: per feature view and entity, the rows (as_of, values) that Feast may see, by reading the
documentation and not the SQL. Vectors are halves (1/8 steps), so that equality is exact.
"""

import json
from datetime import UTC, date, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import psycopg
from pgvector import HalfVector

from feature_repo.modalities import MODALITIES
from pipelines.generation.lifecycle import amends

START = datetime(2026, 3, 1, tzinfo=UTC)
DIM = 4
USERS = ["u0", "u1", "ü☃ 空", 'u"quote\\{,}', "u\x1fseparator", "u5", "u6"]
ITEMS = ["i0", "i1", "ï☃", 'i{"brace", \\}', "i\x1fe", "", "i6", "NULL", "i8"]
# Generation 1 is live from day 10, generation 2 from day 20, and 1 again (rollback) from day 30
PROMOTIONS = [(1, 10, 20), (2, 20, 30), (1, 30, None)]

Row = tuple[datetime, dict[str, Any]]
History = dict[str, dict[str, list[Row]]]


def day(number: float) -> datetime:
    return START + timedelta(days=number)


def micros(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def fill(connection: psycopg.Connection[Any], seed: int = 0) -> History:
    """Fills the tables of an empty database and answers what each feature view holds."""
    random = Random(seed)
    history: History = {}
    events = _events(random)
    history["user_sequence"], history["user_stats"] = _users(connection, events)
    history["item_stats"] = _item_stats(connection, events)
    history["user_activity"], history["item_activity"] = _activity(events, 1), _activity(events, 2)
    history["user_profile"] = _profiles(connection)
    history["item_attributes"] = _items(connection)
    history["item_content"] = _content(connection, random)
    history["item_embedding"], history["user_interests"] = _generations(connection, random)
    connection.commit()
    return history


def newest(history: History, view: str, entity: str, moment: datetime | None = None) -> Row | None:
    """The row in force at the moment (None: now)."""
    rows = [row for row in history[view].get(entity, []) if moment is None or row[0] <= moment]
    return max(rows, key=lambda row: row[0], default=None)


def _events(random: Random) -> list[tuple[datetime, str, str, str, float | None, str]]:
    moments = [day(random.randrange(40)) + timedelta(microseconds=random.randrange(86_400_000_000)) for _ in range(120)]
    # The last user has no event, nor the last item.
    events = sorted(
        (moment, random.choice(USERS[:-1]), random.choice(ITEMS[:-1]), random.choice(["view", "buy"]), value)
        for moment, value in ((moment, random.choice([None, 0.5, 3.0])) for moment in moments)
    )
    # Who searches does not do so at first.
    asking = Random(1)
    return [
        (*event, asking.choice(["", "ä☃ b"]) if event[1] == "u0" and event[0] > day(10) else "") for event in events
    ]


def _by_day(events: list[Any], entity: int) -> dict[tuple[str, Any], list[Any]]:
    """(entity, day with activity) → all its events up to the end of that day."""
    return {
        (event[entity], event[0].date()): [
            each for each in events if each[entity] == event[entity] and each[0].date() <= event[0].date()
        ]
        for event in events
    }


def _mean(events: list[Any]) -> float | None:
    values = [event[4] for event in events if event[4] is not None]
    return sum(values) / len(values) if values else None


def _users(connection: psycopg.Connection[Any], events: list[Any]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    sequences: dict[str, list[Row]] = {}
    stats: dict[str, list[Row]] = {}
    for (user, active), past in _by_day(events, 1).items():
        as_of, items, kinds = past[-1][0], [event[2] for event in past], [event[3] for event in past]
        moments, queries = [event[0] for event in past], [event[5] for event in past]
        if not any(queries):
            queries = []
        connection.execute(
            "insert into user_sequences values (%s, %s, %s, %s, %s, %s, %s)",
            [user, active, as_of, items, moments, kinds, queries],
        )
        connection.execute(
            "insert into user_stats values (%s, %s, %s, %s, %s, %s, %s)",
            [user, active, as_of, len(past), len(set(items)), _mean(past), moments[0]],
        )
        sequences.setdefault(user, []).append(
            (
                as_of,
                {
                    "item_ids": items,
                    "occurred_ats": [micros(each) for each in moments],
                    "kinds": kinds,
                    "queries": queries,
                },
            )
        )
        counts = {
            "user_interactions": len(past),
            "user_distinct_items": len(set(items)),
            "user_mean_value": _mean(past),
            "user_first_at": micros(moments[0]),
        }
        stats.setdefault(user, []).append((as_of, counts))
    return sequences, stats


def _item_stats(connection: psycopg.Connection[Any], events: list[Any]) -> dict[str, list[Row]]:
    stats: dict[str, list[Row]] = {}
    for (item, active), past in _by_day(events, 2).items():
        users = {event[1] for event in past}
        row = [item, active, past[-1][0], len(past), len(users), _mean(past), past[0][0]]
        connection.execute("insert into item_stats values (%s, %s, %s, %s, %s, %s, %s)", row)
        counts = {
            "item_interactions": len(past),
            "item_distinct_users": len(users),
            "item_mean_value": _mean(past),
            "item_first_at": micros(past[0][0]),
        }
        stats.setdefault(item, []).append((past[-1][0], counts))
    return stats


def _activity(events: list[Any], entity: int) -> dict[str, list[Row]]:
    """Events of the whole days before each day on which a count changes; nothing before an entity's first day is over.

    The last such day may be ahead of the clock, where there is no row yet.
    """
    days: dict[str, list[date]] = {}
    for event in events:
        days.setdefault(event[entity], []).append(event[0].date())
    name, today = ("user", "item")[entity - 1], datetime.now(UTC).date()
    rows: dict[str, list[Row]] = {}
    for each, met in days.items():
        for moment in sorted({one + timedelta(days=later) for one in met for later in (1, 2, 8, 31, 366)}):
            if moment <= today:
                counts = {
                    f"{name}_interactions_{window}d": sum(
                        timedelta() < moment - one <= timedelta(window) for one in met
                    )
                    for window in (1, 7, 30, 365)
                }
                rows.setdefault(each, []).append((datetime(*moment.timetuple()[:3], tzinfo=UTC), counts))
    return rows


def _profiles(connection: psycopg.Connection[Any]) -> dict[str, list[Row]]:
    """The last user is not among those who are described."""
    rows: dict[str, list[Row]] = {}
    for number, user in enumerate(USERS[:-1]):
        attributes = {"city": "Zürich ☃", "age": 20 + number} if number else {}
        connection.execute("insert into users values (%s, %s, %s)", [user, json.dumps(attributes), day(number)])
        rows[user] = [(day(number), {"user_attributes": attributes})]
    return rows


def _items(connection: psycopg.Connection[Any]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for number, item in enumerate(ITEMS):
        title = None if number == 1 else f"Títle {item}"
        attributes = {"genres": ["ä", "☃"], "year": 1990 + number} if number else {}
        connection.execute(
            "insert into items (item_id, title, description, image, available, attributes, updated_at) "
            "values (%s, %s, %s, %s, %s, %s, %s)",
            [
                item,
                title,
                "" if number == 2 else None,
                f"{number}.jpg",
                number != 3,
                json.dumps(attributes),
                day(number),
            ],
        )
        values = {
            "title": title,
            "description": "" if number == 2 else None,
            "available": number != 3,
            "attributes": attributes,
        }
        rows[item] = [(day(number), values)]
    return rows


def _vector(random: Random, dim: int = DIM) -> list[float]:
    """Of length one within the hundredth that the tables allow: eighths whose squares sum to 63, 64 or 65."""
    while True:
        eighths = [random.randrange(-8, 9) for _ in range(dim)]
        if 63 <= sum(number * number for number in eighths) <= 65:
            return [number / 8 for number in eighths]


def _half(vector: list[float]) -> HalfVector:
    return HalfVector(np.array(vector))


def _content(connection: psycopg.Connection[Any], random: Random) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {}
    for modality, revision, active in (("text", "old", False), ("text", "new", True), ("image", "only", True)):
        connection.execute(
            "insert into content_encoders (modality, revision, model, dim, active) values (%s, %s, 'm', %s, %s)",
            [modality, revision, 3, active],
        )
        for number, item in enumerate(ITEMS[:-1]):
            if modality == "image" and number % 2:
                continue
            vector, encoded_at = _vector(random, 3), day(5) + timedelta(minutes=random.randrange(1000))
            connection.execute(
                "insert into content_embeddings values (%s, %s, %s, 'hash', %s, %s)",
                [item, modality, revision, _half(vector), encoded_at],
            )
            if active:
                empty = dict.fromkeys(one.feature for one in MODALITIES.values())
                as_of, values = rows.get(item, [(encoded_at, empty)])[0]
                rows[item] = [(max(as_of, encoded_at), {**values, f"{modality}_embedding": vector})]
    return rows


def _generations(connection: psycopg.Connection[Any], random: Random) -> tuple[Any, Any]:
    item_values: dict[tuple[int, str], dict[str, Any]] = {}
    user_values: dict[tuple[int, str], dict[str, Any]] = {}
    amends(connection)
    for generation, state in ((1, "live"), (2, "retired"), (3, "ready")):
        connection.execute(
            "insert into generations (state, dim, interests, live_at) values (%s, %s, 3, %s)", [state, DIM, day(30)]
        )
        for table in ("item_embeddings", "user_interests"):
            connection.execute(f"create table {table}_g{generation} partition of {table} for values in ({generation})")
        for number, item in enumerate(ITEMS[: 6 + generation]):
            item_values[generation, item] = _item_vectors(connection, random, generation, item, cold=number == 0)
        for number, user in enumerate(USERS[: 4 + generation]):
            user_values[generation, user] = _interests(connection, random, generation, user, 1 + number % 3)
    for generation, first, last in PROMOTIONS:
        connection.execute(
            "insert into promotions (generation, live_from, live_until) values (%s, %s, %s)",
            [generation, day(first), None if last is None else day(last)],
        )
    return _promoted(item_values), _promoted(user_values)


def _promoted(values: dict[tuple[int, str], dict[str, Any]]) -> dict[str, list[Row]]:
    """At each promotion everybody gets what the generation has for them, or nothing."""
    nothing = dict.fromkeys(next(iter(values.values())))
    entities = {entity for _, entity in values}
    return {
        entity: [(day(first), values.get((generation, entity), nothing)) for generation, first, _ in PROMOTIONS]
        for entity in entities
    }


def _item_vectors(
    connection: psycopg.Connection[Any], random: Random, generation: int, item: str, *, cold: bool
) -> dict[str, Any]:
    item_vector, content, behaviour = _vector(random), _vector(random), None if cold else _vector(random)
    connection.execute(
        "insert into item_embeddings values (%s, %s, %s, %s, %s)",
        [generation, item, _half(item_vector), _half(content), None if behaviour is None else _half(behaviour)],
    )
    return {
        "embedding": item_vector,
        "content_embedding": content,
        "id_embedding": behaviour,
        "embedding_generation": generation,
    }


def _interests(
    connection: psycopg.Connection[Any], random: Random, generation: int, user: str, count: int
) -> dict[str, Any]:
    vectors = [_vector(random) for _ in range(count)]
    # Inserted out of order: what counts is the number of the interest.
    for interest in reversed(range(count)):
        connection.execute(
            "insert into user_interests values (%s, %s, %s, %s, %s, %s)",
            [generation, user, interest, _half(vectors[interest]), (interest + 1) / 8, day(1)],
        )
    return {
        "interests": [number for vector in vectors for number in vector],
        "interest_weights": [(interest + 1) / 8 for interest in range(count)],
        "interest_count": count,
        "interest_dim": DIM,
        "interests_generation": generation,
    }
