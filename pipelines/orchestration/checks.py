"""Asset checks: expectations on the loaded tables, gates on embeddings. A failed error stops everything downstream.

A new gate is one entry in pipelines/generation/quality.py (its name in CONTENT_GATES, CODE_GATES or GENERATION_GATES);
a new expectation is one line in pipelines/expectations.py. Nothing is registered here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
import psycopg

from encoders.content.encoder import ContentEncoder
from encoders.content.registry import encoder_of
from feature_repo.schema import INTERACTIONS, ITEMS
from pipelines import expectations
from pipelines.generation import lifecycle
from pipelines.generation.meanings import MEANINGS
from pipelines.generation.quality import (
    CODE_GATES,
    CONTENT_GATES,
    GENERATION_GATES,
    code_gates,
    content_gates,
    encodable,
)
from pipelines.generation.title_recall import TITLE_GATES, title_gates, title_recall
from pipelines.item_content import model_of
from pipelines.orchestration import plots
from pipelines.orchestration.resources import EncoderResource, PostgresResource
from polytower.errors import UserError


def _failing(name: str) -> str:
    return f"Fails when {MEANINGS[name]}."


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
    specs=[
        dg.AssetCheckSpec(name, asset="content_embeddings", blocking=True, description=_failing(name))
        for name in CONTENT_GATES
    ]
)
def content_embeddings_are_sound(
    postgres: PostgresResource, encoders: EncoderResource
) -> Iterator[dg.AssetCheckResult]:
    """Every gate over the content embeddings of all encoders in force, one modality after the other."""
    with postgres.connect() as connection:
        active = connection.execute(
            "select modality, revision from content_encoders where active order by modality limit 100"
        ).fetchall()
        measured = {
            modality: content_gates(connection, modality, revision, _encoder(connection, encoders, modality, revision))
            for modality, revision in active
        }
    for place, name in enumerate(CONTENT_GATES):
        gates = {modality: gates[place].as_json() for modality, gates in measured.items()}
        yield _gate_result("content_embeddings", name, gates)


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(name, asset="content_codes", blocking=True, description=_failing(name)) for name in CODE_GATES
    ]
)
def content_codes_are_sound(postgres: PostgresResource) -> Iterator[dg.AssetCheckResult]:
    """How many items have codes, and how much coding lost."""
    with postgres.connect() as connection:
        gates = code_gates(connection)
    for gate in gates:
        yield _gate_result("content_codes", gate.name, {"all modalities": gate.as_json()})


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(name, asset="generation", blocking=True, description=_failing(name))
        for name in GENERATION_GATES
    ]
)
def generation_is_sound(postgres: PostgresResource) -> Iterator[dg.AssetCheckResult]:
    """The gates that the build stored with the newest generation: what promotion looks at, too."""
    with postgres.connect() as connection:
        newest = next(g for g in lifecycle.listing(connection) if g.state != "failed")
    stored = {gate["name"]: gate for gate in newest.quality.get("gates", [])}
    for name in GENERATION_GATES:
        found = {f"generation {newest.generation}": stored[name]} if name in stored else {}
        yield _gate_result("generation", name, found)


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(
            name, asset="generation", blocking=True, description=f"Titles that find their item, in {space}."
        )
        for name, space in zip(TITLE_GATES, ("the text encoder's own space", "the towers' content space"), strict=True)
    ]
)
def titles_find_their_items(postgres: PostgresResource, encoders: EncoderResource) -> Iterator[dg.AssetCheckResult]:
    """R@1 and R@10 of sampled titles as questions by text, numbers that Dagster plots over time."""
    with postgres.connect() as connection:
        newest = next(g for g in lifecycle.listing(connection) if g.state != "failed")
        revision = newest.config.get("encoders", {}).get("text")
        encoder = encoder_of("text", encoders.settings()) if revision else None
        fits = encoder is not None and encoder.revision == revision
        measured = title_recall(connection, newest.generation, encoder) if encoder is not None and fits else []
    for name, (gate, found) in title_gates(measured).items():
        result = _gate_result("generation", name, {f"generation {newest.generation}": gate.as_json()})
        numbers: dict[str, Any] = (
            {} if found is None else {"titles": found.titles, "R@1": found.at_1, "R@10": found.at_10}
        )
        said = None if measured or not revision else "not measured: another text encoder is set, or there are no titles"
        yield result._replace(metadata={**result.metadata, **numbers}, description=result.description or said)


def _encoder(
    connection: psycopg.Connection[Any], encoders: EncoderResource, modality: str, revision: str
) -> ContentEncoder[Any] | None:
    """The encoder in force; None where this machine is set to another one, or nothing is left to ask it."""
    if not encodable(connection, modality):
        return None
    try:
        encoder = encoder_of(modality, encoders.settings(), model_of(connection, modality))
    except UserError:
        return None
    return encoder if encoder.revision == revision else None


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
        f"{where}: {name} is {float(gate['value']):.4g} (needs {gate['bound']} {gate['threshold']:.4g}):"
        f" {MEANINGS[name]}"
        for where, gate in failed.items()
    ]
    return dg.AssetCheckResult(
        passed=not failed,
        asset_key=asset,
        check_name=name,
        severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
        description="; ".join(reasons) or None,
        metadata={
            "measured": dg.MetadataValue.md(plots.markdown_table(rows, ["where", *columns])),
            **{f"value, {where}": float(gate["value"]) for where, gate in gates.items() if gate["value"] is not None},
        },
    )


CHECKS = (
    items_are_sound,
    interactions_are_sound,
    content_embeddings_are_sound,
    content_codes_are_sound,
    generation_is_sound,
    titles_find_their_items,
)
