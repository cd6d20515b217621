"""Assets that a model makes: training set, checkpoint, generation, its promotion, and Feast's view of it."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import dagster as dg
import psycopg
from psycopg import sql
from pydantic import Field

from encoders.config import changed
from encoders.presets import preset
from feature_repo.schema import FEAST_SCHEMA
from pipelines.generation import lifecycle
from pipelines.generation.build import build
from pipelines.generation.training import located, train_checkpoint
from pipelines.generation.training_set import read_training_set
from pipelines.orchestration import plots
from pipelines.orchestration.resources import EncoderResource, PostgresResource, TakeOver, Terminal
from polytower.errors import UserError


class TrainingConfig(dg.Config):
    """preset: name of the training configuration (docs/models.md lists them). options: what differs from it."""

    preset: str = "demo"
    options: dict[str, Any] = Field(default_factory=dict)


@dg.asset(deps=["user_sequences", "content_embeddings", "query_embeddings"], group_name="model", kinds={"postgres"})
def training_set(postgres: PostgresResource) -> dg.MaterializeResult[Any]:
    """What the towers will learn from: events, items, and the content encoders in force. Refuses an empty one."""
    with postgres.connect() as connection:
        row = connection.execute(
            """select count(*), count(distinct user_id), count(distinct item_id), max(position) from interactions"""
        ).fetchone()
        encoders = connection.execute(
            """select modality, model, revision, dim, count(item_id) from content_encoders
               left join content_embeddings using (modality, revision) where active group by 1, 2, 3, 4 order by 1"""
        ).fetchall()
    assert row is not None
    if not row[0]:
        raise UserError("there are no interactions to learn from: `polytower load DIR` brings them")
    table = plots.markdown_table(encoders, ["modality", "model", "revision", "width", "items"])
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": row[0],
            "users": row[1],
            "items with events": row[2],
            "until position": row[3],
            "content": dg.MetadataValue.md(table),
        }
    )


@dg.asset(deps=[training_set], group_name="model", kinds={"torch"})
def checkpoint(
    config: TrainingConfig, postgres: PostgresResource, encoders: EncoderResource, terminal: Terminal
) -> dg.MaterializeResult[Any]:
    """Towers trained on the training set; the same data and preset find the finished checkpoint again."""
    chosen = encoders.settings()
    reads = changed(preset(config.preset), config.options).towers
    with postgres.connect() as connection:
        snapshot = read_training_set(connection, reads.user_attributes, queries="queries" in reads.reads)
    trained = train_checkpoint(
        snapshot, config.preset, chosen.checkpoints_dir,
        options=config.options, device=chosen.device, progress=terminal.progress,
    )  # fmt: skip
    curves = plots.curves(trained.curves, "epoch", ["loss", "ndcg_10", "recall_50"])
    return dg.MaterializeResult(
        metadata={
            "directory": dg.MetadataValue.path(str(trained.directory)),
            "sha256": trained.sha256,
            "preset": trained.preset,
            "reused": trained.reused,
            "best epoch": trained.best_epoch,
            "seconds": trained.seconds,
            "curves": dg.MetadataValue.md(curves),
            **{f"validation {name}": float(value) for name, value in trained.metrics.items()},
        }
    )


@dg.asset(deps=[checkpoint], group_name="model", kinds={"postgres", "torch"})
def generation(
    context: dg.AssetExecutionContext, config: TakeOver, postgres: PostgresResource, terminal: Terminal
) -> dg.MaterializeResult[Any]:
    """All item embeddings and interests of the newest checkpoint, indexed and measured, ready to go live."""
    started = perf_counter()
    recorded = str(_latest(context, "checkpoint", "directory"))
    directory = located(recorded) or Path(recorded)
    with postgres.connect() as connection:
        number = build(connection, directory, progress=terminal.progress, take_over=config.take_over)
        found = lifecycle.get(connection, number)
        counts = connection.execute(
            """select (select count(*) from item_embeddings where generation = %(g)s),
                      (select count(distinct user_id) from user_interests where generation = %(g)s)""",
            {"g": number},
        ).fetchone()
    assert counts is not None
    return dg.MaterializeResult(
        metadata={
            "generation": number,
            "state": found.state,
            "items": counts[0],
            "users": counts[1],
            "dimensions": found.dim,
            "interests": found.interests,
            "seconds": perf_counter() - started,
        }
    )


@dg.asset(deps=[generation], group_name="serving", kinds={"postgres"})
def live_generation(context: dg.AssetExecutionContext, postgres: PostgresResource) -> dg.MaterializeResult[Any]:
    """Promotion of the newest generation: SQL, HTTP and Feast answer from it at once. A failed gate refuses it."""
    number = int(str(_latest(context, "generation", "generation")))
    with postgres.connect() as connection:
        before = lifecycle.promote(connection, number)
    return dg.MaterializeResult(metadata={"generation": number, "before": str(before.generation) if before else "none"})


@dg.asset(deps=[live_generation], group_name="serving", kinds={"postgres"})
def feast_features(context: dg.AssetExecutionContext, postgres: PostgresResource) -> dg.MaterializeResult[Any]:
    """Feast's registry of entities, views and services over the platform's tables, as `feast apply` writes it.

    Left as it is when these very definitions were applied to this database last: importing Feast alone takes seconds.
    """
    url = postgres.database_url()
    definitions = _feast_definitions()
    last = context.instance.get_latest_materialization_event(context.asset_key)
    metadata = last.asset_materialization.metadata if last and last.asset_materialization else {}
    with postgres.connect() as connection:
        applied = _registry_age(connection)
    mark = f"{definitions} {applied}"
    if applied and "mark" in metadata and metadata["mark"].value == mark:
        return dg.MaterializeResult(metadata={**metadata, "applied": False})
    from feature_repo.store import apply, close, feature_store

    store = feature_store(url)
    try:
        names = apply(store)
    finally:
        close(store)
    with postgres.connect() as connection:
        mark = f"{definitions} {_registry_age(connection)}"
    return dg.MaterializeResult(
        metadata={"objects": len(names), "names": ", ".join(sorted(names)), "mark": mark, "applied": True}
    )


def _feast_definitions() -> str:
    """Digest of everything that `feast apply` reads."""
    import feature_repo

    digest = hashlib.sha256(version("feast").encode())
    for source in sorted(Path(str(feature_repo.__file__)).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _registry_age(connection: psycopg.Connection[Any]) -> str:
    """When Feast's registry was last written, and how much it holds; empty when there is none."""
    names = [f"{FEAST_SCHEMA}.{table}" for table in ("feature_views", "feature_services")]
    found = connection.execute("select bool_and(to_regclass(name) is not null) from unnest(%s::text[]) name", [names])
    if found.fetchone() != (True,):
        return ""
    statement = sql.SQL(
        """select max(last_updated_timestamp), count(*), (select count(*) from {services}) from {views}"""
    ).format(
        views=sql.Identifier(FEAST_SCHEMA, "feature_views"), services=sql.Identifier(FEAST_SCHEMA, "feature_services")
    )
    row = connection.execute(statement).fetchone()
    return " ".join(map(str, row)) if row is not None and row[0] else ""


def _latest(context: dg.AssetExecutionContext, asset: str, entry: str) -> Any:
    """One metadata value of an asset's newest materialisation, in this run or an earlier one."""
    event = context.instance.get_latest_materialization_event(dg.AssetKey(asset))
    if event is None or event.asset_materialization is None:
        raise UserError(f"the asset {asset} has never been materialised: materialise it first")
    return event.asset_materialization.metadata[entry].value


MODEL_ASSETS = (training_set, checkpoint, generation, live_generation, feast_features)
