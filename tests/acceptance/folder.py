"""What a contract folder holds, counted without the loader, and the second folder that a run makes of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from feature_repo.schema import DEFAULT_KIND
from tests.factories import write_rows

IDENTITY = ["user_id", "item_id", "occurred_at", "kind", "query"]
CONTRACT = ("item_id", "title", "description", "image", "available")
# Of the second load: who comes new, and what.
NEW_USER, NEW_ITEM = "acceptance-user", "acceptance-item"


@dataclass(frozen=True)
class Facts:
    """log: every event once, in the order of the file, with the day (UTC). items, users: one row each; users may be
    empty. rows: of each file, as they stand there.
    """

    log: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    rows: Mapping[str, int]

    @property
    def active(self) -> set[str]:
        """Users with events."""
        return set(self.log["user_id"])

    @property
    def described_users(self) -> set[str]:
        """Users of whom an attribute is known."""
        names = [name for name in self.users if name != "user_id"]
        known = self.users[names].notna().any(axis=1) if names else pd.Series(False, index=self.users.index)
        return set(self.users["user_id"][known])

    @property
    def texts(self) -> int:
        """Items with a title or description that is not blank."""
        return int(_filled(self.items, "title").combine(_filled(self.items, "description"), max).sum())

    @property
    def pictures(self) -> int:
        """Items that name a picture."""
        return int(_filled(self.items, "image").sum())

    @property
    def attributes(self) -> int:
        """Items with an attribute that says something."""
        columns = [self.items[name].map(_says_something) for name in self.items if name not in CONTRACT]
        return int(np.logical_or.reduce(columns).sum()) if columns else 0

    @property
    def asked(self) -> int:
        """Users with three events: whom an evaluation asks."""
        return int((self.log.groupby("user_id").size() >= 3).sum())

    def active_days(self, column: str) -> int:
        """Different pairs of a user (an item) and a day with activity."""
        return len(self.log[[column, "day"]].drop_duplicates())

    def sequence(self, user_id: str) -> list[str]:
        """A user's items, oldest first; events of one instant in the order of the file."""
        own = self.log[self.log["user_id"] == user_id]
        return list(own.sort_values("occurred_at", kind="stable")["item_id"])

    def some_users(self, count: int) -> list[str]:
        """Users with three events and more, from the longest history to the shortest."""
        sizes = self.log.groupby("user_id").size().sort_values(kind="stable", ascending=False)
        sizes = sizes[sizes >= 3]
        places = np.unique(np.linspace(0, len(sizes) - 1, count).astype(int))
        return [str(sizes.index[place]) for place in places]


def read(folder: Path) -> Facts:
    """The folder's facts. Every id is text, every time UTC."""
    log = _table(folder, "interactions")
    items = _table(folder, "items").drop_duplicates("item_id")
    users = _table(folder, "users")
    rows = {"interactions": len(log), "items": len(items), "users": len(users)}
    log = log.assign(kind=_column(log, "kind", DEFAULT_KIND), query=_column(log, "query", ""))
    log["occurred_at"] = pd.to_datetime(log["occurred_at"], utc=True)
    log = log.drop_duplicates(IDENTITY).reset_index(drop=True)
    log["day"] = log["occurred_at"].dt.floor("D")
    return Facts(log, items, users if len(users.columns) else pd.DataFrame({"user_id": []}), rows)


def write_second(
    folder: Path, row: Mapping[str, Any], history: list[str], after: Any, retitled: Mapping[str, Any]
) -> None:
    """A load that adds one item and one user, and corrects one title.

    row: the attributes and text of the new item. history: what the new user does, one item a minute, after a moment.
    retitled: the corrected item's whole row.
    """
    moments = [after + pd.Timedelta(minutes=minute) for minute in range(1, len(history) + 1)]
    write_rows(folder / "items.jsonl", [{"item_id": NEW_ITEM, **row}, dict(retitled)])
    events = [
        {"user_id": NEW_USER, "item_id": item, "occurred_at": moment.isoformat(), "kind": "interaction"}
        for item, moment in zip(history, moments, strict=True)
    ]
    write_rows(folder / "interactions.jsonl", events)


def _table(folder: Path, name: str) -> pd.DataFrame:
    for suffix, reader in ((".parquet", _read_parquet), (".csv", _read_csv), (".jsonl", _read_jsonl)):
        if (path := folder / f"{name}{suffix}").exists():
            table = reader(path)
            for column in ("user_id", "item_id"):
                if column in table:
                    table[column] = table[column].astype(str)
            return table
    return pd.DataFrame()


def _read_parquet(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def _read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])


def _read_jsonl(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as file:
        return pd.DataFrame([json.loads(line) for line in file if line.strip()])


def _column(table: pd.DataFrame, name: str, default: str) -> Any:
    return table[name].fillna(default) if name in table else default


def _filled(table: pd.DataFrame, name: str) -> "pd.Series[bool]":
    if name not in table:
        return pd.Series(False, index=table.index)
    return table[name].fillna("").astype(str).str.strip() != ""


def _says_something(value: Any) -> bool:
    if isinstance(value, (list, np.ndarray)):
        return any(element is not None for element in value)
    return not (pd.isna(value) or value == "")
