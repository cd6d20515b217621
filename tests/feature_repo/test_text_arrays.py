"""Text arrays decoded for all rows at once are what the driver reads one by one."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_repo.text_arrays import as_arrow, as_lists

# Postgres stores no zero character, and no lone surrogates.
TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
ODD = st.one_of(st.none(), st.just(""), TEXT, st.integers(250, 260).map("x".__mul__))
PLAIN = st.lists(st.lists(TEXT.filter(bool), max_size=5) | st.none(), max_size=6)
MIXED = st.lists(st.lists(ODD, max_size=5) | st.none(), max_size=6)


@pytest.fixture(scope="module")
def opened(server: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(server) as connection:
        yield connection


@settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(column=PLAIN | MIXED)
def test_all_at_once_is_one_by_one(opened: psycopg.Connection[Any], column: list[list[str | None] | None]) -> None:
    sent = [opened.execute("select array_send(%b::text[])", [row], binary=True).fetchone() for row in column]
    wire = [None if row is None else row[0] for row in sent]
    assert as_lists(wire) == column
    assert as_arrow(wire).to_pylist() == column
    assert str(as_arrow(wire).type) == "list<item: string>"


@pytest.mark.parametrize("length", [1, 10, 255, 256, 257, 65_536])
def test_lengths_that_hold_other_zeros(opened: psycopg.Connection[Any], length: int) -> None:
    column = [["a", "é" * length], ["b" * length, "c"]]
    wire = [opened.execute("select array_send(%b::text[])", [row], binary=True).fetchone()[0] for row in column]  # type: ignore[index]
    assert as_lists(wire) == as_arrow(wire).to_pylist() == column
