"""Asset checks: expectations on the loaded tables, gates on embeddings. A failed error stops everything downstream.

A new gate is one entry in pipelines/generation/quality.py (its name in CONTENT_GATES, CODE_GATES or GENERATION_GATES);
a new expectation is one line in pipelines/expectations.py. Nothing is registered here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from feature_repo.schema import INTERACTIONS, ITEMS
from pipelines import expectations
from pipelines.generation import lifecycle
from pipelines.generation.quality import CODE_GATES, CONTENT_GATES, GENERATION_GATES, code_gates, content_gates
from pipelines.orchestration import plots
from pipelines.orchestration.resources import PostgresResource


@dg.asset_check(
    asset="items", name="expectations", blocking=True, description="Great Expectations' suite over the catalogue."
)
def items_are_sound(postgres: PostgresResource) -> dg.AssetCheckResult:
    """Ids, attributes, content and titles of the items."""
    return _result(expectations.validate(postgres.database_url(), ITEMS))


@dg.asset_check(
    asset="interactions", name="expectations", blocking=True, description="Great Expectations' suite over the log."
)
def interactions_are_sound(postgres: PostgresResource) -> dg.AssetCheckResult:
    """Ids, times, values, references to items and repetitions of the interactions."""
    return _result(expectations.validate(postgres.database_url(), INTERACTIONS))


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec(name, asset="content_embeddings", blocking=True) for name in CONTENT_GATES]
)
def content_embeddings_are_sound(postgres: PostgresResource) -> Iterator[dg.AssetCheckResult]:
    """Every gate over the content embeddings of all encoders in force, one modality after the other."""
    with postgres.connect() as connection:
        active = connection.execute(
            "select modality, revision from content_encoders where active order by modality limit 100"
        ).fetchall()
        measured = {modality: content_gates(connection, modality, revision) for modality, revision in active}
    for place, name in enumerate(CONTENT_GATES):
        gates = {modality: gates[place].as_json() for modality, gates in measured.items()}
        yield _gate_result("content_embeddings", name, gates)


@dg.multi_asset_check(specs=[dg.AssetCheckSpec(name, asset="content_codes", blocking=True) for name in CODE_GATES])
def content_codes_are_sound(postgres: PostgresResource) -> Iterator[dg.AssetCheckResult]:
    """How many items have codes, and how much coding lost."""
    with postgres.connect() as connection:
        gates = code_gates(connection)
    for gate in gates:
        yield _gate_result("content_codes", gate.name, {"all modalities": gate.as_json()})


@dg.multi_asset_check(specs=[dg.AssetCheckSpec(name, asset="generation", blocking=True) for name in GENERATION_GATES])
def generation_is_sound(postgres: PostgresResource) -> Iterator[dg.AssetCheckResult]:
    """The gates that the build stored with the newest generation: what promotion looks at, too."""
    with postgres.connect() as connection:
        newest = next(g for g in lifecycle.listing(connection) if g.state != "failed")
    stored = {gate["name"]: gate for gate in newest.quality.get("gates", [])}
    for name in GENERATION_GATES:
        found = {f"generation {newest.generation}": stored[name]} if name in stored else {}
        yield _gate_result("generation", name, found)


def _result(report: expectations.Report) -> dg.AssetCheckResult:
    rows = [
        ("yes" if f.passed else "NO", f.severity, f.expectation, f.observed, "; ".join(map(str, f.sample)))
        for f in report.findings
    ]
    table = plots.markdown_table(rows, ["passed", "severity", "expectation", "observed", "such as"])
    severity = dg.AssetCheckSeverity.ERROR if report.blocking else dg.AssetCheckSeverity.WARN
    return dg.AssetCheckResult(
        passed=not report.broken,
        severity=severity,
        description="; ".join(map(str, report.broken)) or None,
        metadata={"expectations": dg.MetadataValue.md(table), "failed": len(report.broken)},
    )


def _gate_result(asset: str, name: str, gates: Mapping[str, Mapping[str, Any]]) -> dg.AssetCheckResult:
    """gates: what was measured (a modality, a generation) -> the gate as JSON."""
    failed = {where: gate for where, gate in gates.items() if not gate["passed"]}
    blocking = any(gate["severity"] == "error" for gate in failed.values())
    columns: Sequence[str] = ("value", "bound", "threshold", "severity")
    rows = [(where, *(gate[column] for column in columns)) for where, gate in gates.items()]
    reasons = [
        f"{where}: {name} is {gate['value']:.4g} (needs {gate['bound']} {gate['threshold']:.4g})"
        for where, gate in failed.items()
    ]
    return dg.AssetCheckResult(
        passed=not failed,
        asset_key=asset,
        check_name=name,
        severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
        description="; ".join(reasons) or None,
        metadata={"measured": dg.MetadataValue.md(plots.markdown_table(rows, ["where", *columns]))},
    )


CHECKS = (
    items_are_sound,
    interactions_are_sound,
    content_embeddings_are_sound,
    content_codes_are_sound,
    generation_is_sound,
)
