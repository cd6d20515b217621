"""Assets made of data alone: the loaded tables, daily sequences, content embeddings by modality, codes of them.

Each asset is thin: what it does is a plain function elsewhere. A run without a partition brings everything up to date
(the days and items that changed); a run with one does that day, range of days or modality again.
"""

import warnings
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import dagster as dg
import psycopg
from pydantic import Field

from encoders.content.registry import encoder_of
from feature_repo.modalities import MODALITIES
from pipelines.content_codes import code_content
from pipelines.content_embeddings import EncodeReport, encode_modality
from pipelines.generation.quality import content_sample, encodable
from pipelines.item_content import model_of
from pipelines.load.folder import load_folder
from pipelines.orchestration import plots
from pipelines.orchestration.resources import EncoderResource, PostgresResource, TakeOver, Terminal
from pipelines.query_embeddings import MODALITY, encode_queries
from pipelines.sequences import changed_days, refresh_sequences

# backfill_policy (which ranges of days need) is marked beta, and so are parts of decorators that Dagster calls itself.
warnings.filterwarnings("ignore", category=dg.BetaWarning)

# Dagster writes two events a partition, 35 ms together: the 8,000 days of an old log would take five minutes. So a
# run that finds its days itself marks only the newest of them.
MARKED_DAYS = 14

DAYS = dg.DailyPartitionsDefinition(start_date="1970-01-01", end_offset=1)
BY_MODALITY = dg.StaticPartitionsDefinition(list(MODALITIES))


class LoadConfig(TakeOver):
    """folder: in the input contract's format; empty records what the tables hold. images: where its pictures lie.

    own: modality → the items' column that holds it, such as {"vector": "embedding"}.
    """

    folder: str = ""
    images: str = ""
    own: dict[str, str] = Field(default_factory=dict)


@dg.multi_asset(
    specs=[
        dg.AssetSpec("items", description="The catalogue, as loaded.", group_name="data", kinds={"postgres"}),
        dg.AssetSpec(
            "interactions",
            deps=["items"],
            description="The log of events, as loaded or posted.",
            group_name="data",
            kinds={"postgres"},
        ),
    ],
)
def loaded_tables(config: LoadConfig, postgres: PostgresResource, terminal: Terminal) -> Iterator[Any]:
    """Loads a folder when the run's configuration names one; tells what the tables hold."""
    report: dict[str, Any] = {}
    with postgres.connect() as connection:
        if config.folder:
            images = Path(config.images) if config.images else None
            report = load_folder(
                connection, Path(config.folder), images,
                own=config.own, progress=terminal.progress, take_over=config.take_over,
            ).as_json()  # fmt: skip
        items, updated = _row(connection, "select count(*), max(updated_at) from items")
        events, users, first, last, position = _row(
            connection,
            """select count(*), count(distinct user_id), min(occurred_at), max(occurred_at), max(position)
               from interactions""",
        )
    loaded = {"load": dg.MetadataValue.json(report)} if report else {}
    yield dg.MaterializeResult(
        asset_key="items", metadata={"dagster/row_count": items, "updated": str(updated), **loaded}
    )
    yield dg.MaterializeResult(
        asset_key="interactions",
        metadata={
            "dagster/row_count": events,
            "users": users,
            "first": str(first),
            "last": str(last),
            "position": position or 0,
            **loaded,
        },
    )


@dg.asset(
    deps=["interactions"],
    partitions_def=DAYS,
    backfill_policy=dg.BackfillPolicy.single_run(),
    group_name="data",
    kinds={"postgres"},
)
def user_sequences(context: dg.AssetExecutionContext, postgres: PostgresResource) -> dg.MaterializeResult[Any]:
    """Sequences and counts as they stood at the end of each day, by user and by item; only days with activity."""
    started = perf_counter()
    with postgres.connect() as connection:
        days = _partition_days(context) or changed_days(connection)
        rows = refresh_sequences(connection, *days) if days else {}
    if days and not _partition_days(context):
        for day in _newest(days):
            context.log_event(dg.AssetMaterialization(context.asset_key, partition=day.isoformat()))
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": sum(rows.values()),
            **rows,
            "days": f"{days[0]} to {days[1]}" if days else "nothing changed",
            "seconds": perf_counter() - started,
        }
    )


@dg.asset(deps=["items"], partitions_def=BY_MODALITY, group_name="content", kinds={"postgres", "torch"})
def content_embeddings(
    context: dg.AssetExecutionContext,
    config: TakeOver,
    postgres: PostgresResource,
    encoders: EncoderResource,
    terminal: Terminal,
) -> dg.MaterializeResult[Any]:
    """What each item is, by modality: encodes the items whose content the encoder in force has not seen."""
    chosen = (context.partition_key,) if context.has_partition_key else tuple(MODALITIES)
    reports = []
    for modality in chosen:
        with postgres.connect() as connection:
            if not encodable(connection, modality):
                continue  # no model is loaded for a modality that nothing has
            encoder = encoder_of(modality, encoders.settings(), model_of(connection, modality))
            report = encode_modality(
                connection, modality, encoder, progress=terminal.progress, take_over=config.take_over
            )
            reports.append(report)
            if not context.has_partition_key:
                metadata = _content_metadata(connection, report)
                context.log_event(dg.AssetMaterialization(context.asset_key, partition=modality, metadata=metadata))
    with postgres.connect() as connection:
        if context.has_partition_key and reports:
            return dg.MaterializeResult(metadata=_content_metadata(connection, reports[0]))
        return dg.MaterializeResult(metadata=_contents_metadata(connection, reports))


