"""Features for rankers: a feature service's values for given entities, as one Arrow table.

Read by the same queries as Feast's SDK (feature_repo/views/online_reads.py), and without Feast, whose import alone
costs a server seconds and a hundred megabytes. A test holds both answers equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psycopg

from feature_repo.columns import as_arrow
from feature_repo.schema import SERVICES
from feature_repo.views import views_of
from feature_repo.views.online_reads import OnlineRead, distinct, read_columns
from feature_repo.views.view import View
from polytower.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

# Rows of one answer: a thousand candidates with a history of two hundred events each are 10 MB.
MAX_ROWS = 5000


class UnknownServiceError(UserError):
    """No feature service has the given name."""


def fetch_features(
    connection: psycopg.Connection[Any],
    service: str,
    entities: Mapping[str, Sequence[str]],
    snapshot: str | None = None,
) -> "pa.Table":
    """N rows: the entities' keys as given, then the service's features in the order of its definition.

    connection: not in a transaction; left as it was. entities: join key → N ids ("user_id", "item_id"); a single id
    stands for all N rows. Unknown ids give nulls. Lists come as list columns, embeddings as list<float>, times as
    microseconds since 1970. All views are read from one snapshot (the one exported under this name, if any), hence
    from one generation. Raises
    UnknownServiceError, and UserError for keys that the service does not take or misses, for ids that are no strings,
    for lists of unequal length or of more than MAX_ROWS.
    """
    import pyarrow as pa

    views = _views(service)
    rows = _rows(service, keys_of(service), entities)
    orders = {key: distinct(ids) for key, ids in rows.items()}
    reads = [OnlineRead(view.name, orders[view.key][0], tuple(view.kinds)) for view in views]
    answers = read_columns(connection, reads, snapshot)
    columns = {key: pa.array(ids, pa.string()) for key, ids in rows.items()}
    takes = {key: None if order is None else pa.array(order, pa.int64()) for key, (_, order) in orders.items()}
    for view, answer in zip(views, answers, strict=True):
        take = takes[view.key]
        for name, kind in view.kinds.items():
            values = as_arrow(kind, answer.features[name])
            columns[name] = values if take is None else values.take(take)
    return pa.table(columns)


def columns_of(service: str, key: str) -> list[str]:
    """Names of the service's columns that belong to one join key alone: the key itself, and its views' features."""
    return [key, *(name for view in _views(service) if view.key == key for name in view.kinds)]


def keys_of(service: str) -> list[str]:
    """Join keys of a feature service, each once. Raises UnknownServiceError."""
    return list(dict.fromkeys(view.key for view in _views(service)))


def json_rows(table: "pa.Table") -> Iterator[dict[str, Any]]:
    """The table's rows as JSON-ready dictionaries, one at a time."""
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _views(service: str) -> list[View]:
    if service not in SERVICES:
        raise UnknownServiceError(f"no feature service {service!r}; there are {', '.join(sorted(SERVICES))}")
    return views_of(service)


def _rows(service: str, keys: Sequence[str], entities: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if set(entities) != set(keys):
        raise UserError(
            f"feature service {service!r} takes {', '.join(keys)}; given: {', '.join(entities) or 'nothing'}"
        )
    listed = {key: [] if isinstance(ids, str) else list(ids) for key, ids in entities.items()}
    wrong = next(
        (key for key, ids in listed.items() if not ids or any(not isinstance(each, str) for each in ids)), None
    )
    if wrong is not None:
        raise UserError(f"{wrong!r} takes a list of ids, each a string; at least one")
    size = max(len(ids) for ids in listed.values())
    if any(len(ids) not in (1, size) for ids in listed.values()):
        lengths = ", ".join(f"{key}: {len(ids)}" for key, ids in listed.items())
        raise UserError(f"each entity key takes one id or as many as the others; given {lengths}")
    if size > MAX_ROWS:
        raise UserError(f"{size} rows are asked for, and one answer has at most {MAX_ROWS}: ask in several requests")
    return {key: listed[key] * (size if len(listed[key]) == 1 else 1) for key in keys}
