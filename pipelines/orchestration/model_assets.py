"""Assets that a model makes: training set, checkpoint, generation, its promotion, and Feast's view of it."""

import hashlib
import sys
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import dagster as dg
import psycopg
from psycopg import sql
from pydantic import Field

from encoders.content.registry import encoder_of
from feature_repo.schema import FEAST_SCHEMA
from pipelines.generation import lifecycle, quality, recipe, training_folder
from pipelines.generation.adapted import encode_adapted
from pipelines.generation.build import build
from pipelines.generation.training import Checkpoint, located, train_checkpoint
from pipelines.orchestration import plots
from pipelines.orchestration.resources import EncoderResource, PostgresResource, TakeOver, Terminal
from polytower.errors import UserError


class TrainingConfig(dg.Config):
    """preset: name of the training configuration (docs/models.md lists them); empty keeps that of the live generation.

    options: what differs from it. start: the folder of a pretrained model (`polytower pretrain`); empty starts anew.
    """

    preset: str = ""
    start: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


class TrainingSetConfig(dg.Config):
    """before: a moment in ISO 8601; events at or after it are left out. Empty takes all events."""

    before: str = ""


@dg.asset(
    deps=["user_sequences", "content_embeddings", "query_embeddings"], group_name="model", kinds={"postgres", "arrow"}
)
def training_set(
    config: TrainingSetConfig, postgres: PostgresResource, encoders: EncoderResource
) -> dg.MaterializeResult[Any]:
    """What the towers learn from, as a folder named by its content: events, items, the content encoders in force."""
    before = datetime.fromisoformat(config.before) if config.before else None
    with postgres.connect() as connection:
        written = training_folder.save(connection, encoders.settings().training_sets_dir, before=before)
        content = connection.execute(
            """select modality, model, revision, dim, count(item_id) from content_encoders
               left join content_embeddings using (modality, revision) where active group by 1, 2, 3, 4 order by 1"""
        ).fetchall()
    table = plots.markdown_table(content, ["modality", "model", "revision", "width", "items"])
    return dg.MaterializeResult(
        metadata={
            "path": dg.MetadataValue.path(str(written.directory)),
            "sha256": written.sha256,
            "reused": written.reused,
            "dagster/row_count": written.events,
            "users": written.users,
            "items with events": written.items,
            "until position": written.until,
            "events before": config.before or "all",
            "content": dg.MetadataValue.md(table),
        }
    )


@dg.asset(deps=[training_set], group_name="model", kinds={"torch"})
def checkpoint(
    context: dg.AssetExecutionContext,
    config: TrainingConfig,
    postgres: PostgresResource,
    encoders: EncoderResource,
    terminal: Terminal,
) -> dg.MaterializeResult[Any]:
    """Towers trained on the newest training set; the same data and preset find the finished checkpoint again."""
    chosen = encoders.settings()
    with postgres.connect() as connection:
        asked = recipe.chosen(connection, config.preset, config.options, config.start)
    reads = asked.config.towers
    # A home that was moved has the folder under the same name.
    folder = chosen.training_sets_dir / Path(str(_latest(context, "training_set", "path"))).name
    snapshot = training_folder.load(
        folder, reads.user_attributes, queries="queries" in reads.reads, contents=asked.config.lora_rank > 0
    )
    trained = train_checkpoint(
        snapshot, asked.preset, chosen.checkpoints_dir, load=partial(encoder_of, config=chosen),
        options=asked.options, device=chosen.device, progress=terminal.progress,
        start=Path(asked.start) if asked.start else None,
    )  # fmt: skip
    for told in trained.told:
        context.log.warning(told)
    if terminal.progress and trained.adapters:
        stayed = [name for name in trained.encoders if name not in trained.adapters]
        sys.stderr.write(f"  encoders adapted: {', '.join(trained.adapters)}; frozen: {', '.join(stayed) or 'none'}\n")
    curves = plots.curves(trained.curves, "epoch", ["loss", "ndcg_10", "recall_50"])
    return dg.MaterializeResult(
        metadata={
            "directory": dg.MetadataValue.path(str(trained.directory)),
            "training set": dg.MetadataValue.path(str(folder)),
            "sha256": trained.sha256,
            "preset": trained.preset,
            "reused": trained.reused,
            "encoders": dg.MetadataValue.md(_encoders(trained)),
            "best epoch": trained.best_epoch,
            "seconds": trained.seconds,
            "curves": dg.MetadataValue.md(curves),
            **{f"validation {name}": float(value) for name, value in trained.metrics.items()},
        }
    )


