"""Filters over attributes in memory: for each attribute and value, the items that have it.

Answers as Postgres answers `attributes @@ filter_path(filter)`, or None where it would not know for certain: an
attribute that nobody has, a malformed filter, a type that the attribute never has, values that are neither scalars nor
lists of scalars. SQL answers those, or says what is wrong.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Positions = NDArray[np.int32]
# Kind and value: true is not 1, "1" is not 1, 1.0 is 1.
Value = tuple[str, Any]

NULL: Value = ("constant", None)
RANGES = ("gt", "gte", "lt", "lte")


def typed(value: Any) -> Value | None:
    """A JSON scalar as a comparable pair; None for what is no scalar, or no JSON number."""
    if value is None or isinstance(value, bool):
        return "constant", value
    if isinstance(value, str):
        return None if "\x00" in value else ("string", value)
    if isinstance(value, int | float | Decimal):
        number = Decimal(repr(value) if isinstance(value, float) else value)
        return ("number", number) if number.is_finite() else None
    return None


class Postings:
    """Attribute → value → ascending positions of the items that have it, V items in all."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.bytes = 0
        self._values: dict[str, dict[Value, Positions]] = {}
        self._unsure: set[str] = set()
        self._kinds: dict[str, set[str]] = {}
        self._ordered: dict[tuple[str, ...], Ordered] = {}

    def add(self, attribute: str, value: str, positions: Positions) -> None:
        """Takes one attribute's value, as JSON text."""
        key = typed(json.loads(value, parse_float=Decimal))
        values = self._values.setdefault(attribute, {})
        if key is None:
            self.leave_out(attribute)
            return
        if key != NULL:
            self._kinds.setdefault(attribute, set()).add(key[0])
        # 1 and 1.0 are two texts and one value.
        values[key] = np.union1d(values[key], positions) if key in values else positions
        self.bytes += positions.nbytes + 200 + len(value)

    def add_attribute(self, attribute: str) -> None:
        """Takes note of an attribute, of which no value may come."""
        self._values.setdefault(attribute, {})

    def leave_out(self, attribute: str) -> None:
        """Filters on this attribute are Postgres' own: it has too many values, or values that are no scalars."""
        self._values.setdefault(attribute, {})
        self._unsure.add(attribute)

    def knows(self, attribute: str) -> bool:
        """Whether filters on this attribute can be answered here."""
        return attribute in self._values and attribute not in self._unsure

    def mask(self, wanted: Mapping[str, Any]) -> Mask | None:
        """Which items satisfy the filter; None: ask Postgres."""
        kept = np.ones(self.items, bool)
        for attribute, rule in wanted.items():
            if not self.knows(attribute):
                return None
            found = self._rule(attribute, rule)
            if found is None:
                return None
            kept &= found
        return kept

    def categories(self, attribute: str, positions: NDArray[np.int64]) -> Mask:
        """[P, C]: which of the values (null is none) each item has, of those that any of them has."""
        columns = []
        for value, having in self._values[attribute].items():
            if value != NULL:
                column = having[np.minimum(np.searchsorted(having, positions), len(having) - 1)] == positions
                if column.any():
                    columns.append(column)
        return np.stack(columns, axis=1) if columns else np.zeros((len(positions), 0), bool)

    def _rule(self, attribute: str, rule: Any) -> Mask | None:
        values = self._values[attribute]
        if not isinstance(rule, dict):
            key = typed(rule)
            return None if key is None or self._mistyped(attribute, [key]) else self._any(values, [key])
        if not rule:
            return None
        kept = np.ones(self.items, bool)
        ranges = {name: bound for name, bound in rule.items() if name in RANGES}
        for name, operand in rule.items():
            if name in ranges:
                continue
            keys = [typed(value) for value in operand] if name in ("any", "all") and isinstance(operand, list) else []
            known = [key for key in keys if key is not None]
            if not known or len(known) < len(keys) or self._mistyped(attribute, known):
                return None
            if name == "any":
                kept &= self._any(values, known)
            else:
                for key in known:
                    kept &= self._any(values, [key])
        if ranges:
            found = self._range(attribute, values, ranges)
            if found is None:
                return None
            kept &= found
        return kept

    def _mistyped(self, attribute: str, keys: Iterable[Value]) -> bool:
        """Whether the attribute has values, and all of them are of other types than these."""
        wanted = {key[0] for key in keys if key != NULL}
        held = self._kinds.get(attribute)
        return bool(held and wanted and not held & wanted)

    def _any(self, values: Mapping[Value, Positions], keys: Iterable[Value]) -> Mask:
        found = np.zeros(self.items, bool)
        for key in keys:
            if key in values:
                found[values[key]] = True
        return found

    def _range(self, attribute: str, values: Mapping[Value, Positions], ranges: Mapping[str, Any]) -> Mask | None:
        """Items with one value for which all bounds hold. Strings compare by code point, as jsonpath's do in UTF-8."""
        bounds = {name: typed(bound) for name, bound in ranges.items()}
        kinds = {bound[0] if bound else "" for bound in bounds.values()}
        found = np.zeros(self.items, bool)
        if not kinds <= {"number", "string"} or any(
            self._mistyped(attribute, [bound]) for bound in bounds.values() if bound
        ):
            return None
        if len(kinds) > 1:
            return found
        if (attribute, *kinds) not in self._ordered:
            self._ordered[attribute, *kinds] = Ordered(values, *kinds)
        ordered = self._ordered[attribute, *kinds]
        found[ordered.between({name: bound[1] for name, bound in bounds.items() if bound})] = True
        return found


class Ordered:
    """One attribute's values of one kind in order, and the items that have them in the same order."""

    def __init__(self, values: Mapping[Value, Positions], kind: str) -> None:
        found = sorted(((v, p) for (of, v), p in values.items() if of == kind), key=lambda pair: pair[0])
        self._values = [value for value, _ in found]
        self._ends = np.cumsum([0, *(len(positions) for _, positions in found)])
        self._positions = np.concatenate([np.empty(0, np.int32), *(positions for _, positions in found)])

    def between(self, bounds: Mapping[str, Any]) -> Positions:
        """Items with a value inside all bounds (gt, gte, lt, lte)."""
        first, last = 0, len(self._values)
        for name, bound in bounds.items():
            cut = (bisect_right if name in ("gt", "lte") else bisect_left)(self._values, bound)
            first, last = (max(first, cut), last) if name in ("gt", "gte") else (first, min(last, cut))
        return self._positions[self._ends[first] : self._ends[max(first, last)]]
