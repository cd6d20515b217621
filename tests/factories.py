"""Tiny contract folders with tastes that a model can learn, in any of the three file formats.

Nothing here needs a database, torch or the network; the same arguments give the same files.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

Format = Literal["parquet", "csv", "jsonl"]
Rows = Sequence[Mapping[str, Any]]

# One taste: a word for titles, words for descriptions, a genre, a colour for images.
TASTES = (
    ("Rocket", "stars planets astronauts and a distant galaxy", "Science Fiction", (30, 40, 120)),
    ("Kitchen", "bread butter herbs and a patient cook", "Cooking", (200, 150, 60)),
    ("Forest", "trees rivers birds and a quiet path", "Nature", (30, 120, 40)),
    ("Heist", "a vault a plan and a getaway car", "Crime", (110, 20, 30)),
)
# The year turns in the middle of the log, so that two partitions are filled.
FIRST_DAY = datetime(2023, 12, 27, tzinfo=UTC)
DAYS = 10


def tiny_folder(
    path: Path,
    users: int = 40,
    items: int = 60,
    seed: int = 0,
    images: bool = False,
    *,
    file_format: Format = "parquet",
    events: int = 16,
    queries: bool = False,
) -> Path:
    """Writes interactions, items and users into `path` and answers it; with `images`, JPEGs into `path/images`.

    Item i belongs to taste i % 4; a user loves one taste (.8 of the events) and walks through its items in order, so
    both neighbours and sequence models have something to learn. The last item is cold (nobody met it), the one before
    it has a title only. Ids are "u0"... and "i0"...; events spread over ten days around a new year, `events` per user.
    queries: three of four events came from a search, for the item's title in small letters.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    write_rows(path / f"items.{file_format}", tiny_items(items, images))
    write_rows(path / f"users.{file_format}", tiny_users(users))
    write_rows(path / f"interactions.{file_format}", tiny_interactions(users, items, events, rng, queries=queries))
    if images:
        write_images(path / "images", tiny_items(items, images), rng)
    return path


def tiny_items(items: int, images: bool = False, pictured: int | None = None) -> list[dict[str, Any]]:
    """Contract rows of the catalogue (see tiny_folder). pictured: only the first so many have a picture (None: all)."""
    rows = []
    for i in range(items):
        word, description, genre, _ = TASTES[i % len(TASTES)]
        bare = items > 2 and i == items - 2
        rows.append(
            {
                "item_id": f"i{i}",
                "title": f"{word} {i}",
                "description": None if bare else f"A story of {description}, part {i // len(TASTES)}.",
                "image": f"i{i}.jpg" if images and not bare and (pictured is None or i < pictured) else None,
                "available": True,
                "year": None if bare else 1990 + i % 30,
                "genres": None if bare else [genre],
            }
        )
    return rows


def tiny_users(users: int) -> list[dict[str, Any]]:
    """Contract rows of the users (see tiny_folder)."""
    return [{"user_id": f"u{u}", "age": 20 + u % 50, "city": ("Oslo", "Lagos", "Lima")[u % 3]} for u in range(users)]


def tiny_interactions(
    users: int, items: int, events: int, rng: np.random.Generator, *, queries: bool = False
) -> list[dict[str, Any]]:
    """Contract rows of the log, in order of time; the cold last item never occurs (unless it is the only one)."""
    rows: list[dict[str, Any]] = []
    warm = max(1, items - 1)
    for u in range(users):
        loved = u % len(TASTES)
        step = int(rng.integers(warm))
        times = np.sort(rng.integers(DAYS * 86_400, size=events))
        for seconds in times:
            taste = loved if rng.random() < 0.8 else int(rng.integers(len(TASTES)))
            choices = range(taste % warm, warm, len(TASTES))
            step += 1
            rows.append(
                {
                    "user_id": f"u{u}",
                    "item_id": f"i{choices[step % len(choices)]}",
                    "occurred_at": FIRST_DAY + timedelta(seconds=int(seconds)),
                    "value": float(rng.integers(1, 6)),
                }
            )
    rows.sort(key=lambda row: row["occurred_at"])
    if queries:
        titles = {row["item_id"]: row["title"].lower() for row in tiny_items(items)}
        rows = [row | {"query": titles[row["item_id"]] if place % 4 else None} for place, row in enumerate(rows)]
    return rows


def write_images(directory: Path, items: Rows, rng: np.random.Generator) -> None:
    """A small JPEG in the colour of its taste for every item that names one."""
    directory.mkdir(exist_ok=True)
    for row in items:
        if row["image"]:
            i = int(row["item_id"][1:])
            noise = rng.integers(-20, 20, size=(32, 24, 3))
            pixels = np.clip(np.array(TASTES[i % len(TASTES)][3]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(directory / row["image"], quality=90)


def write_rows(path: Path, rows: Rows, schema: pa.Schema | None = None) -> Path:
    """Writes rows as the suffix of `path` says: .parquet, .csv (lists become JSON text) or .jsonl; keys may differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=_iso) + "\n")
        return path
    names = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".csv":
        columns = {name: [_csv_cell(row.get(name)) for row in rows] for name in names}
        pyarrow.csv.write_csv(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in names])), path)
        return path
    table = pa.table({name: [row.get(name) for row in rows] for name in names}, schema=schema)
    pq.write_table(table, path)
    return path


def _csv_cell(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    return _iso(value) if isinstance(value, (date, datetime)) else str(value)


def _iso(value: date | datetime) -> str:
    return value.isoformat()
