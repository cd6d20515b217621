"""Feast's answer, kept by column: protobuf is built only for those who ask for it (`feast serve`)."""

import calendar
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import pyarrow as pa
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList
from feast.protos.feast.types.Value_pb2 import Value as ValueProto
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

from feature_repo.columns import Kind, as_arrow, as_python

PROTO: dict[Kind, Callable[[Any], ValueProto]] = {
    "text": lambda value: ValueProto(string_val=value),
    "json": lambda value: ValueProto(string_val=value),
    "integer": lambda value: ValueProto(int64_val=value),
    "moment": lambda value: ValueProto(int64_val=value),
    "number": lambda value: ValueProto(double_val=value),
    "flag": lambda value: ValueProto(bool_val=value),
    "texts": lambda value: ValueProto(string_list_val=StringList(val=value)),
    "reals": lambda value: ValueProto(float_list_val=FloatList(val=value)),
    "halves": lambda value: ValueProto(float_list_val=FloatList(val=value)),
    "moments": lambda value: ValueProto(int64_list_val=Int64List(val=value)),
}


def as_proto(kind: Kind, values: Sequence[Any]) -> list[ValueProto]:
    """N Python values as Feast's values; None becomes the empty value."""
    convert, absent = PROTO[kind], ValueProto()
    return [absent if value is None else convert(value) for value in values]


@dataclass(frozen=True)
class FeatureColumn:
    """One column of the answer, N rows.

    name: as the caller sees it. raw: values as read, None where the value or its entity is absent, one per distinct
    entity. order: the N rows' places in raw; None: raw has one each, in this order. as_ofs: N timestamps, None where
    the entity has none; None as a whole for a column of the request itself.
    """

    name: str
    kind: Kind
    raw: Sequence[Any]
    order: Sequence[int] | None
    as_ofs: Sequence[datetime | None] | None

    @property
    def values(self) -> list[Any]:
        """The column as N Python values."""
        values = as_python(self.kind, self.raw)
        return values if self.order is None else [values[place] for place in self.order]

    @property
    def array(self) -> pa.Array:
        """The column as an Arrow array of N."""
        values = as_arrow(self.kind, self.raw)
        return values if self.order is None else values.take(pa.array(self.order, pa.int64()))

    @property
    def seconds(self) -> list[int]:
        """The timestamps in seconds since 1970, 0 where absent."""
        as_ofs = self.as_ofs if self.as_ofs is not None else [None] * len(self.raw)
        return [0 if as_of is None else calendar.timegm(as_of.utctimetuple()) for as_of in as_ofs]


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
        answer: dict[str, Any] = {}
        for column in self._columns:
            answer[column.name] = column.values
            if include_event_timestamps:
                answer[column.name + TIMESTAMP_POSTFIX] = column.seconds
        return answer

    def to_arrow(self, include_event_timestamps: bool = False) -> pa.Table:
        """N rows, one column per feature, types by feature and not by value."""
        answer: dict[str, Any] = {}
        for column in self._columns:
            answer[column.name] = column.array
            if include_event_timestamps:
                answer[column.name + TIMESTAMP_POSTFIX] = pa.array(column.seconds, pa.int64())
        return pa.table(answer)


def _vector(column: FeatureColumn) -> Any:
    as_ofs = column.as_ofs if column.as_ofs is not None else [None] * len(column.raw)
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
