"""Generated data in the input contract's format, by column: no object a row, so that millions take seconds."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

FIRST_SECOND = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp())
SECONDS = 2 * 365 * 86_400
# An item belongs to one group; four fifths of a user's events stay in the user's own.
GROUPS, LOYALTY = 100, 0.8
# Events of a user: this many at least, so that everybody is asked in an evaluation, and two more in the mean.
FEWEST, MORE = 3, 2
CHUNK = 100_000


def write_folder(folder: Path, users: int, items: int, *, seed: int = 0) -> int:
    """Writes items.parquet and interactions.parquet of so many users, five events each in the mean; answers how many.

    Items have attributes (group, year, price, and `rare`, true for 2 %) and no text or picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    numbers = np.arange(items)
    catalogue = {
        "item_id": _ids("i", numbers),
        "group": pc.binary_join_element_wise("group", (pa.array(numbers % GROUPS)).cast(pa.string()), " "),
        "year": pa.array(random.integers(1990, 2026, items)),
        "price": pa.array(np.round(random.lognormal(3, 1, items), 2)),
        "rare": pa.array(numbers % 50 == 0),
    }
    pq.write_table(pa.table(catalogue), folder / "items.parquet")
    written, writer = 0, None
    for start in range(0, users, CHUNK):
        table = _events(random, np.arange(start, min(users, start + CHUNK)), items)
        writer = writer or pq.ParquetWriter(folder / "interactions.parquet", table.schema)
        writer.write_table(table)
        written += table.num_rows
    if writer is not None:
        writer.close()
    return written


def item_id(number: int) -> str:
    """The id of the n-th item."""
    return f"i{number:07d}"


def user_id(number: int) -> str:
    """The id of the n-th user."""
    return f"u{number:07d}"


def _events(random: np.random.Generator, users: np.ndarray, items: int) -> pa.Table:
    owners = np.repeat(users, FEWEST + random.poisson(MORE, len(users)))
    # The first of a group are its favourites.
    chosen = (items * random.random(len(owners)) ** 2).astype(np.int64)
    inside = chosen - chosen % GROUPS + owners % GROUPS
    chosen = np.where((random.random(len(owners)) < LOYALTY) & (inside < items), inside, chosen)
    seconds = FIRST_SECOND + random.integers(SECONDS, size=len(owners))
    return pa.table(
        {
            "user_id": _ids("u", owners),
            "item_id": _ids("i", chosen),
            "occurred_at": pa.array(seconds, pa.timestamp("s")).cast(pa.timestamp("us", "UTC")),
            "value": pa.array(random.integers(1, 6, size=len(owners)).astype(np.float64)),
        }
    )


def _ids(letter: str, numbers: np.ndarray) -> pa.Array:
    padded = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0")
    return pc.binary_join_element_wise(letter, padded, "")
