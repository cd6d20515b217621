"""Great Expectations suites over the loaded tables, run inside Postgres: no frame is ever fetched.

Results are reduced at once to `Report`s: which expectation, what was observed, a handful of offending rows. Great
Expectations takes seconds to import, so that happens when a suite is first asked for.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from feature_repo.schema import INTERACTIONS, ITEMS, MAX_AHEAD_SECONDS, MAX_ID_BYTES, SCHEMA
from pipelines.item_content import with_content
from polytower.postgres import connect
from polytower.url import sqlalchemy_url

SAMPLE = 5
# Nothing was recommended before 1970, and a clock may run a little ahead of ours.
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
AHEAD = timedelta(seconds=MAX_AHEAD_SECONDS)
# A query expectation stops counting here: that many offenders are enough to refuse.
MOST_ROWS = 1_000
# The columns that name an offending row.
INTERACTION_KEYS, ITEM_KEYS = ["user_id", "item_id", "occurred_at"], ["item_id"]

# Items without content of any modality; "batch" stays a placeholder.
BARE = sql.SQL("""select items, bare from (
    select count(*) as items, count(*) filter (where found.item_id is null) as bare
    from {{batch}} left join ({found}) as found using (item_id)
) as counted where bare > 0.5 * items""")

# Great Expectations keeps process-wide state (its project manager): one suite at a time.
_TURN = threading.Lock()


@dataclass(frozen=True)
class Finding:
    """One expectation's outcome.

    expectation: its description. observed: count of offending rows, or the observed value. sample: some offenders.
    severity: "critical" blocks what follows, "warning" is told.
    """

    expectation: str
    passed: bool
    severity: str
    observed: Any
    sample: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        sample = f", such as {', '.join(map(str, self.sample))}" if self.sample else ""
        return f"{self.expectation}: observed {self.observed}{sample}"


@dataclass(frozen=True)
class Report:
    """All findings on one table, in the order of its suite."""

    table: str
    findings: list[Finding]

    @property
    def broken(self) -> list[Finding]:
        """The findings that did not pass, the critical ones first."""
        return sorted((f for f in self.findings if not f.passed), key=lambda f: f.severity != "critical")

    @property
    def blocking(self) -> bool:
        """Whether anything critical did not pass."""
        return any(finding.severity == "critical" for finding in self.broken)


def interaction_expectations() -> list[Any]:
    """What every log of interactions has to fulfil."""
    gx = _gx()
    expect = gx.expectations
    # occurred_at is compared as a time by Postgres; the upper bound moves with the clock.
    return [
        expect.ExpectTableRowCountToBeBetween(min_value=1, description="there are interactions"),
        *_identifiers(expect, ("user_id", "item_id"), INTERACTION_KEYS),
        expect.ExpectColumnValuesToNotBeNull(column="occurred_at", description="every interaction has a time"),
        expect.ExpectColumnValuesToBeOfType(
            column="occurred_at", type_="TIMESTAMP WITH TIME ZONE", description="interaction times are timestamps"
        ),
        expect.ExpectColumnValuesToBeBetween(
            column="occurred_at",
            min_value=EARLIEST,
            max_value=datetime.now(UTC) + AHEAD,
            description=f"interaction times are after 1970 and at most {MAX_AHEAD_SECONDS} s in the future",
        ),
        _short("kind", INTERACTION_KEYS),
        _short("event_id", INTERACTION_KEYS, least=0),
        _rows(
            # An item may be deleted: what happened to it teaches nothing then, and stops nothing.
            "every interaction has its item",
            """select user_id, item_id, occurred_at from {batch} left join polytower.items using (item_id)
               where items.item_id is null""",
            severity="warning",
        ),
        _rows(
            "values are finite numbers",
            """select user_id, item_id, value from {batch}
               where value = 'NaN' or value = 'Infinity' or value = '-Infinity'""",
        ),
        _rows(
            "at most 5 % of the interactions repeat another one at the same instant",
            # Only rows with an event id can repeat one under the primary key; without any this costs one index scan.
            """select events, repeated from (
                   select (select count(*) from polytower.interactions) as events, count(*) as repeated
                   from (select user_id, item_id, kind, occurred_at, event_id as own from {batch}) as later
                   where own <> '' and exists (
                       select from polytower.interactions as e
                       where e.user_id = later.user_id and e.occurred_at = later.occurred_at
                         and e.item_id = later.item_id and e.kind = later.kind and e.event_id < own)
               ) as counted where repeated > 0.05 * events""",
            severity="warning",
        ),
    ]


def item_expectations() -> list[Any]:
    """What every catalogue has to fulfil."""
    expect = _gx().expectations
    return [
        expect.ExpectTableRowCountToBeBetween(min_value=1, description="there are items"),
        *_identifiers(expect, ("item_id",), ITEM_KEYS),
        expect.ExpectColumnValuesToBeUnique(column="item_id", description="item ids are unique"),
        expect.ExpectColumnValuesToNotBeNull(column="available", description="every item says whether it is available"),
        _rows(
            "attributes are JSON objects",
            "select item_id, attributes from {batch} where jsonb_typeof(attributes) <> 'object'",
        ),
        _rows(
            "at least half of the items have content of some modality",
            BARE.format(found=sql.SQL(with_content().as_string().replace("{", "{{").replace("}", "}}"))).as_string(),
            severity="warning",
        ),
        _rows(
            "at most half of the items share their title with another one",
            """select titled, titles from (
                   select count(title) as titled, count(distinct title) as titles from {batch}
               ) as counted where titles < 0.5 * titled""",
            severity="warning",
        ),
    ]


# Table -> its suite, and its key.
SUITES = {
    INTERACTIONS: (interaction_expectations, INTERACTION_KEYS),
    ITEMS: (item_expectations, ITEM_KEYS),
}


def validate(url: str, table: str) -> Report:
    """Runs a table's suite in the database at `url` (any libpq URL)."""
    suite, keys = SUITES[table]
    with _TURN, _batch(url, table) as batch:
        expectations = suite()
        outcome = batch.validate(
            _gx().ExpectationSuite(name=table, expectations=expectations),
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": SAMPLE,
                "unexpected_index_column_names": keys,
            },
        )
    findings = {finding.expectation: finding for finding in map(_finding, outcome.results)}
    ordered = [findings[expectation.description] for expectation in expectations]
    with connect(url) as connection:
        return Report(table, [_with_rows(connection, table, finding, expectations) for finding in ordered])