class QueriesConfig(TakeOver):
    """wanted: whether the queries are encoded; `materialize` does it for presets that read them."""

    wanted: bool = True


@dg.asset(deps=["interactions", "content_embeddings"], group_name="content", kinds={"postgres", "torch"})
def query_embeddings(
    config: QueriesConfig, postgres: PostgresResource, encoders: EncoderResource, terminal: Terminal
) -> dg.MaterializeResult[Any]:
    """What users searched for: encodes the distinct queries that the text encoder in force has not seen."""
    with postgres.connect() as connection:
        (found,) = _row(connection, "select exists (select from interactions where query_key(query) is not null)")
        if not config.wanted or not found:
            return dg.MaterializeResult(metadata={"dagster/row_count": 0, "encoded": 0})
        encoder = encoder_of(MODALITY, encoders.settings(), model_of(connection, MODALITY))
        report = encode_queries(connection, encoder, progress=terminal.progress, take_over=config.take_over)
    return dg.MaterializeResult(metadata={"dagster/row_count": report.queries, **report.as_json()})


def _content_metadata(connection: psycopg.Connection[Any], report: EncodeReport) -> dict[str, Any]:
    failures = [(failure.item_id, failure.source, failure.reason) for failure in report.failures]
    return {
        "dagster/row_count": report.encoded + report.skipped,
        "encoded": report.encoded,
        "skipped": report.skipped,
        "removed": report.removed,
        "failed": report.failed,
        "items per second": report.items_per_second,
        "seconds": report.seconds,
        "seconds for the index": report.index_seconds,
        "encoder": f"{report.model} ({report.revision})",
        "failures": dg.MetadataValue.md(plots.markdown_table(failures, ["item", "source", "reason"])),
        "norms": dg.MetadataValue.md(_norms(connection, [report])),
    }


def _contents_metadata(connection: psycopg.Connection[Any], reports: Sequence[EncodeReport]) -> dict[str, Any]:
    columns = ["modality", "model", "items", "encoded", "skipped", "removed", "failed", "items_per_second", "seconds"]
    rows = [[getattr(report, column) for column in columns] for report in reports]
    return {
        "dagster/row_count": sum(report.encoded + report.skipped for report in reports),
        "encoded": sum(report.encoded for report in reports),
        "failed": sum(report.failed for report in reports),
        "modalities": dg.MetadataValue.md(plots.markdown_table(rows, columns)),
        "norms": dg.MetadataValue.md(_norms(connection, reports)),
    }


def _norms(connection: psycopg.Connection[Any], reports: Sequence[EncodeReport]) -> str:
    import numpy as np

    lengths: dict[str, Any] = {
        report.modality: np.linalg.norm(content_sample(connection, report.modality, report.revision), axis=1)
        for report in reports
        if report.encoded + report.skipped
    }
    return plots.histograms(lengths, "lengths of content embeddings")


def _partition_days(context: dg.AssetExecutionContext) -> tuple[date, date] | None:
    if not (context.has_partition_key or context.has_partition_key_range):
        return None
    keys = context.partition_key_range
    return date.fromisoformat(keys.start), date.fromisoformat(keys.end)


def _newest(days: tuple[date, date]) -> list[date]:
    first, last = days
    count = min((last - first).days + 1, MARKED_DAYS)
    return [last - timedelta(days=back) for back in reversed(range(count))]


def _row(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(row)


@dg.asset(deps=[content_embeddings], group_name="content", kinds={"postgres", "faiss"})
def content_codes(config: TakeOver, postgres: PostgresResource) -> dg.MaterializeResult[Any]:
    """What each item is in 16 bytes a modality, for the search over long histories, and in four numbers."""
    with postgres.connect() as connection:
        report = code_content(connection, take_over=config.take_over)
    run = report.run
    rows = [(name, report.centroids[name], report.cosine.get(name, 1.0)) for name in report.centroids]
    columns = ["modality", "centroids", "mean cosine"]
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": report.items,
            "code set": "none" if report.code_set is None else report.code_set,
            "trained": run.trained,
            "why": run.why,
            "coded": run.coded,
            "removed": run.removed,
            "bytes": report.bytes,
            "modalities": dg.MetadataValue.md(plots.markdown_table(rows, columns)),
            "distinct semantic ids": report.distinct,
            "seconds": report.seconds,
        }
    )


DATA_ASSETS = (loaded_tables, user_sequences, content_embeddings, content_codes, query_embeddings)
