"""Loads one after another: new items with pictures that take a while to decode, and new events of the same users."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
from PIL import Image

from tests.factories import FIRST_DAY, TASTES, write_rows
from tests.faults.ledger import Event, event

USERS = 60


@dataclass(frozen=True)
class Batch:
    """A contract folder with its pictures, and what has to be in the tables once it was taken."""

    folder: Path
    events: frozenset[Event]
    items: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...]:
        """As `polytower load` takes it."""
        return "load", str(self.folder), "--images", str(self.folder / "images")


class Batches:
    """Writes batch after batch; item i has taste i % 4, a user walks through the items of one taste, as in factories.

    Times go on from batch to batch, so that no two events are equal and years turn now and then.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(seed)
        self.items = 0
        self.count = 0

    def write(self, *, items: int, events: int, edge: int) -> Batch:
        """A batch of that many items (pictures of edge × edge pixels) and events."""
        folder = self.folder / f"batch{self.count}"
        rows = [self._item(number) for number in range(self.items, self.items + items)]
        self.items += items
        (folder / "images").mkdir(parents=True)
        for row in rows:
            self._picture(folder / "images" / str(row["image"]), int(str(row["item_id"])[1:]), edge)
        times = self._times(events)
        log = [self._event(number, time) for number, time in enumerate(times)]
        if rows:
            write_rows(folder / "items.parquet", rows)
        write_rows(folder / "interactions.parquet", log)
        self.count += 1
        keys = frozenset(event(str(row["user_id"]), str(row["item_id"]), times[n]) for n, row in enumerate(log))
        return Batch(folder, keys, tuple(str(row["item_id"]) for row in rows))

    def _item(self, number: int) -> dict[str, object]:
        word, description, genre, _ = TASTES[number % len(TASTES)]
        return {
            "item_id": f"i{number}",
            "title": f"{word} {number}",
            "description": f"A story of {description}, part {number}.",
            "image": f"i{number}.png",
            "year": 1990 + number % 30,
            "genres": [genre],
        }

    def _picture(self, path: Path, number: int, edge: int) -> None:
        noise = self.rng.integers(-25, 25, size=(edge, edge, 3), dtype=np.int16)
        pixels = np.clip(np.array(TASTES[number % len(TASTES)][3]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)

    def _times(self, events: int) -> list[datetime]:
        first = FIRST_DAY + timedelta(days=2 * self.count)
        return [first + timedelta(microseconds=int(172_800_000_000 / events * n)) for n in range(events)]

    def _event(self, number: int, time: datetime) -> dict[str, object]:
        user = number % USERS
        taste = user % len(TASTES) if self.rng.random() < 0.8 else int(self.rng.integers(len(TASTES)))
        choices = range(taste, self.items, len(TASTES))
        step = number // USERS + user
        return {
            "user_id": f"u{user}",
            "item_id": f"i{choices[step % len(choices)]}",
            "occurred_at": time,
            "value": 1.0,
        }
