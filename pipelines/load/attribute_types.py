"""Attributes whose values are of several types, in a file or across loads: filters see one type at a time."""

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql

# Elements of lists count as values: filters look into lists.
TYPES = """
select a.key, case jsonb_typeof(v.value) when 'string' then 'text' when 'boolean' then 'true/false'
                  else jsonb_typeof(v.value) end as type, count(*), min(t.{key})
from {table} t
cross join lateral jsonb_each(t.attributes) a
cross join lateral jsonb_array_elements(
    case jsonb_typeof(a.value) when 'array' then a.value else jsonb_build_array(a.value) end) v
where a.key = any(%(names)s)
group by 1, 2 order by 1, 3 desc
"""


def mixed_types(
    connection: psycopg.Connection[Any], table: str, key: str, file: str, met: Mapping[str, Mapping[str, int]]
) -> list[str]:
    """A warning for each attribute of a load (met: see Attributes) that is not of one type in the whole table."""
    statement = sql.SQL(TYPES).format(table=sql.Identifier(table), key=sql.Identifier(key))
    found: dict[str, list[tuple[str, int, str]]] = {}
    for name, kind, count, example in connection.execute(statement, {"names": list(met)}).fetchall():
        found.setdefault(name, []).append((kind, count, example))
    warnings = []
    for name, kinds in found.items():
        if len(kinds) > 1:
            parts = []
            for kind, count, example in kinds:
                row = met[name].get(kind)
                where = f"such as {key} {example!r}" if row is None else f"first in row {row:,} of {file}"
                parts.append(f"{kind} in {count:,} values ({where})")
            warnings.append(
                f"attribute {name} of {table} is {', and '.join(parts)}: a filter only matches values of its own type; "
                "load the column again with a single type"
            )
    return warnings


def described(met: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Attribute → its type as this load read it."""
    return {name: " and ".join(types) or "no value" for name, types in met.items()}
