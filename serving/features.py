"""Features for rankers: a feature service's values for given entities, through Feast, as one Arrow table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from polytower.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureService, FeatureStore


class UnknownServiceError(UserError):
    """No feature service has the given name."""


def fetch_features(store: "FeatureStore", service: str, entities: Mapping[str, Sequence[str]]) -> "pa.Table":
    """N rows: the entities' keys as given, then the service's features in the order of its definition.

    store: `feature_repo.store.feature_store(url)`, kept for the process (it holds the pool and the cached registry).
    entities: join key → N ids ("user_id", "item_id"); a single id stands for all N rows. Unknown ids give nulls.
    Lists come as list columns, embeddings as list<float>, times as microseconds since 1970. Raises
    UnknownServiceError, and UserError for keys that the service does not take or misses, for lists of unequal length.
    """
    asked = _service(store, service)
    keys = _keys(store, asked)
    response = store.get_online_features(features=asked, entity_rows=_rows(service, keys, entities))
    names = [*keys, *_feature_names(asked)]
    return response.to_arrow().select(names)


def columns_of(store: "FeatureStore", service: str, key: str) -> list[str]:
    """Names of the service's columns that belong to one join key alone: the key itself, and its views' features."""
    asked = _service(store, service)
    owned = [key]
    for projection in asked.feature_view_projections:
        view = store.registry.get_feature_view(projection.name, store.project, allow_cache=True)
        if [column.name for column in view.entity_columns] == [key]:
            owned += [feature.name for feature in projection.features]
    return owned


def keys_of(store: "FeatureStore", service: str) -> list[str]:
    """Join keys of a feature service, each once. Raises UnknownServiceError."""
    return _keys(store, _service(store, service))


def json_rows(table: "pa.Table") -> Iterator[dict[str, Any]]:
    """The table's rows as JSON-ready dictionaries, one at a time."""
    for batch in table.to_batches():
        yield from batch.to_pylist()


def _service(store: "FeatureStore", name: str) -> "FeatureService":
    from feast.errors import FeatureServiceNotFoundException

    try:
        return store.get_feature_service(name, allow_cache=True)
    except FeatureServiceNotFoundException as error:
        known = sorted(each.name for each in store.list_feature_services())
        there = f"there are {', '.join(known)}" if known else "the registry is empty: `polytower feast apply` fills it"
        raise UnknownServiceError(f"no feature service {name!r}; {there}") from error


def _keys(store: "FeatureStore", service: "FeatureService") -> list[str]:
    """Join keys of the service's views, each once, in their order."""
    views = [
        store.registry.get_feature_view(p.name, store.project, allow_cache=True)
        for p in service.feature_view_projections
    ]
    return list(dict.fromkeys(column.name for view in views for column in view.entity_columns))


def _feature_names(service: "FeatureService") -> list[str]:
    return [feature.name for view in service.feature_view_projections for feature in view.features]


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
    return {key: listed[key] * (size if len(listed[key]) == 1 else 1) for key in keys}
