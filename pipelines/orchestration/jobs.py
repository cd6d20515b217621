"""What runs by itself: jobs, two schedules, and a sensor that looks for new data.

Dagster refuses a job over differently partitioned assets. The jobs that span them are therefore one op which runs the
asset graph without partitions, each asset finding what is new by itself, exactly as `polytower materialize` does.
"""

from typing import Any

import dagster as dg
from pydantic import Field

from pipelines.generation import lifecycle
from pipelines.orchestration.materialize import Until, materialize
from pipelines.orchestration.model_assets import MODEL_ASSETS
from pipelines.orchestration.resources import PostgresResource, TakeOver

sequences = dg.define_asset_job("sequences", selection=["user_sequences"], description="Sequences of chosen days.")
content = dg.define_asset_job("content", selection=["content_embeddings"], description="One modality's embeddings.")
load = dg.define_asset_job(
    "load", selection=["items", "interactions"], description="Loads the configured folder and checks it."
)
train = dg.define_asset_job(
    "train", selection=list(MODEL_ASSETS), description="Training set to live generation, behind the gates."
)


class FlowConfig(TakeOver):
    """preset, options: training configuration; without a preset that of the live generation, or else `demo`.

    folder, images, own: loaded first when given (`LoadConfig`).
    """

    preset: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    folder: str = ""
    images: str = ""
    own: dict[str, str] = Field(default_factory=dict)


@dg.op
def bring_data_up_to_date(context: dg.OpExecutionContext, config: FlowConfig, postgres: PostgresResource) -> None:
    """Loaded tables, their checks, sequences and content embeddings."""
    _run(context, config, postgres, "content")


@dg.op
def run_everything(context: dg.OpExecutionContext, config: FlowConfig, postgres: PostgresResource) -> None:
    """The whole flow, up to the live generation."""
    _run(context, config, postgres, "live")


def _run(context: dg.OpExecutionContext, config: FlowConfig, postgres: PostgresResource, until: Until) -> None:
    preset, options, start = config.preset, config.options, ""
    if not preset:
        # A night's run renews what serves; it does not replace it by another model.
        with postgres.connect() as connection:
            live = lifecycle.live(connection)
        preset, before = ("demo", {}) if live is None else live.recipe
        options, start = {**before, **options}, "" if live is None else live.config.get("start", "")
    result = materialize(
        postgres.database_url(),
        until=until,
        preset=preset,
        start=start,
        options=options,
        folder=config.folder,
        images=config.images,
        own=config.own,
        take_over=config.take_over,
        progress=False,
        instance=context.instance,
    )
    context.log.info(f"seconds by step: {result['seconds']}")
    for warning in result["warnings"]:
        context.log.warning(warning)


@dg.job(description="Interactions, sequences and content embeddings: whatever changed.")
def refresh() -> None:
    """New data in, checked and encoded."""
    bring_data_up_to_date()


@dg.job(description="The whole flow: refresh, train, build, check, promote.")
def full() -> None:
    """Everything."""
    run_everything()


@dg.schedule(job=refresh, cron_schedule="15 0 * * *")
def daily_refresh() -> dg.RunRequest:
    """A quarter past midnight UTC: the day that ended gets its sequences."""
    return dg.RunRequest()


@dg.schedule(job=full, cron_schedule="0 2 * * *")
def nightly_generation() -> dg.RunRequest:
    """At two, when the day's sequences are there: a new generation, promoted if every gate holds."""
    return dg.RunRequest()


@dg.sensor(job=refresh, minimum_interval_seconds=60)
def new_data(context: dg.SensorEvaluationContext, postgres: PostgresResource) -> Any:
    """Asks for a refresh when a load finished or interactions came in since the last look.

    The cursor is "<newest finished load>/<newest interaction's position>"; the first look only notes where it stands
    if there is nothing yet.
    """
    with postgres.connect() as connection:
        row = connection.execute(
            """select (select coalesce(max(load_id), 0) from loads where state = 'done'),
                      (select coalesce(max(position), 0) from interactions)"""
        ).fetchone()
    assert row is not None
    cursor = f"{row[0]}/{row[1]}"
    if cursor in (context.cursor, "0/0"):
        return dg.SkipReason("no load has finished and no interaction has arrived since the last check")
    return dg.SensorResult(run_requests=[dg.RunRequest(run_key=cursor)], cursor=cursor)


JOBS = (sequences, content, load, train, refresh, full)
SCHEDULES = (daily_refresh, nightly_generation)
SENSORS = (new_data,)
