"""Rows of JSON lines: one object a line, numbers with all their digits, no key twice."""

import json
from collections.abc import Iterator
from typing import IO, Any

from pipelines.load.csv_records import MAX_ROW_BYTES
from pipelines.load.digits import Written, survives
from polytower.errors import UserError

Fault = tuple[str, str, str]  # column, reason, value


class _RepeatedKeyError(ValueError):
    pass


def json_rows(file: IO[bytes], name: str) -> Iterator[tuple[dict[str, Any], Fault | None]]:
    """(row, its fault if it has one). UserError, naming the line, for what is no JSON object."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise UserError(f"{name}, line {number} is longer than {MAX_ROW_BYTES >> 20} MiB; shorten it")
        if line.strip():
            yield _row(line, name, number)


def _row(line: bytes, name: str, number: int) -> tuple[dict[str, Any], Fault | None]:
    fault: Fault | None = None
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        try:
            row = json.loads(text, parse_float=_number, object_pairs_hook=_object)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a key twice, or an integer of thousands of digits
            row, fault = _faulty(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False, default=str).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError:
        raise UserError(
            f"{name}, line {number} is not UTF-8 text (Latin-1 or Windows-1252?); convert it: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {name} > new"
        ) from None
    except (json.JSONDecodeError, UnicodeEncodeError, RecursionError) as error:
        way_out = (
            "jq -c '.[]' turns an array into one object per line"
            if line[:1] == b"["
            else "jq -c . writes one object per line"
        )
        raise UserError(f"{name}, line {number} is not JSON (truncated or corrupt?): {error}; {way_out}") from None
    if isinstance(row, list) and number == 1:
        raise UserError(f"{name} is one JSON array, not one object per line; rewrite it: jq -c '.[]' {name} > new")
    if not isinstance(row, dict):
        raise UserError(f"{name}, line {number} is not a JSON object with column names as its keys")
    return row, fault


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKeyError
    return found


def _number(text: str) -> float | Written:
    return float(text) if survives(text) else Written(text)


def _integer(text: str) -> int | Written:
    try:
        return int(text)
    except ValueError:
        return Written(text)


def _faulty(text: str) -> tuple[Any, Fault | None]:
    """The row without the cells that cannot be read, and the first of these."""
    faults: list[Fault] = []

    def read(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for column, value in pairs:
            if column in row:
                faults.append((column, "appears twice in one row", str(value)[:200]))
            row[column] = value
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, Written) and number.removeprefix("-").isdigit():
                    faults.append((column, f"is a number of {len(number):,} digits", number[:200]))
                    row[column] = None
        return row

    row = json.loads(text, parse_float=_number, parse_int=_integer, object_pairs_hook=read)
    return row, faults[0] if faults else None
