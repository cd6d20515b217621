"""Feast's answer, kept by column: protobuf is built only for those who ask for it (`feast serve`)."""

import calendar
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

from feature_repo.columns import Kind, as_proto

ARROW_TYPES: dict[Kind, pa.DataType] = {
    "text": pa.string(),
    "json": pa.string(),
    "integer": pa.int64(),
    "moment": pa.int64(),
    "number": pa.float64(),
    "flag": pa.bool_(),
    "texts": pa.list_(pa.string()),
    "reals": pa.list_(pa.float32()),
    "halves": pa.list_(pa.float32()),
    "moments": pa.list_(pa.int64()),
}


@dataclass(frozen=True)
class FeatureColumn:
    """One column of the answer, N rows.

    name: as the caller sees it. values: None where the value or its entity is absent. as_ofs: timestamps of the rows,
    None where the entity has none; None as a whole for a column of the request itself.
    """

    name: str
    kind: Kind
    values: Sequence[Any]
    as_ofs: Sequence[datetime | None] | None


class ColumnarResponse(OnlineResponse):  # type: ignore[misc]
    """An OnlineResponse over Python columns; every accessor of Feast's own class works, with equal values.

    Unlike there, `to_arrow` has the same types whatever the values are: an embedding is list<float>, also when absent.
    """

    def __init__(self, columns: Sequence[FeatureColumn]) -> None:
        self._columns = columns
        self._feature_types: dict[str, Any] = {}

    @cached_property
    def proto(self) -> Any:
        """The answer as GetOnlineFeaturesResponse."""
        response = GetOnlineFeaturesResponse()
        response.metadata.feature_names.val.extend(column.name for column in self._columns)
        for column in self._columns:
            response.results.append(_vector(column))
        return response

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, Any]:
        """Name → list of N Python values; with timestamps also NAME__ts in seconds since 1970 (0 where absent)."""
        return dict(self._lists(include_event_timestamps))

    def to_arrow(self, include_event_timestamps: bool = False) -> pa.Table:
        """N rows, one column per feature, types by feature and not by value."""
        types = {column.name: ARROW_TYPES[column.kind] for column in self._columns}
        lists = self.to_dict(include_event_timestamps)
        return pa.table({name: pa.array(values, types.get(name, pa.int64())) for name, values in lists.items()})

    def _lists(self, include_event_timestamps: bool) -> Iterator[tuple[str, list[Any]]]:
        for column in self._columns:
            yield column.name, list(column.values)
            if include_event_timestamps:
                as_ofs = column.as_ofs or [None] * len(column.values)
                seconds = [0 if as_of is None else calendar.timegm(as_of.utctimetuple()) for as_of in as_ofs]
                yield column.name + TIMESTAMP_POSTFIX, seconds


def _vector(column: FeatureColumn) -> Any:
    as_ofs = column.as_ofs if column.as_ofs is not None else [None] * len(column.values)
    missing = FieldStatus.PRESENT if column.as_ofs is None else FieldStatus.NOT_FOUND
    return GetOnlineFeaturesResponse.FeatureVector(
        values=as_proto(column.kind, column.values),
        statuses=[missing if as_of is None else FieldStatus.PRESENT for as_of in as_ofs],
        event_timestamps=[_timestamp(as_of) for as_of in as_ofs],
    )


def _timestamp(as_of: datetime | None) -> Timestamp:
    timestamp = Timestamp()
    if as_of is not None:
        timestamp.FromDatetime(as_of)
    return timestamp