@dg.asset(deps=[checkpoint], group_name="model", kinds={"postgres", "torch"})
def adapted_embeddings(
    context: dg.AssetExecutionContext,
    config: TakeOver,
    postgres: PostgresResource,
    encoders: EncoderResource,
    terminal: Terminal,
) -> dg.MaterializeResult[Any]:
    """Every item by the encoders that the newest checkpoint's training adapted; nothing where it left them frozen."""
    with postgres.connect() as connection:
        reports = encode_adapted(
            connection, _folder(context), partial(encoder_of, config=encoders.settings()),
            progress=terminal.progress, take_over=config.take_over,
        )  # fmt: skip
    columns = ["modality", "model", "revision", "items", "encoded", "skipped", "removed", "failed", "seconds"]
    rows = [[getattr(report, column) for column in columns] for report in reports]
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": sum(report.encoded + report.skipped for report in reports),
            "encoded": sum(report.encoded for report in reports),
            "failed": sum(report.failed for report in reports),
            "modalities": dg.MetadataValue.md(plots.markdown_table(rows, columns)),
        }
    )


@dg.asset(deps=[adapted_embeddings], group_name="model", kinds={"postgres", "torch"})
def generation(
    context: dg.AssetExecutionContext, config: TakeOver, postgres: PostgresResource, terminal: Terminal
) -> dg.MaterializeResult[Any]:
    """All item embeddings and interests of the newest checkpoint, indexed and measured, ready to go live."""
    started = perf_counter()
    directory = _folder(context)
    with postgres.connect() as connection:
        number = build(connection, directory, progress=terminal.progress, take_over=config.take_over)
        found = lifecycle.get(connection, number)
        left_out = quality.left_out(connection, number)
        counts = connection.execute(
            """select (select count(*) from item_embeddings where generation = %(g)s),
                      (select count(distinct user_id) from user_interests where generation = %(g)s)""",
            {"g": number},
        ).fetchone()
    assert counts is not None
    if left_out:
        context.log.warning(
            f"{left_out} items are left out of generation {number}: its model is made of content, and they have none"
        )
    return dg.MaterializeResult(
        metadata={
            "generation": number,
            "items without content, left out": left_out,
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
        _refuse_past(lifecycle.get(connection, number))
        before = lifecycle.promote(connection, number)
    return dg.MaterializeResult(metadata={"generation": number, "before": str(before.generation) if before else "none"})


def _refuse_past(found: lifecycle.Generation) -> None:
    if found.trained_before is not None:
        raise UserError(
            f"generation {found.generation} knows no event from {found.trained_before.isoformat()} on, so it does not "
            f"go live by itself; `polytower generations promote {found.generation}` does it all the same"
        )


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


def _encoders(trained: Checkpoint) -> str:
    """A table of the encoders behind the towers: which training adapted, and which it left as they are."""
    rows = [
        (name, revision, "adapted" if name in trained.adapters else "frozen", trained.adapters.get(name, ""))
        for name, revision in trained.encoders.items()
    ]
    return plots.markdown_table(rows, ["modality", "revision", "in training", "revision after it"])


def _folder(context: dg.AssetExecutionContext) -> Path:
    """The newest checkpoint's."""
    recorded = str(_latest(context, "checkpoint", "directory"))
    return located(recorded) or Path(recorded)


def _latest(context: dg.AssetExecutionContext, asset: str, entry: str) -> Any:
    """One metadata value of an asset's newest materialisation, in this run or an earlier one."""
    event = context.instance.get_latest_materialization_event(dg.AssetKey(asset))
    if event is None or event.asset_materialization is None:
        raise UserError(f"the asset {asset} has never been materialised: materialise it first")
    metadata = event.asset_materialization.metadata
    if entry not in metadata:
        raise UserError(f"the asset {asset} was made by an earlier version: materialise it again")
    return metadata[entry].value


MODEL_ASSETS = (training_set, checkpoint, adapted_embeddings, generation, live_generation, feast_features)