def _identifiers(expect: Any, columns: tuple[str, ...], keys: Sequence[str]) -> Iterator[Any]:
    for column in columns:
        yield expect.ExpectColumnValuesToNotBeNull(column=column, description=f"{column} is never null")
        yield _short(column, keys)


def _short(column: str, keys: Sequence[str], least: int = 1) -> Any:
    """In bytes, as all doors count: a character may take four of them."""
    query = sql.SQL("select {keys} from {{batch}} where octet_length({column}) not between {least} and {most}").format(
        keys=sql.SQL(", ").join(map(sql.Identifier, keys)),
        column=sql.Identifier(column),
        least=least,
        most=MAX_ID_BYTES,
    )
    what = "is empty or longer" if least else "is longer"
    return _rows(f"no {column} {what} than {MAX_ID_BYTES} bytes", query.as_string())


def _rows(description: str, query: str, severity: str = "critical") -> Any:
    return _gx().expectations.UnexpectedRowsExpectation(
        description=description, unexpected_rows_query=f"{query} limit {MOST_ROWS}", severity=severity
    )


def _finding(result: Any) -> Finding:
    config, observed = result.expectation_config, result.result
    if "observed_value" not in observed and "unexpected_count" not in observed:
        return Finding(
            config.description, False, str(config.severity.value), f"an error: {result.exception_info}"[:500]
        )
    return Finding(
        config.description,
        bool(result.success),
        str(config.severity.value),
        observed.get("observed_value", observed.get("unexpected_count")),
        [] if result.success else [_plain(row) for row in observed.get("partial_unexpected_index_list") or []],
    )


def _with_rows(connection: psycopg.Connection[Any], table: str, finding: Finding, expectations: list[Any]) -> Finding:
    """Adds the sample that a failed query expectation leaves out of a summary."""
    query = next(
        (
            expectation.unexpected_rows_query
            for expectation in expectations
            if expectation.description == finding.expectation and hasattr(expectation, "unexpected_rows_query")
        ),
        None,
    )
    if finding.passed or query is None:
        return finding
    cursor = connection.execute(sql.SQL(query).format(batch=sql.Identifier(SCHEMA, table)))
    names = [column.name for column in cursor.description or ()]
    sample = [_plain(dict(zip(names, row, strict=True))) for row in cursor.fetchmany(SAMPLE)]
    return Finding(finding.expectation, False, finding.severity, finding.observed, sample)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, int | float) else str(value)[:200] for name, value in row.items()}


@contextmanager
def _batch(url: str, table: str) -> Iterator[Any]:
    """The table as Great Expectations sees it, in a context that lives in memory and leaves no connection behind."""
    context = _gx().get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    source = context.data_sources.add_postgres("postgres", connection_string=sqlalchemy_url(url))
    engine = source.get_engine()
    try:
        asset = source.add_table_asset(table, table_name=table, schema_name=SCHEMA)
        yield asset.add_batch_definition_whole_table("all").get_batch()
    finally:
        source.get_execution_engine().close()
        engine.dispose()


def _gx() -> Any:
    # Read at import: nothing about a run leaves the machine.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations

    return great_expectations
