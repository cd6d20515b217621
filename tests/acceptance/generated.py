"""Generated data at real size: tastes that content, pictures and the log agree on; the same files in every run."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.factories import DAYS, FIRST_DAY, TASTES, tiny_items, tiny_users, write_images, write_rows

USERS, ITEMS, EVENTS, PICTURES = 5_000, 3_000, 20, 240
LOVE = 0.8  # share of a user's events that are of the loved taste


def taste_of(entity_id: str) -> int:
    """Which taste an item belongs to, or a user loves."""
    return int(entity_id[1:]) % len(TASTES)


def write(folder: Path, users: int = USERS, items: int = ITEMS, pictures: int = PICTURES) -> Path:
    """Writes the folder, pictures below it in `images`, and answers it.

    Each user has EVENTS events over ten days. Within a taste few items are popular; the rarest are met by nobody.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    catalogue = [
        {**row, "price": 5 + (number * 37 % 997) / 10}
        for number, row in enumerate(tiny_items(items, images=True, pictured=pictures))
    ]
    write_rows(folder / "items.parquet", catalogue)
    write_rows(folder / "users.parquet", tiny_users(users))
    write_images(folder / "images", catalogue, rng)
    pq.write_table(_log(users, items, rng), folder / "interactions.parquet")
    return folder


def _log(users: int, items: int, rng: np.random.Generator) -> pa.Table:
    size = users * EVENTS
    actor = np.repeat(np.arange(users), EVENTS)
    taste = np.where(rng.random(size) < LOVE, actor, rng.integers(len(TASTES), size=size)) % len(TASTES)
    item = len(TASTES) * (items // len(TASTES) * rng.random(size) ** 2).astype(np.int64) + taste
    seconds = rng.integers(DAYS * 86_400, size=size)
    order = np.argsort(seconds, kind="stable")
    return pa.table(
        {
            "user_id": [f"u{n}" for n in actor[order]],
            "item_id": [f"i{n}" for n in item[order]],
            "occurred_at": pa.array([_moment(int(n)) for n in seconds[order]], pa.timestamp("us", "UTC")),
            "value": rng.integers(1, 6, size=size).astype(np.float64),
        }
    )


def _moment(seconds: int) -> datetime:
    return FIRST_DAY.astimezone(UTC) + timedelta(seconds=seconds)
