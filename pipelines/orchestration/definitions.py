"""All of it for Dagster: `dagster dev` (or `dagster dev -m pipelines.orchestration.definitions`) reads `defs`."""

import dagster as dg

from pipelines.orchestration.checks import CHECKS
from pipelines.orchestration.data_assets import DATA_ASSETS
from pipelines.orchestration.jobs import JOBS, SCHEDULES, SENSORS
from pipelines.orchestration.model_assets import MODEL_ASSETS
from pipelines.orchestration.resources import EncoderResource, PostgresResource, Terminal

# One process at a time holds the models; a second one would load them again and halve the speed of both.
defs = dg.Definitions(
    assets=[*DATA_ASSETS, *MODEL_ASSETS],
    asset_checks=CHECKS,
    jobs=JOBS,
    schedules=SCHEDULES,
    sensors=SENSORS,
    resources={"postgres": PostgresResource(), "encoders": EncoderResource(), "terminal": Terminal()},
    executor=dg.in_process_executor,
)
